"""Small files are whole or absent, whatever happens while they are written."""

import json
import os

import numpy as np
import pytest

from jexit.io.files import to_jsonable, write_bytes_atomic, write_json_atomic


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_written_with_its_directories_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "eval.json"
    write_json_atomic(path, {"accuracy": 0.5})
    write_json_atomic(path, {"accuracy": 0.75})
    assert json.loads(path.read_text()) == {"accuracy": 0.75}
    assert names(path.parent) == ["eval.json"]


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, full_disk, room):
    path = tmp_path / "config.json"
    write_bytes_atomic(path, b"old")
    full_disk(room)
    with pytest.raises(ValueError, match=r"cannot write .*config\.json: No space left.*free some"):
        write_bytes_atomic(path, b"something new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "config.json"
    write_bytes_atomic(path, b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, killed)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["config.json"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".config.json.partial").write_bytes(b"half of a much longer earlier text")
    write_bytes_atomic(tmp_path / "config.json", b"new")
    assert names(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"new"


def test_a_directory_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*eval\.json.*choose another place"):
        write_json_atomic(tmp_path / "runs" / "eval.json", {})


def test_json_holds_no_nan_and_no_arrays(tmp_path):
    value = {
        "nan": float("nan"),
        "array": np.asarray([[1.0, np.inf], [2.0, 3.0]]),
        "scalar": np.float32(0.5),
        1: (True, None, tmp_path),
    }
    expected = {
        "nan": None,
        "array": [[1.0, None], [2.0, 3.0]],
        "scalar": 0.5,
        "1": [True, None, str(tmp_path)],
    }
    assert to_jsonable(value) == expected


def test_what_is_no_json_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="of type set has no form in JSON"):
        write_json_atomic(tmp_path / "x.json", {"a": {1, 2}})
    assert names(tmp_path) == []


def test_text_with_a_lone_surrogate_is_written(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"text": "a\ud800b"})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"text": "a?b"}
