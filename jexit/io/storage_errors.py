"""Reports a failed write of Orbax or TensorStore only once, with the system's error message."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging

_CODE = re.compile(r"os_error_code='(\d+)'")  # TensorStore's


def system_reason(error: BaseException | None) -> str | None:
    """Returns the operating system's message for `error`, such as "File too large", or None.

    The message belongs to the first error code in the chain of causes and contexts, if any.
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if found := _CODE.search(str(error)):
            code = int(found[1])
        if code:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def reason(error: BaseException) -> str:
    """Returns the reason for a failed write in one line: the operating system's, if it is known."""
    return system_reason(error) or str(error).strip().partition("\n")[0] or type(error).__name__


def say_once() -> None:
    """Hides logs of failed writes in background threads; waiting for a write raises its error."""
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().addFilter(_is_news)
    if not isinstance(sys.unraisablehook, functools.partial):
        sys.unraisablehook = functools.partial(_tell, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    from_storage = "orbax" in record.pathname or record.name == "asyncio"
    return not (from_storage and record.exc_info and system_reason(record.exc_info[1]))


def _tell(before: Callable[[Any], object], unraisable: Any) -> None:
    # After the first failed write Orbax closes its event loop, and TensorStore's callbacks for the
    # others find it closed.
    trace = unraisable.exc_traceback
    if trace is None or trace.tb_frame.f_code.co_name != "call_soon_threadsafe":
        before(unraisable)
