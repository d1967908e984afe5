"""Files and directories appear whole or not at all, whatever happens while they are written."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from jexit.errors import UserError
from jexit.io.atomic import atomic_directory
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


# Directories


def test_a_directory_appears_when_it_is_whole_and_replaces_when_asked(tmp_path):
    target = tmp_path / "new" / "model"
    with atomic_directory(target) as partial:
        assert not target.exists()
        (partial / "a.txt").write_text("x")
    assert content(tmp_path) == {"new/model/a.txt": "x"}
    with pytest.raises(UserError, match="exists and is not empty; give another target"):
        write(target, "new")
    assert content(tmp_path) == {"new/model/a.txt": "x"}
    for name in (".model.partial", ".model.previous"):  # what a killed process left is cleared
        (target.parent / name).mkdir()
        (target.parent / name / "rubbish.txt").write_text("")
    write(target, "new", overwrite=True)
    assert content(tmp_path) == {"new/model/sub/a.txt": "new"}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "x")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give the name of a directory"):
        write(tmp_path / "file", "x", overwrite=True)
    with pytest.raises(UserError, match=r"cannot write .*choose another place"):
        write(tmp_path / "file" / "model", "x")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_midway_leaves_nothing(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_directory(tmp_path / "a" / "b" / "model") as partial:
            (partial / "half.txt").write_text("x")
            raise error
    # Errors of what is read inside are not taken for a full disk.
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "model"):
        (tmp_path / "gone.txt").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["block", "flush", "rename"])
def test_a_full_disk_leaves_the_old_directory(tmp_path, monkeypatch, at):
    target = tmp_path / "model"
    write(target, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "flush":
        monkeypatch.setattr("jexit.io.atomic._flush", fail)
    if at == "rename":
        real = pathlib.Path.rename

        def rename(self, to):
            # Everything up to the moment when the old directory has moved aside goes well.
            return fail() if self.name == ".model.partial" else real(self, to)

        monkeypatch.setattr(pathlib.Path, "rename", rename)
    with (
        pytest.raises(UserError, match=r"cannot write .*model: No space left.*free some space"),
        atomic_directory(target, overwrite=True) as partial,
    ):
        (partial / "a.txt").write_text("new")
        if at == "block":
            fail()
    assert content(tmp_path) == {"model/sub/a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Files


def test_a_file_is_written_with_its_directories_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "eval.json"
    write_json_atomic(path, {"accuracy": 0.5})
    (path.parent / ".eval.json.partial").write_bytes(b"half of a much longer earlier text")
    write_json_atomic(path, {"accuracy": 0.75, "text": "a\ud800b"})
    assert json.loads(path.read_text()) == {"accuracy": 0.75, "text": "a?b"}
    assert [file.name for file in path.parent.iterdir()] == ["eval.json"]
    with pytest.raises(UserError, match=r"cannot write .*x\.json.*choose another place"):
        write_json_atomic(path / "x.json", {})
    with pytest.raises(ValueError, match="of type set has no form in JSON"):
        write_json_atomic(tmp_path / "x.json", {"a": {1, 2}})
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("at", ["disk", "fsync", "replace"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, full_disk, at):
    path = tmp_path / "config.json"
    write_bytes_atomic(path, b"old")

    def killed(*_):
        raise KeyboardInterrupt

    if at == "disk":
        full_disk(3)
        with pytest.raises(UserError, match=r"cannot write .*config\.json: No space.*free some"):
            write_bytes_atomic(path, b"something new")
    else:
        monkeypatch.setattr(os, at, killed)
        with pytest.raises(KeyboardInterrupt):
            write_bytes_atomic(path, b"new")
    assert content(tmp_path) == {"config.json": "old"}


def test_json_holds_no_nan_and_no_arrays(tmp_path):
    array = np.asarray([[1.0, np.inf], [2.0, 3.0]])
    value = {"array": array, "scalar": np.float32(0.5), 1: (True, None, tmp_path, np.nan)}
    expected = {"array": [[1.0, None], [2.0, 3.0]], "scalar": 0.5}
    assert to_jsonable(value) == expected | {"1": [True, None, str(tmp_path), None]}
