"""Guards for user code, which limit its time and turn its exceptions into UserErrors."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from jexit.errors import UserError
from jexit.settings import shown
from jexit.tasks.base import VERDICT_KINDS, Attempt, Problem, Task, Verdict
from jexit.tasks.streams import NoMoreProblems

# Code that catches everything is interrupted again and again, and then the process ends.
_AGAIN_SECONDS = 0.02
_MOST_INTERRUPTS = 100


@contextlib.contextmanager
def user_code(what: str, file: str | None) -> Iterator[None]:
    """Turns an exception in the `with` block, which runs a user's code, into a UserError.

    The error message says what failed (`what`), in which line of the user's `file`, and why. The
    line is left out if the exception does not come from `file`. UserError and NoMoreProblems pass
    through unchanged.
    """
    try:
        yield
    except (UserError, NoMoreProblems):
        raise
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        if isinstance(error, SyntaxError):
            place, reason = f"{error.filename or file}, line {error.lineno or 1}", error.msg
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
    """Calls `task.judge` and returns its verdicts, one for each attempt.

    For a user's task, raises UserError if the method raises an exception, takes longer than
    `task.time_limit`, or does not return a valid verdict for each attempt. The tasks in jexit are
    called without guards, because they guard their own calls of user functions.
    """
    if type(task).__module__.startswith("jexit."):
        return task.judge(problems, attempts)
    what, file = f"task {task.name!r} cannot judge", inspect.getsourcefile(type(task))
    with user_code(what, file), time_limit(task.time_limit, f"task {task.name!r}"):
        verdicts = list(task.judge(problems, attempts))
    if len(verdicts) != len(problems):
        raise UserError(
            f"{what}: it returned {len(verdicts)} verdicts for {len(problems)} completions, but it "
            "must return one verdict for each; fix its method judge"
        )
    for verdict in verdicts:
        if not _is_verdict(verdict):
            raise UserError(
                f"{what}: it returned {shown(verdict)}, but it must return a jexit.tasks.Verdict "
                f"with a finite reward and a kind from {', '.join(VERDICT_KINDS)}; use Task.verdict"
            )
    return verdicts


def guard_methods(task: Task) -> None:
    """Turns exceptions in a user's methods into UserErrors that name the method.

    The guarded methods are `problem`, `size`, `text_totals` and `answer_mark`. Tasks in jexit stay
    unchanged.
    """
    if type(task).__module__.startswith("jexit."):
        return
    file = inspect.getsourcefile(type(task))
    for name in ("problem", "size", "text_totals", "answer_mark"):
        if name not in vars(task):  # not guarded yet
            guard = user_code(f"{task.name}: {name} failed", file)
            setattr(task, name, guard(getattr(task, name)))


def _is_verdict(verdict: Any) -> bool:
    kind, reward = getattr(verdict, "kind", None), getattr(verdict, "reward", None)
    return kind in VERDICT_KINDS and isinstance(reward, (int, float)) and math.isfinite(reward)


class _TimeUp(BaseException):
    """Raised in user code at its time limit; not an Exception, because the code may catch those."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises UserError if the `with` block takes longer than `seconds`.

    `what` is the subject of the error message. The limit applies only in the main thread, because
    other threads receive no signals. If the block catches every interrupt, the process exits with
    code 1.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    said = (
        f"{what} took longer than {seconds:g} s for one batch; make it faster, or raise "
        "config.task.time_limit"
    )
    interrupts = 0

    def over(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > _MOST_INTERRUPTS:
            print(f"jexit: {said} (it ignores every interrupt)", file=sys.stderr, flush=True)
            os._exit(UserError.exit_code)
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    except _TimeUp:
        raise UserError(said) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
