"""GSM8K built from its published files is the dataset that the library itself would have built."""

import functools
import json
import os
import subprocess
import sys
from unittest import mock

import pytest

from jexit.data import prepare
from jexit.tasks import make_task
from jexit.tasks.base import SPLITS

tfds = pytest.importorskip("tensorflow_datasets")


def row(number):
    return {"question": f"Question {number}?", "answer": f"It is <<1*{number}>>so.\n#### {number}"}


def write_rows(file, rows):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")


@pytest.fixture
def source(tmp_path):
    """Published files, and those beside them that hold the same questions with other answers."""
    folder = tmp_path / "source"
    folder.mkdir()
    write_rows(folder / "train.jsonl", map(row, range(40)))
    write_rows(folder / "test.jsonl", map(row, range(100, 107)))
    for split in ("train", "test"):
        write_rows(folder / f"{split}_socratic.jsonl", [row(1000)])
    return folder


@pytest.fixture
def library():
    """The library's own builder."""
    from tensorflow_datasets.text.gsm8k import gsm8k

    return gsm8k


def sizes(path):
    task = make_task("gsm8k", str(path))
    return [task.size(split) for split in SPLITS]


def refusal(capsys, *argv):
    """What the command says when it fails: one sentence, nothing on stdout."""
    assert prepare.main(["gsm8k", *map(str, argv)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jexit: ") and err.count("\n") == 1
    return err


def test_the_task_reads_what_was_built(source, tmp_path, capsys):
    target = tmp_path / "data"
    assert prepare.main(["gsm8k", f"--from={source}", f"--to={target}"]) == 0
    assert capsys.readouterr() == (
        f"wrote {target}/gsm8k/1.0.0: 40 train and 7 test rows; the published files have "
        "7,473 train and 1,319 test rows\n",
        "",
    )
    assert os.listdir(target) == ["gsm8k"] and os.listdir(target / "gsm8k") == ["1.0.0"]
    # The files as they are, what was built, and its version.
    for path in (source, target, target / "gsm8k/1.0.0"):
        task = make_task("gsm8k", str(path))
        assert [task.size(split) for split in SPLITS] == [38, 2, 7]
        problems = [task.problem(s, i) for s in SPLITS[:2] for i in range(task.size(s))]
        assert {problem.answer for problem in problems} == {str(n) for n in range(40)}
        for problem in problems:
            assert problem.fields["question"] == f"Question {problem.answer}?"
            assert problem.completion == f"It is so.\n#### {problem.answer}"
    assert "tensorflow" not in sys.modules
    # What is there is left alone.
    write_rows(source / "train.jsonl", [row(1)])
    said = prepare.prepare_gsm8k(source, target)
    assert said.endswith("exists already and was not changed: 40 train and 7 test rows")
    assert sizes(target) == [38, 2, 7]


def test_it_is_what_the_library_builds(source, tmp_path, library):
    prepare.prepare_gsm8k(source, tmp_path / "ours")
    files = {split: str(source / f"{split}.jsonl") for split in ("train", "test")}
    with mock.patch.object(
        tfds.download.DownloadManager, "download_and_extract", lambda self, urls: files
    ):
        theirs = library.Gsm8k(data_dir=str(tmp_path / "theirs"), file_format="array_record")
        theirs.download_and_prepare()
    ours = library.Gsm8k(data_dir=str(tmp_path / "ours"), file_format="array_record")
    assert ours.is_prepared()
    for split in ("train", "test"):
        assert list(ours.as_data_source(split=split)) == list(theirs.as_data_source(split=split))


def test_the_default_is_where_the_task_looks(source, tmp_path, library, monkeypatch):
    command = [sys.executable, "-m", "jexit.data.prepare", "gsm8k", f"--from={source}"]
    env = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "home")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path}/home/gsm8k/1.0.0")
    at_home = functools.partial(library.Gsm8k, data_dir=str(tmp_path / "home"))
    monkeypatch.setattr(library, "Gsm8k", at_home)
    assert make_task("gsm8k").size("test") == 7


