"""A run's directory belongs to one config, and to one run at a time."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys

import pytest

import jexit
from jexit import main
from jexit.config import Config
from jexit.errors import UserError
from jexit.io.provenance import STARTS_FILE, read_starts
from jexit.io.workdir import check_same_run, sole_run, start_run
from small_runs import ROOT


def config(**changes):
    values = Config(command="rl").to_dict()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values[section] | {name: value} if name else value
    return Config.from_dict(values)


def test_a_run_continues_with_the_same_config(tmp_path):
    workdir = tmp_path / "runs" / "a"
    check_same_run(workdir, config())
    assert not workdir.exists()
    start_run(workdir, config())
    stored = json.loads((workdir / "config.json").read_text())
    assert Config.from_dict(stored) == config()
    # What does not alter the past may change.
    changes = {"checkpoint__every": 7, "log__samples": 2, "mesh__fsdp": 2, "task__time_limit": 9.0}
    start_run(workdir, config(steps=500, **changes))
    assert json.loads((workdir / "config.json").read_text())["steps"] == 500
    with (workdir / STARTS_FILE).open("a") as file:
        file.write('[1]\n{"time": 3}\n{"ti')
    for start in read_starts(workdir):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", start.time)
        assert start.version == jexit.__version__
        assert re.fullmatch(r"([0-9a-f]{7,}(-dirty)?)?", start.commit)
    assert len(read_starts(workdir)) == 2 and read_starts(tmp_path) == ()
    # So may settings that came or went with a version, what came if it is at its default.
    del stored["rl"]["clip"]
    stored["pretrain"]["prompt_loss"] = 0.0
    (workdir / "config.json").write_text(json.dumps(stored))
    check_same_run(workdir, config())
    with pytest.raises(UserError, match=r"config\.rl\.clip=0\.2, but this run has 0\.3"):
        check_same_run(workdir, config(rl__clip=0.3))


def test_calibration_goes_on_with_other_steps_only_if_no_phase_follows_them(tmp_path):
    for lens_steps in (0, 7):
        settings = {"command": "sft", "sft__lens_steps": lens_steps}
        start_run(tmp_path / str(lens_steps), config(steps=20, **settings))
        check_same_run(tmp_path / str(lens_steps), config(steps=20, **settings))
        if not lens_steps:
            check_same_run(tmp_path / "0", config(steps=30, **settings))
            continue
        with pytest.raises(UserError, match=r"steps=20, but this run has 30, and the phase of"):
            check_same_run(tmp_path / "7", config(steps=30, **settings))


def test_another_config_is_refused_by_its_first_difference(tmp_path, full_disk):
    start_run(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    for changes, words in (
        ({"rl__depth_coef": 0.9}, "config.rl.depth_coef=0.5, but this run has 0.9"),
        ({"exits__layers": (2, 4)}, "config.exits.layers=[], but this run has [2, 4]"),
        ({"task__options": {"steps": 3}}, "config.task.options.steps=unset, but this run has 3"),
        (
            {
                "checkpoint__best_metric": "val/accuracy"
            },  # kept checkpoints have the scores of the other
            "config.checkpoint.best_metric=, but this run has val/accuracy",
        ),
        ({"seed": 1, "batch_size": 4}, "config.batch_size=32, but this run has 4"),
    ):
        words = f"{tmp_path} contains a run with {re.escape(words)}; choose another --workdir, or"
        for refuse in (check_same_run, start_run):
            with pytest.raises(UserError, match=words):
                refuse(tmp_path, config(**changes))
    words = r"cannot write .*config\.json: File too large"
    with full_disk(100), pytest.raises(UserError, match=words):
        start_run(tmp_path, config(steps=500))
    assert (tmp_path / "config.json").read_bytes() == before
    for text in ('{"seed": 0', "[1, 2]", "", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        words = r"config\.json (is not valid JSON|contains a JSON list, not).*; remove"
        with pytest.raises(UserError, match=words):
            check_same_run(tmp_path, config())


def test_another_version_of_the_users_task_does_not_continue_by_itself(tmp_path):
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text("task = None")
    start_run(run, config(task__name=f"{file}:task"))
    start_run(run, config(task__name=f"{file}:task", steps=500))
    file.write_text("task = 1")
    for refuse in (check_same_run, start_run):
        with pytest.raises(UserError, match=r"another version of the task file .*delete"):
            refuse(run, config(task__name=f"{file}:task"))
    (run / "task.sha256").unlink()
    start_run(run, config(task__name=f"{file}:task"))
    assert (run / "task.sha256").exists()


HOLDER = """
import pathlib, sys
from jexit.io.workdir import sole_run
with sole_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_a_second_run_is_told_who_has_the_directory_until_it_ends(tmp_path, capsys):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        for name in ("eval", "sft"):
            given = [f"--config={ROOT}/configs/{name}.py", f"--workdir={workdir}"]
            assert main.main(["jexit", *given]) == 1
            assert capsys.readouterr().err == (
                f"jexit: {workdir} is in use by process {holder.pid} on {socket.gethostname()}; "
                "wait for that run, stop it, or choose another --workdir\n"
            )
        assert [path.name for path in workdir.iterdir()] == [".lock"]
        holder.kill()
    with sole_run(workdir):  # the lock has gone with its process
        assert os.getpid() == int((workdir / ".lock").read_text().split()[1])
        start_run(workdir, config())
    assert (workdir / "config.json").exists()


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path, capsys):
    with pytest.raises(RuntimeError), sole_run(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a").is_dir()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    with sole_run(tmp_path / "runs"):
        pass
    assert (tmp_path / "runs").is_dir()  # was there before
    (tmp_path / "file").write_text("precious")
    for name, words in (("file", "file is a file, but --workdir"), ("file/run", "Not a direct")):
        given = [f"--config={ROOT}/configs/rl.py", f"--workdir={tmp_path / name}"]
        assert main.main(["jexit", *given]) == 1
        said = capsys.readouterr().err
        assert words in said and said.startswith("jexit: ") and said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_a_lock_that_has_just_gone_or_cannot_be_is_told(tmp_path, monkeypatch):
    """Between opening it and locking it the run that held it may end."""
    flock = fcntl.flock

    def late(file, how):
        (tmp_path / "run" / ".lock").unlink()
        flock(file, how)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    words = r"run/\.lock cannot be locked \(No locks available\); choose a --workdir on another"
    for lock, said in ((no_locks, words), (late, "run is in use by another process")):
        monkeypatch.setattr(fcntl, "flock", lock)
        with pytest.raises(UserError, match=said):
            sole_run(tmp_path / "run").__enter__()
