"""Exceptions that do not indicate a bug in jexit; `jexit.main` reports each in one sentence."""

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
