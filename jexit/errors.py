"""Errors that are not bugs in jexit: `jexit.main` prints each as one sentence and exits."""

INTERRUPTED, HOST_LOST = 3, 4  # exit codes of what the same command continues


class UserError(ValueError):
    """An error that the user can fix; its one sentence gives the value, the rule and the remedy."""

    exit_code = 1


class SharedUserError(UserError):
    """One that every host raises at the same place, so that they can still save together."""


class MissingFile(UserError, FileNotFoundError):
    """A file or directory that is not there."""


class RunEnded(RuntimeError):
    """Why a run ended before its last step."""

    exit_code = 1
