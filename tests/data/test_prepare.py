"""GSM8K built from its published files is the dataset that the library itself would have built."""

import json
import os
import signal
import subprocess
import sys
from unittest import mock

import pytest

from jexit.data import prepare
from jexit.tasks import make_task

tfds = pytest.importorskip("tensorflow_datasets")


def row(number: int) -> dict[str, str]:
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


def refusal(capsys, *argv) -> str:
    """What the command says when it fails: one sentence, nothing on stdout."""
    assert prepare.main(["gsm8k", *map(str, argv)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_the_task_reads_what_was_built(source, tmp_path, capsys):
    target = tmp_path / "data"
    assert prepare.main(["gsm8k", f"--from={source}", f"--to={target}"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"wrote {target}/gsm8k/1.0.0: 40 train and 7 test rows; published are 7,473 train and "
        "1,319 test rows\n"
    )
    assert err == ""
    for path in (source, target):  # the files as they are, and what was built
        task = make_task("gsm8k", str(path))
        assert [task.size(split) for split in ("train", "val", "test")] == [38, 2, 7]
    assert task.skipped_rows == {"train": 0, "val": 0, "test": 0}
    answers = {
        task.problem(split, index).answer
        for split in ("train", "val")
        for index in range(task.size(split))
    }
    assert answers == {str(number) for number in range(40)}
    assert os.listdir(target) == ["gsm8k"] and os.listdir(target / "gsm8k") == ["1.0.0"]
    assert "tensorflow" not in sys.modules


def test_it_is_what_the_library_builds(source, tmp_path):
    from tensorflow_datasets.text.gsm8k import gsm8k

    prepare.prepare_gsm8k(source, tmp_path / "ours")
    files = {split: str(source / f"{split}.jsonl") for split in ("train", "test")}
    with mock.patch.object(
        tfds.download.DownloadManager, "download_and_extract", lambda self, urls: files
    ):
        theirs = gsm8k.Gsm8k(data_dir=str(tmp_path / "theirs"), file_format="array_record")
        theirs.download_and_prepare()
    ours = gsm8k.Gsm8k(data_dir=str(tmp_path / "ours"), file_format="array_record")
    assert ours.is_prepared()
    for split in ("train", "test"):
        assert list(ours.as_data_source(split=split)) == list(theirs.as_data_source(split=split))


def test_the_default_is_where_the_task_looks(source, tmp_path):
    env = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "home")}
    command = [sys.executable, "-m", "jexit.data.prepare", "gsm8k", f"--from={source}"]
    look = "from jexit.tasks import make_task; print(make_task('gsm8k').size('test'))"
    for argv, expected in (
        (command, f"wrote {tmp_path}/home/gsm8k/1.0.0"),
        ([sys.executable, "-c", look], "7"),
    ):
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected)


@pytest.mark.slow
def test_several_hosts_may_build_it_at_once(source, tmp_path):
    command = [sys.executable, "-m", "jexit.data.prepare", "gsm8k", f"--from={source}"]
    command.append(f"--to={tmp_path / 'data'}")
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert all("40 train and 7 test rows" in text for text in said), said
    assert os.listdir(tmp_path / "data") == ["gsm8k"]
    assert make_task("gsm8k", str(tmp_path / "data")).size("train") == 38


def test_a_dataset_that_is_there_is_left_alone(source, tmp_path):
    old, young = (tmp_path / "data" / f".gsm8k.partial-host-{number}" for number in (1, 2))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))  # what a killed run left behind is cleared once it is old
    prepare.prepare_gsm8k(source, tmp_path / "data")
    write_rows(source / "train.jsonl", [row(1)])
    said = prepare.prepare_gsm8k(source, tmp_path / "data")
    assert said.endswith("is there already and was left alone: 40 train and 7 test rows")
    assert sorted(os.listdir(tmp_path / "data")) == [young.name, "gsm8k"]
    assert make_task("gsm8k", str(tmp_path / "data")).size("train") == 38


def test_what_is_there_and_is_no_dataset_is_named(source, tmp_path, capsys):
    (tmp_path / "data/gsm8k/1.0.0").mkdir(parents=True)
    said = refusal(capsys, f"--from={source}", f"--to={tmp_path / 'data'}")
    assert "is not a dataset that can be read" in said and "remove it" in said
    (tmp_path / "data/gsm8k/1.0.0/dataset_info.json").write_text("{")
    said = refusal(capsys, f"--from={source}", f"--to={tmp_path / 'data'}")
    assert "remove it, or give another directory with --to" in said


def test_a_part_of_a_split_may_go_by_a_name_of_its_own(source, tmp_path, capsys):
    (source / "test.jsonl").rename(source / "test_first7.jsonl")
    assert "7 test rows" in prepare.prepare_gsm8k(source, tmp_path / "data")
    write_rows(source / "test_other.jsonl", [row(1)])
    said = refusal(capsys, f"--from={source}", f"--to={tmp_path / 'more'}")
    assert "test_first7.jsonl and test_other.jsonl and no test.jsonl; name the one" in said


def test_missing_files_and_damaged_rows_are_named_and_nothing_is_written(source, tmp_path, capsys):
    into = f"--to={tmp_path / 'data'}"
    for line, fault in (
        ('{"question": "cut sho', "not a JSON object"),
        ('{"question": "What?"}', "no 'answer'"),
        ('{"question": "What?", "answer": "seven"}', "'answer' does not end in '#### number'"),
    ):
        write_rows(source / "test.jsonl", [row(1), line, row(2)])
        said = refusal(capsys, f"--from={source}", into)
        assert f"{source}/test.jsonl:2: {fault}; the published file has" in said
    (source / "train.jsonl").write_text("\n")
    assert "holds no rows" in refusal(capsys, f"--from={source}", into)
    for missing in ("test.jsonl", "train.jsonl"):
        (source / missing).unlink()
        said = refusal(capsys, f"--from={source}", into)
        assert f"{source} holds no {missing}; put the files of" in said
    assert "there is no directory" in refusal(capsys, f"--from={source / 'nowhere'}")
    assert not (tmp_path / "data").exists()


def test_a_disk_that_refuses_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_flush", full)
    said = refusal(capsys, f"--from={source}", f"--to={tmp_path / 'data'}")
    assert "cannot be written (No space left on device); make room" in said
    assert not (tmp_path / "data").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, f"--from={source}", f"--to={tmp_path / 'file/x'}")


def test_a_killed_build_leaves_no_dataset_and_the_next_one_builds_it(source, tmp_path):
    write_rows(source / "train.jsonl", map(row, range(2000)))
    hang = (
        "import sys, time; from jexit.data import prepare; "
        "prepare._flush = lambda directory: (print('written', flush=True), time.sleep(60)); "
        f"prepare.main(['gsm8k', '--from={source}', '--to={tmp_path / 'data'}'])"
    )
    process = subprocess.Popen([sys.executable, "-c", hang], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "data/gsm8k").exists()
    with pytest.raises(FileNotFoundError, match="holds no GSM8K data"):
        make_task("gsm8k", str(tmp_path / "data")).size("train")
    (left,) = (tmp_path / "data").iterdir()
    os.utime(left, (0, 0))  # an hour later
    assert prepare.prepare_gsm8k(source, tmp_path / "data").startswith("wrote ")
    assert os.listdir(tmp_path / "data") == ["gsm8k"]
