"""Exceptions that do not indicate a bug in jexit, and their report in one sentence on stderr."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED, HOST_LOST = 3, 4  # exit codes of runs that the same command continues


class UserError(ValueError):
    """An error that the user can fix, such as an invalid setting.

    The message says what is wrong, which rule applies, and what to do.
    """

    exit_code = 1


class SharedUserError(UserError):
    """A UserError that all hosts raise at the same point of the program.

    Because all hosts reach the same point, they can still save a checkpoint together.
    """


class MissingFile(UserError, FileNotFoundError):
    """A UserError for a file or directory that does not exist."""


class RunEnded(RuntimeError):
    """An error that ends a run before its last step; the message says why the run ended."""

    exit_code = 1


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Makes a command's `main` report the errors that are not bugs, and return their exit codes.

    Bugs propagate with their traceback.
    """

    @functools.wraps(main)
    def reporting(*arguments: object) -> int:
        try:
            return main(*arguments)
        except Exception as error:
            code = report(error)
            if code is None:
                raise
            return code

    return reporting


def report(error: Exception, path: str | os.PathLike[str] = "a file") -> int | None:
    """Prints an error that is not a bug on stderr; returns its exit code, or None for a bug.

    Errors that are not bugs are UserError, RunEnded, and the system's errors for a full or
    read-only disk and for missing permissions. `path` is the file to name in the message if the
    system's error names none.
    """
    if isinstance(error, (UserError, RunEnded)):
        say(error)
        return error.exit_code
    if isinstance(error, OSError):
        path = error.filename or path
        if error.errno in (*DISK_FULL, errno.EROFS):
            say(disk_message(path, error))
            return UserError.exit_code
        if error.errno == errno.EACCES:
            say(f"{path} cannot be opened ({error.strerror}); change its permissions")
            return UserError.exit_code
    return None


def say(message: object) -> None:
    """Prints a message on stderr as one line that begins with "jexit: "."""
    print(f"jexit: {' '.join(str(message).split())}", file=sys.stderr)


def without_remedy(message: object) -> str:
    """Returns an error message up to its remedy, for a message that ends in another remedy."""
    text = str(message)
    return text.rpartition("; ")[0] or text


def missing_package(name: str | None, extra: str) -> str:
    """Returns the error message for a package that is not installed and belongs to `extra`."""
    return f"{name} is not installed; run pip install -e '.[{extra}]' in the checkout"


def disk_message(path: str | os.PathLike[str], error: OSError) -> str:
    """Returns an error message that says why `path` cannot be written, and what to do."""
    remedy = "choose another place"
    if error.errno in DISK_FULL:
        remedy = f"free some space, or {remedy}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = f"make it writable, or {remedy}"
    return f"cannot write {path}: {error.strerror or error}; {remedy}"
