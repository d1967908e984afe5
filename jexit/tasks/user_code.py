"""Guards for a user's own code, which limit its time and turn its exceptions into UserErrors."""

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

_AGAIN_SECONDS = 1.0  # interval at which code that catches everything is interrupted again


@contextlib.contextmanager
def user_code(what: str, file: str | None) -> Iterator[None]:
    """Turns an exception in a user's code, which runs in the `with` block, into a UserError.

    `what` states what failed, and `file` is the path of the user's code. The message consists of
    `what`, the line in `file`, and the reason. A UserError passes unchanged.
    """
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
        raise UserError(
            f"{what} ({f'{place}: ' if place else ''}{reason}); fix this error"
        ) from error


def guarded_judge(
    task: Task, problems: Sequence[Problem], attempts: Sequence[Attempt]
) -> list[Verdict]:
    """Calls `task.judge`, with a time limit and `user_code` if a user defined the task.

    A task whose class belongs to jexit is called directly, because it guards each call of a user's
    function itself. `task.time_limit` is the limit in seconds.
    """
    if type(task).__module__.startswith("jexit."):
        return task.judge(problems, attempts)
    what, file = f"task {task.name!r} cannot judge", inspect.getsourcefile(type(task))
    with user_code(what, file), time_limit(task.time_limit, f"task {task.name!r}"):
        return task.judge(problems, attempts)


class _TimeUp(BaseException):
    """Raised in a user's code when its time is up.

    This is not an Exception, because a user's code may catch every Exception.
    """


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises UserError if the `with` block takes longer than `seconds`.

    `what` names the running code in the error message. The limit works only on the main thread. On
    other threads, which do not receive signals, there is no limit.
    """
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