def test_a_failed_download_says_what_to_do(tmp_path, library, monkeypatch):
    def refuse(*_):
        raise OSError("no network")

    at_home = functools.partial(library.Gsm8k, data_dir=str(tmp_path / "data"))
    monkeypatch.setattr(library, "Gsm8k", at_home)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", refuse)
    with pytest.raises(ValueError, match=r"no network.*set config.task.path"):
        make_task("gsm8k").size("train")
    assert not list(tmp_path.glob("data/gsm8k/*"))


@pytest.mark.slow
def test_several_hosts_may_build_it_at_once(source, tmp_path):
    command = [sys.executable, "-m", "jexit.data.prepare", "gsm8k", f"--from={source}"]
    command.append(f"--to={tmp_path / 'data'}")
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert all("40 train and 7 test rows" in text for text in said), said
    assert os.listdir(tmp_path / "data/gsm8k") == ["1.0.0"]
    assert sizes(tmp_path / "data") == [38, 2, 7]


def test_what_is_there_and_is_no_dataset_is_named(source, tmp_path, capsys):
    (tmp_path / "data/gsm8k/1.0.0").mkdir(parents=True)
    said = refusal(capsys, f"--from={source}", f"--to={tmp_path / 'data'}")
    assert "is not a dataset that can be read" in said and "remove it" in said
    (tmp_path / "data/gsm8k/1.0.0/dataset_info.json").write_text("{")
    said = refusal(capsys, f"--from={source}", f"--to={tmp_path / 'data'}")
    assert "remove it, or give another directory with --to" in said


def test_missing_files_and_damaged_rows_are_named_and_nothing_is_written(source, tmp_path, capsys):
    into = f"--to={tmp_path / 'data'}"
    for line, fault in (
        ('{"question": "cut sho', "not a JSON object"),
        ('{"question": "What?"}', "no 'answer'"),
        ('{"question": "What?", "answer": "seven"}', "'answer' does not end in '#### number'"),
    ):
        write_rows(source / "test.jsonl", [row(1), line, row(2)])
        said = refusal(capsys, f"--from={source}", into)
        place = f"{source}/test.jsonl:2"
        assert f"{place} cannot be used ({fault}); download the published file again" in said
    (source / "train.jsonl").write_text("\n")
    assert "contains no rows" in refusal(capsys, f"--from={source}", into)
    for missing in ("test.jsonl", "train.jsonl"):
        (source / missing).unlink()
        said = refusal(capsys, f"--from={source}", into)
        assert f"{source} does not contain {missing}; put the files of" in said
    assert "there is no directory" in refusal(capsys, f"--from={source / 'nowhere'}")
    assert not (tmp_path / "data").exists()


def test_a_disk_that_refuses_leaves_no_dataset(source, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds.core.DatasetInfo, "write_to_directory", full)
    said = refusal(capsys, f"--from={source}", f"--to={tmp_path / 'data'}")
    assert "cannot be written (No space left on device); free some space, make" in said
    assert not list((tmp_path / "data").rglob("*.*"))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, f"--from={source}", f"--to={tmp_path / 'file/x'}")


def test_a_killed_build_leaves_no_dataset_and_the_next_one_builds_it(source, tmp_path):
    dies = (
        "import os, tensorflow_datasets as tfds; from jexit.data import prepare; "
        "whole = tfds.core.DatasetInfo.write_to_directory; "
        "tfds.core.DatasetInfo.write_to_directory = lambda *_: (whole(*_), os._exit(9)); "
        f"prepare.main(['gsm8k', '--from={source}', '--to={tmp_path / 'data'}'])"
    )
    done = subprocess.run([sys.executable, "-c", dies], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr
    assert list((tmp_path / "data/gsm8k").glob("*/dataset_info.json"))  # all but the name
    with pytest.raises(FileNotFoundError, match="contains no GSM8K data"):
        make_task("gsm8k", str(tmp_path / "data")).size("train")
    assert prepare.prepare_gsm8k(source, tmp_path / "data").startswith("wrote ")
    assert sizes(tmp_path / "data") == [38, 2, 7]
