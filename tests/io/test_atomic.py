"""Directories appear whole or not at all."""

import errno
import pathlib

import pytest

from jexit.io.atomic import atomic_directory


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


def test_a_directory_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with atomic_directory(target) as partial:
        assert not target.exists()
        (partial / "a.txt").write_text("x")
    assert content(tmp_path) == {"new/model/a.txt": "x"}


def test_an_empty_directory_may_be_the_target(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", "x")
    assert content(tmp_path) == {"model/sub/a.txt": "x"}


def test_a_directory_with_files_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "model"
    write(target, "old")
    with pytest.raises(ValueError, match="exists and is not empty; give another target"):
        write(target, "new")
    assert content(tmp_path) == {"model/sub/a.txt": "old"}
    (target / "only_old.txt").write_text("")
    write(target, "new", overwrite=True)
    assert content(tmp_path) == {"model/sub/a.txt": "new"}


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="is a file; give the name of a directory"):
        write(tmp_path / "model", "x", overwrite=True)
    assert content(tmp_path) == {"model": "mine"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_midway_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "a" / "b" / "model") as partial:
        (partial / "half.txt").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["block", "flush", "rename"])
def test_a_failure_midway_leaves_the_old_directory(tmp_path, monkeypatch, at):
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
        pytest.raises(ValueError, match=r"cannot write .*model: No space left.*free some space"),
        atomic_directory(target, overwrite=True) as partial,
    ):
        (partial / "a.txt").write_text("new")
        if at == "block":
            fail()
    assert content(tmp_path) == {"model/sub/a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    for name in (".model.partial", ".model.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rubbish.txt").write_text("")
    write(tmp_path / "model", "x")
    assert content(tmp_path) == {"model/sub/a.txt": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_errors_of_what_is_read_inside_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "model"):
        (tmp_path / "gone.txt").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*choose another place"):
        write(tmp_path / "file" / "model", "x")
