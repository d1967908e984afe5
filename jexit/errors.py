"""Errors that are not bugs in jexit: `jexit.main` prints each as one sentence and exits."""

INTERRUPTED, HOST_LOST = 3, 4  # exit codes of runs that the same command continues


class UserError(ValueError):
    """An error that the user can fix; its message gives the value, the rule and the remedy."""

    exit_code = 1


class SharedUserError(UserError):
    """A UserError that all hosts raise at the same place, so that they can still save together."""


class MissingFile(UserError, FileNotFoundError):
    """An error about a file or directory that does not exist."""


class RunEnded(RuntimeError):
    """An error that ends a run before its last step; its message is the reason."""

    exit_code = 1
