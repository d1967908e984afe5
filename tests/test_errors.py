"""Commands report what is not their fault in one sentence, and show where their bugs are."""

import errno
import os

import pytest

from jexit.errors import MissingFile, RunEnded, UserError, command


def ended_by(error):
    @command
    def main(argv):
        raise error

    return main([])


class Lost(RunEnded):
    exit_code = 4


def system_error(code):
    return OSError(code, os.strerror(code), "there/file")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("a is 1;\n  raise it"), 1, "a is 1; raise it"),
        (MissingFile("no a; make it"), 1, "no a; make it"),
        (Lost("a host is gone"), 4, "a host is gone"),
        (
            system_error(errno.ENOSPC),
            1,
            "cannot write there/file: No space left on device; free some space, or choose another "
            "place",
        ),
        (
            system_error(errno.EACCES),
            1,
            "there/file cannot be opened (Permission denied); change its permissions",
        ),
    ],
)
def test_what_is_no_bug_is_one_sentence_and_an_exit_code(capsys, error, code, sentence):
    assert ended_by(error) == code
    assert capsys.readouterr() == ("", f"jexit: {sentence}\n")


@pytest.mark.parametrize("error", [ValueError(), KeyError("a"), system_error(errno.ENOENT)])
def test_a_bug_is_raised(capsys, error):
    with pytest.raises(type(error)) as raised:
        ended_by(error)
    assert raised.value is error and capsys.readouterr() == ("", "")
    assert issubclass(UserError, ValueError)  # callers of the library may catch that
