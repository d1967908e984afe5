"""A run's directory belongs to one config, and to one run at a time."""

import errno
import fcntl
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from jexit import main
from jexit.config import Config
from jexit.io.workdir import check_same_run, sole_run, start_run, trained_law


def config(**changes):
    values = Config(command="rl").to_dict()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    return values


def test_a_new_directory_is_made_with_the_whole_config(tmp_path):
    start_run(tmp_path / "runs" / "a", config(rl__rollouts=3))
    stored = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    assert Config.from_dict(stored) == Config.from_dict(config(rl__rollouts=3))


def test_checking_writes_nothing(tmp_path):
    check_same_run(tmp_path / "run", config())
    assert not (tmp_path / "run").exists()


def test_the_same_config_continues(tmp_path):
    start_run(tmp_path, config())
    start_run(tmp_path, config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl__depth_coef": 0.9}, r"config\.rl\.depth_coef=0\.5, and this one has 0\.9"),
        ({"exits__layers": (2, 4)}, r"config\.exits\.layers=\[\], and this one has \[2, 4\]"),
        ({"command": "sft"}, r"config\.command=rl, and this one has sft"),
        ({"seed": 1, "batch_size": 4}, r"config\.batch_size=32, and this one has 4"),
    ],
)
def test_another_config_is_refused_by_its_first_difference(tmp_path, changes, words):
    start_run(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    for check in (check_same_run, start_run):
        with pytest.raises(ValueError, match=words) as caught:
            check(tmp_path, config(**changes))
        assert str(tmp_path) in str(caught.value)
        assert "choose another --workdir, or the same settings" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_does_not_alter_the_past_may_change(tmp_path):
    start_run(tmp_path, config())
    longer = config(steps=500, checkpoint__every=7, log__samples=2, mesh__fsdp=2)
    start_run(tmp_path, longer)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 500


@pytest.mark.parametrize("text", ['{"seed": 0', "[1, 2]", "", '{"seed": 1e999}', "[" * 100_000])
def test_a_damaged_config_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"config\.json (is not valid JSON|holds a JSON list, not).*; remove"
    ):
        check_same_run(tmp_path, config())
    assert (tmp_path / "config.json").read_text() == text


def test_a_full_disk_leaves_the_config_that_was_there(tmp_path, full_disk):
    start_run(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    full_disk(100)
    with pytest.raises(ValueError, match=r"cannot write .*config\.json: No space left"):
        start_run(tmp_path, config(steps=500))
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_law_of_depths_is_that_of_the_run(tmp_path):
    changed = {"rl__min_hazard": 0.02, "rl__hazard_temperature": 1.5}
    start_run(tmp_path / "rl", config(**changed))
    law = {"rl": {"min_hazard": 0.02, "hazard_temperature": 1.5}}
    assert trained_law(tmp_path / "rl") == law
    assert trained_law(tmp_path / "rl" / "model") == {}
    aim = {"sharpness": 7.0, "target": "student"}
    start_run(tmp_path / "sft", config(command="sft", **{f"sft__{k}": v for k, v in aim.items()}))
    start_run(tmp_path / "on", config(model__path=str(tmp_path / "sft"), rl__min_hazard=0.02))
    assert trained_law(tmp_path / "on")["sft"] == aim
    assert trained_law(tmp_path / "on")["rl"]["min_hazard"] == 0.02
    start_run(tmp_path / "pretrain", config(command="pretrain"))
    assert trained_law(tmp_path / "pretrain") == {}
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert trained_law(tmp_path) == {}
    (tmp_path / "rl" / "config.json").unlink()
    start_run(tmp_path / "rl", config(model__path=str(tmp_path / "rl"), **changed))
    assert trained_law(tmp_path / "rl") == law  # of a run that says that it came from itself


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"command": "rl", "rl"', r"config\.json is not valid JSON"),
        ('{"command": "sft", "sft": {"sharpness": "x", "target": "teacher"}}', "has been altered:"),
        (
            '{"command": "rl", "rl": {"min_hazard": 2, "hazard_temperature": 1},'
            ' "model": {"path": "x"}}',
            r"altered: config\.rl\.min_hazard is 2\.0; it must be at least 0 and at most",
        ),
        (
            '{"command": "rl", "rl": {"min_hazard": 0}, "model": {}}',
            r"lacks rl\.min_hazard and rl\.hazard_temp",
        ),
        ('{"command": "sft"}', r"is of a run of sft and lacks sft\.sharpness and sft\.target"),
    ],
)
def test_a_law_that_cannot_be_read_is_one_sentence(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words + r".*give the path of the run's model/"):
        trained_law(tmp_path)


ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import pathlib, sys
from jexit.io.workdir import sole_run
with sole_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def holder(tmp_path):
    """Another process that has a run in tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_told_who_has_the_directory(tmp_path, holder, capsys):
    workdir = tmp_path / "run"
    start_run(workdir, config(command="eval"))
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(workdir)
    for command in ("eval", "sft"):
        given = [f"--config={ROOT}/configs/{command}.py", f"--workdir={workdir}"]
        assert main.main(["jexit", *given]) == 1
        assert capsys.readouterr().err == (
            f"jexit: {workdir} is in use by process {holder.pid} on {socket.gethostname()}; wait "
            "for that run, stop it, or choose another --workdir\n"
        )
    assert contents(workdir) == before


def test_the_lock_goes_with_its_process(tmp_path, holder):
    holder.kill()
    holder.wait()
    with sole_run(tmp_path / "run"):
        start_run(tmp_path / "run", config())
    with sole_run(tmp_path / "run"):
        assert os.getpid() == int((tmp_path / "run" / ".lock").read_text().split()[1])


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), sole_run(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a").is_dir()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    with sole_run(tmp_path / "runs"):
        pass
    assert (tmp_path / "runs").is_dir()  # was there before


def test_a_lock_that_has_just_been_taken_away_is_no_lock(tmp_path, monkeypatch):
    """Between opening it and locking it the run that held it may end."""
    flock = fcntl.flock

    def late(file, how):
        (tmp_path / "run" / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="run is in use by another process"):
        sole_run(tmp_path / "run").__enter__()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    words = r"run/\.lock cannot be locked \(.*No locks available\); choose another --workdir"
    with pytest.raises(ValueError, match=words):
        sole_run(tmp_path / "run").__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [("file", "file is a file; give --workdir the name of"), ("file/run", "lock: Not a directory")],
)
def test_a_workdir_that_is_a_file_is_refused(tmp_path, capsys, name, words):
    (tmp_path / "file").write_text("precious")
    given = [f"--config={ROOT}/configs/rl.py", f"--workdir={tmp_path / name}"]
    assert main.main(["jexit", *given]) == 1
    said = capsys.readouterr().err
    assert words in said and said.startswith("jexit: ") and said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"
