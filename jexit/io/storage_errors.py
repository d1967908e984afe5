"""What Orbax and TensorStore say when the disk refuses a write: the system's few words, once."""

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
    """What the operating system said, if that is where the error or its cause comes from."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if found := _CODE.search(str(error)):
            code = int(found[1])
        if code:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def reason(error: BaseException) -> str:
    """Why a write failed, in one line."""
    return system_reason(error) or str(error).strip().partition("\n")[0] or type(error).__name__


def say_once() -> None:
    """Keeps off stderr what threads of the storage libraries print of a refused write.

    Each tells the whole traceback of an error that the call which waits for it raises again.
    """
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().addFilter(_is_news)
    if not isinstance(sys.unraisablehook, functools.partial):
        sys.unraisablehook = functools.partial(_tell, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    from_storage = "orbax" in record.pathname or record.name == "asyncio"
    return not (from_storage and record.exc_info and system_reason(record.exc_info[1]))


def _tell(before: Callable[[Any], object], unraisable: Any) -> None:
    # What waited for several writes gives them up with the first that is refused, and TensorStore
    # then finds nobody to tell of the others.
    trace = unraisable.exc_traceback
    if trace is None or trace.tb_frame.f_code.co_name != "call_soon_threadsafe":
        before(unraisable)
