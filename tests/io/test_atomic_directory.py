"""Files and directories appear whole or not at all, whatever happens while they are written."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from jexit.errors import UserError
from jexit.io.atomic_directory import atomic_directory
from jexit.io.files import to_jsonable, write_bytes_atomic, write_json_atomic


def content(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


def write(target, text, **options):
    with atomic_directory(target, **options) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text(text)
        assert not target.exists() or content(target).get("sub/a.txt") != text


def test_a_directory_appears_when_it_is_whole_and_replaces_when_asked(tmp_path):
    target = tmp_path / "new" / "model"
    write(target, "old")
    with pytest.raises(UserError, match=r"is not empty, but it must be .*; give another one, or"):
        write(target, "new")
    assert content(tmp_path) == {"new/model/sub/a.txt": "old"}
    for name in (".model.partial", ".model.previous"):  # what a killed process left is cleared
        (target.parent / name).mkdir()
        (target.parent / name / "rubbish.txt").write_text("")
    write(target, "new", overwrite=True)
    assert content(tmp_path) == {"new/model/sub/a.txt": "new"}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "x")
    (tmp_path / "file").write_text("mine")
    for path, words in (
        ("file", "is a file, but it must be a new or empty directory; give"),
        ("file/model", "cannot write .*choose anoth"),
    ):
        with pytest.raises(UserError, match=words):
            write(tmp_path / path, "x", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_midway_leaves_what_was_there(tmp_path, monkeypatch):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_directory(tmp_path / "a" / "b" / "model") as partial:
            (partial / "half.txt").write_text("x")
            raise error
    # Errors of what is read inside are not taken for a full disk.
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "model"):
        (tmp_path / "gone.txt").read_text()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "model", "old")
    real = pathlib.Path.rename

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def rename(path, to):  # the old directory can still move aside
        return full() if path.name == ".model.partial" else real(path, to)

    for place, fails in (
        ("pathlib.Path.write_text", full),
        ("jexit.io.atomic_directory.flush", full),
        ("pathlib.Path.rename", rename),
    ):
        words = r"cannot write .*model: No space left.*free some space"
        with monkeypatch.context() as patched, pytest.raises(UserError, match=words):
            patched.setattr(place, fails)
            write(tmp_path / "model", "new", overwrite=True)
        assert content(tmp_path) == {"model/sub/a.txt": "old"}
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch, full_disk):
    path = tmp_path / "a" / "b" / "eval.json"
    write_json_atomic(path, {"accuracy": 0.5})
    (path.parent / ".eval.json.partial").write_bytes(b"half of a much longer earlier text")
    write_json_atomic(path, {"accuracy": 0.75, "text": "a\ud800b"})
    assert json.loads(path.read_text()) == {"accuracy": 0.75, "text": "a?b"}
    with pytest.raises(UserError, match=r"cannot write .*x\.json.*choose another place"):
        write_json_atomic(path / "x.json", {})
    write_bytes_atomic(path, b"old")
    with full_disk(3), pytest.raises(UserError, match=r"cannot write .*eval\.json: .*free some"):
        write_bytes_atomic(path, b"something new")

    def killed(*_):
        raise KeyboardInterrupt

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, call, killed)
            write_bytes_atomic(path, b"new")
    assert content(tmp_path) == {"a/b/eval.json": "old"}


def test_json_holds_no_nan_and_no_arrays(tmp_path):
    array = np.asarray([[1.0, np.inf], [2.0, 3.0]])
    value = {"array": array, "scalar": np.float32(0.5), 1: (True, None, tmp_path, np.nan)}
    expected = {"array": [[1.0, None], [2.0, 3.0]], "scalar": 0.5}
    assert to_jsonable(value) == expected | {"1": [True, None, str(tmp_path), None]}
    with pytest.raises(UserError, match="of type set cannot be written as JSON"):
        write_json_atomic(tmp_path / "x.json", {"a": {1, 2}})
    assert not (tmp_path / "x.json").exists()
