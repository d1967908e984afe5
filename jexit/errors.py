"""How a run ends that is no fault of jexit's: `jexit.main` says why in a sentence and exits."""

INTERRUPTED, HOST_LOST = 3, 4  # exit codes of what the same command continues


class UserError(ValueError):
    """What the user can mend, as one sentence: the value, the rule and the remedy."""

    exit_code = 1


class MissingFile(UserError, FileNotFoundError):
    """A file or directory that is not there."""


class RunEnded(RuntimeError):
    """Why a run ended before its last step."""

    exit_code = 1
