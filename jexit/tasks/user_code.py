"""Guards around code that is not jexit's: its exceptions are sentences, and it has to end."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jexit.errors import UserError

if TYPE_CHECKING:
    from jexit.tasks.base import Attempt, Problem, Task, Verdict

_AGAIN_SECONDS = 1.0  # after which code that catches everything is stopped anew


@contextlib.contextmanager
def user_code(what: str, file: str | None) -> Iterator[None]:
    """Turns an exception of a user's code into a UserError: `what`, why, and the line in `file`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            place, reason = f"{error.filename}, line {error.lineno}", error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == file]
            place = f"{file}, line {lines[-1]}" if lines else ""
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        raise UserError(f"{what} ({f'{place}: ' if place else ''}{reason}); mend it") from error


def guarded_judge(
    task: Task, problems: Sequence[Problem], attempts: Sequence[Attempt]
) -> list[Verdict]:
    """`task.judge`, under its time limit and with exceptions as sentences if it is a user's own.

    Where it is jexit's, the functions that it calls are guarded one by one.
    """
    if type(task).__module__.startswith("jexit."):
        return task.judge(problems, attempts)
    what, file = f"task {task.name!r} cannot judge", inspect.getsourcefile(type(task))
    with user_code(what, file), time_limit(task.time_limit, f"task {task.name!r}"):
        return task.judge(problems, attempts)


class _TimeUp(BaseException):
    """No Exception, which a function may catch."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises UserError when the block takes longer; on the main thread: only that gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    except _TimeUp:
        raise UserError(
            f"{what} took longer than {seconds:g} s for one batch; make it faster, or raise "
            "config.task.time_limit"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
