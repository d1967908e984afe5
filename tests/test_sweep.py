"""A grid of runs: what it expands to, that it goes on where it stopped, and what its table says."""

import csv
import errno
import fcntl
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from jexit.errors import INTERRUPTED
from jexit.sweep.__main__ import main
from jexit.sweep.plan import Sweep
from jexit.sweep.runner import Runner, shares
from report_files import evaluation, policy_figures
from small_runs import saved_small_model, small_settings

ROOT = pathlib.Path(__file__).parents[1]
GIVEN = ("--config=a.py:tiny", "--into=runs/x")
RL, EVAL = f"--config={ROOT}/configs/rl.py", f"{ROOT}/configs/eval.py"


def test_every_combination_is_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = Sweep.parse([*GIVEN, "rl.depth_coef=0,0.4", "seed=0,1,2", "--config.steps=7"])
    cells = grid.cells()
    assert len(cells) == 6 and len({cell.workdir for cell in cells}) == 6
    assert cells[1].settings == {"rl.depth_coef": "0", "seed": "1"}
    assert list(grid.commands(cells[1])) == [
        [
            "--config=a.py:tiny",
            "--workdir=runs/x/rl.depth_coef=0,seed=1",
            "--config.steps=7",
            "--config.rl.depth_coef=0",
            "--config.seed=1",
        ]
    ]


def test_values_with_commas_are_separated_by_bars():
    grid = Sweep.parse([*GIVEN, "exits.layers=(2,4)|(4,)"])
    assert [cell.settings["exits.layers"] for cell in grid.cells()] == ["(2,4)", "(4,)"]
    assert [cell.name for cell in grid.cells()] == ["exits.layers=(2,4)", "exits.layers=(4,)"]


def test_without_a_grid_there_is_one_run():
    assert [cell.name for cell in Sweep.parse(GIVEN).cells()] == ["run"]


def test_an_evaluation_gets_the_runs_model_and_task(tmp_path):
    flags = [f"--into={tmp_path}", "--config=a.py", "--eval=e.py", "--eval.eval.problems=9"]
    grid = Sweep.parse([*flags, "task.name=sums,tom", "--config.task.steps=mixed"])
    (cell, _), workdir = grid.cells(), tmp_path / "task.name=sums"
    commands = grid.commands(cell)
    assert next(commands)[1:] == [
        f"--workdir={workdir}", "--config.task.steps=mixed", "--config.task.name=sums",
    ]  # fmt: skip
    # The run has written its config by now, with what its own file says of the task.
    (workdir / "eval").mkdir(parents=True)
    task = {"name": "sums", "parts": ["sums", "tom"], "steps": "mixed", "path": ""}
    (workdir / "config.json").write_text(json.dumps({"command": "rl", "task": task}))
    (evaluating,) = commands
    assert evaluating == [
        "--config=e.py",
        f"--workdir={workdir / 'eval'}",
        "--config.task.name=sums",
        "--config.task.parts=('sums', 'tom')",
        "--config.task.steps=mixed",
        "--config.task.path=",
        f"--config.model.path={workdir}",
        "--config.eval.problems=9",
    ]
    (workdir / "after.json").write_text("{}")
    assert list(grid.commands(cell)) == [evaluating]  # the run is over, its evaluation is not
    (workdir / "eval" / "eval.json").write_text(json.dumps(evaluation() | {"complete": False}))
    assert list(grid.commands(cell)) == [evaluating]  # it stopped before its measures were done
    (workdir / "eval" / "eval.json").write_text(json.dumps(evaluation()))
    assert list(grid.commands(cell)) == []


def test_a_run_that_was_begun_with_other_settings_is_refused(tmp_path, capsys):
    given = ["--config=a.py", f"--into={tmp_path}", "seed=0", "--eval=e.py"]
    (cell,) = Sweep.parse(given).cells()
    begun = Sweep.parse([*given, "--config.steps=10"])
    commands = begun.commands(cell)
    next(commands)
    begun.begun([cell])  # there is nothing yet
    cell.workdir.mkdir()
    begun.begun([cell])
    assert main([*given, "--config.steps=999"]) == 1
    error = capsys.readouterr().err
    assert "which differs in --config.steps=10; another --into is needed" in error
    cell.begin("run", [*reversed(begun.training(cell))])
    begun.begun([cell])  # the same settings in another order
    (cell.workdir / "config.json").write_text('{"task": {}}')
    (cell.workdir / "after.json").write_text("{}")
    next(commands)
    (cell.workdir / "eval").mkdir()
    assert main([*given, "--config.steps=10", "--eval.eval.problems=1000"]) == 1
    assert "which differs in --config.eval.problems=1000" in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()


def test_files_that_cannot_be_read_or_written_are_named(tmp_path, capsys):
    assert main([f"--config={ROOT}/configs/rl.py", "--into=/dev/null/x"]) == 1
    assert "/dev/null/x" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "after.json").write_text('{"accuracy":')
    assert main(["--config=a.py", f"--into={tmp_path}", "--table_only"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/run/after.json is not valid JSON" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["seed=0", "seed=7"])  # the command's own run, and another
@pytest.mark.parametrize(
    "record",
    [
        '{"settings": 3}',
        '{"settings": ["seed"]}',
        '{"settings": {"seed": null}}',
        '{"settings": {"seed": "0"}, "run": 3}',
        '{"settings": {"seed": "0"}, "eval": [3]}',
        '{"run": ["--config=a.py"]}',
    ],
)
def test_a_damaged_record_of_a_run_is_refused(record, name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}.json").write_text(record)
    assert main(["--config=a.py", f"--into={tmp_path}", "seed=0", "--table_only"]) == 1
    error = capsys.readouterr().err
    assert f"{name}.json does not say what its run was asked for" in error
    assert error.rstrip().endswith(str(tmp_path / name)) and error.count("\n") == 1


def test_files_of_something_else_are_left_alone(tmp_path, capsys):
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "completions.json").write_text("[]")
    assert main(["--config=a.py", f"--into={tmp_path}", "seed=0", "--table_only"]) == 1
    assert "none of the 1 runs" in capsys.readouterr().err
    (tmp_path / "seed=0" / "eval").mkdir(parents=True)
    (tmp_path / "seed=0" / "config.json").write_text("[]")
    assert main(["--config=a.py", f"--into={tmp_path}", "seed=0", "--eval=e.py"]) == 1
    assert "seed=0/config.json is no run's config" in capsys.readouterr().err


def test_what_another_command_began_meanwhile_is_in_the_table(tmp_path, monkeypatch):
    def finished(seed):
        sweep = Sweep.parse([RL, f"--into={tmp_path}", f"seed={seed}"])
        (cell,) = sweep.cells()
        next(sweep.commands(cell))
        cell.workdir.mkdir()
        write_result(cell.workdir / "after.json")
        return []

    monkeypatch.setattr(Runner, "run", lambda self, cells: finished(0) + finished(1))
    assert main([RL, f"--into={tmp_path}", "seed=0"]) == 0
    lines = csv.DictReader((tmp_path / "table.csv").open())
    assert [line["seed"] for line in lines] == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--into=x"], "--config is missing"),
        (["--config=a.py"], "--into is missing"),
        ([*GIVEN, "seed"], "'seed' is no argument of a sweep"),
        ([*GIVEN, "--steps=3"], "'--steps=3' is no argument of a sweep"),
        ([*GIVEN, "seed=1,1"], "seed has the values '1', '1'"),
        ([*GIVEN, "seed=1,"], "none empty"),
        ([*GIVEN, "seed=1,2", "--config.seed=3"], "seed is both in the grid and in --config.seed"),
        ([*GIVEN, "--eval.seed=3"], "--eval.KEY is for --eval=FILE, which is missing"),
        ([*GIVEN, "--jobs=none"], "--jobs is 'none'"),
        ([*GIVEN, "--table_only"], "none of the 1 runs in runs/x has finished"),
        ([*GIVEN, "--jobs=10000"], "--jobs is 10000 and there are"),
        ([*GIVEN, "model.path=a/b|a b"], "would share a directory"),
        ([*GIVEN, "seed=0", "seed=1"], "seed is given 2 times; give it once"),
        ([*GIVEN, "--into=y"], "--into is given 2 times"),
        (GIVEN, "run cannot run: the config file a.py is not there"),
        ([RL, GIVEN[1], "rl.dept_coef=0,1"], "rl.dept_coef=0 cannot run: config.rl.dept_coef does"),
        ([RL, GIVEN[1], "seed=0,1,many"], "seed=many cannot run: "),
        ([RL, GIVEN[1], "--eval=e.py"], "run cannot run: the config file e.py is not there"),
        ([RL, GIVEN[1], f"--eval={EVAL}", "--eval.eval.problemz=3"], "config.eval.problemz does"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert words in text and text.count("\n") == 1 and not list(tmp_path.iterdir())


def test_several_jobs_have_cores_of_their_own():
    cores = os.sched_getaffinity(0)
    dealt = shares(len(cores))
    assert sorted(core for share in dealt for core in share) == sorted(cores)


def write_result(path, **changes):
    """What a training run measures of itself when it ends."""
    path.write_text(json.dumps(policy_figures("sample", random.Random(0)) | changes))


def test_the_table_has_every_figure_of_the_finished_runs(tmp_path, capsys):
    arguments = ["--config=a.py", f"--into={tmp_path}", "seed=0,1,2", "--table_only"]
    for seed in (0, 2):
        workdir = tmp_path / f"seed={seed}"
        (workdir / "eval").mkdir(parents=True)
        write_result(workdir / "after.json", accuracy=0.25 + seed / 4)
        rows = [{"step": n, "accuracy": seed + n, "step_seconds": 1.0} for n in range(1, 42)]
        rows[40]["accuracy"] = None  # not a number, as metrics.jsonl has it
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = evaluation()
    measured["runs"][0] |= {"accuracy": 0.25, "accuracy_ci95": [0.2, 0.3]}
    measured["controls"][0]["accuracy_difference"] = 0.5
    (tmp_path / "seed=2" / "eval" / "eval.json").write_text(json.dumps(measured))
    assert main(arguments) == 0
    wrote, heads, means = capsys.readouterr().out.splitlines()
    assert "2 of 3 runs" in wrote
    assert " ".join(heads.split()).startswith("seeds right after depth after layers a problem")
    assert " ".join(means.split()).startswith("2 50.0 (25.0 to 75.0) ")
    first, second = csv.DictReader((tmp_path / "table.csv").open())
    assert first["seed"] == "0" and first["after/accuracy"] == "0.25"
    assert first["full/accuracy"] == ""
    expected = {
        "seed": "2", "after/accuracy": "0.75", "after/text/step_size": "2.5",
        "full/accuracy": "0.25", "full/accuracy_ci95/low": "0.2", "full/accuracy_ci95/high": "0.3",
        "sample less shuffled/accuracy_difference": "0.5",
        "full/faithfulness/hint/detail/answered": "0.31",
    }  # fmt: skip
    assert expected.items() <= second.items()
    for part in ("less full/faithfulness/hint/difference", "capacity/3/accuracy", "hazards/ece"):
        assert f"sample {part}" in second or f"sample/{part}" in second
    assert not [name for name in second if "per_second" in name]  # of the machine, not of the run
    lines = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert [line["seed"] for line in lines] == ["0"] * 20 + ["2"] * 20
    assert lines[0] == {"seed": "0", "step": "2", "accuracy": "1.5"}
    assert lines[20]["accuracy"] == "3.5"
    assert lines[19] == {"seed": "0", "step": "41", "accuracy": "39.5"}  # of 39, 40 and a gap


def test_other_values_of_the_same_keys_add_to_the_study(tmp_path, capsys):
    given = ["--config=a.py", f"--into={tmp_path}", "--table_only"]
    for depth_coef, seed in (("10", "0"), ("2", "0"), ("2", "1")):
        sweep = Sweep.parse([*given, f"rl.depth_coef={depth_coef}", f"seed={seed}"])
        (cell,) = sweep.cells()
        next(sweep.commands(cell))
        cell.workdir.mkdir()
        write_result(cell.workdir / "after.json")
    assert main([*given, "rl.depth_coef=2", "seed=1"]) == 0
    assert "3 of 3 runs" in capsys.readouterr().out
    lines = csv.DictReader((tmp_path / "table.csv").open())
    values = [(line["rl.depth_coef"], line["seed"]) for line in lines]
    assert values == [("2", "1"), ("2", "0"), ("10", "0")]  # its own, then the others by size
    for other in (["seed=1"], ["seed=1", "rl.depth_coef=2"], []):
        assert main([*given, *other]) == 1
        assert "of a study over other keys or in another order than" in capsys.readouterr().err
    assert main([*given, "rl.depth_coef=2", "seed=2", "--config.steps=3"]) == 1
    error = capsys.readouterr().err
    assert "was begun by another command, which differs in --config.steps=3" in error


def test_completions_under_sampled_exits_are_kept_with_their_settings(tmp_path):
    given = [f"--into={tmp_path}", "--config=e.py", "seed=0,1", "--table_only"]
    for seed in (0, 1):
        workdir = tmp_path / f"seed={seed}"
        workdir.mkdir()
        (workdir / "eval.json").write_text(json.dumps(evaluation()))
    entries = [
        {"policy": policy, "prompt": prompt, "completion": "a", "tokens": ["a"], "depths": [3],
         "hazards": [None], "verdict": "strict", "answer": "b"}
        for prompt in ("p", "q", "r")
        for policy in ("full", "sample")
    ]  # fmt: skip
    (tmp_path / "seed=1" / "completions.json").write_text(json.dumps(entries))
    assert main(given) == 0
    kept = json.loads((tmp_path / "completions.json").read_text())
    assert kept == [
        {
            "settings": {"seed": "1"}, "layers": 8, "prompt": prompt, "completion": "a",
            "tokens": ["a"], "depths": [3], "verdict": "strict", "answer": "b",
        }
        for prompt in ("p", "q")
    ]  # fmt: skip


def test_evaluations_are_runs_too(tmp_path):
    given = [f"--into={tmp_path}", "--config=e.py", "model.path=a,b", "--table_only"]
    for name, complete in (("a", True), ("b", False)):
        workdir = tmp_path / f"model.path={name}"
        workdir.mkdir()
        (workdir / "eval.json").write_text(json.dumps(evaluation() | {"complete": complete}))
    assert main(given) == 0
    (line,) = csv.DictReader((tmp_path / "table.csv").open())
    assert line["model.path"] == "a" and line["full/tokens"] == "3000"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved_small_model(tmp_path_factory.mktemp("model") / "model")


def command(model_dir, into, *grid, **settings):
    settings = small_settings(model_dir, **settings)
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={ROOT}/configs/rl.py", f"--into={into}", *grid, *flags]


def test_a_run_that_fails_does_not_stop_the_others(model_dir, tmp_path, capfd):
    arguments = command(model_dir, tmp_path, f"model.path=nowhere,{model_dir}", steps=2)
    arguments = [flag for flag in arguments if not flag.startswith("--config.model.path")]
    assert main(arguments) == 1
    captured = capfd.readouterr()
    log = tmp_path / "model.path=nowhere.log"
    assert captured.err.startswith(
        "jexit: model.path=nowhere ended with 1: no model directory at 'nowhere'"
    )
    assert captured.err.endswith(f" (see {log})\n") and captured.err.count("\n") == 1
    assert "1 of 2 runs" in captured.out
    (line,) = csv.DictReader((tmp_path / "table.csv").open())
    assert line["model.path"] == str(model_dir) and 0 <= float(line["after/accuracy"]) <= 1


def test_a_run_of_another_command_is_left_alone(tmp_path, capfd):
    """Its process has the lock of its log, also when the sweep that began it is gone."""
    (tmp_path / "seed=0").mkdir()
    with open(tmp_path / "seed=0.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        holder = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log
        )
    try:
        assert main([RL, f"--into={tmp_path}", "seed=0"]) == 1
    finally:
        holder.communicate(b"\n")
    error = capfd.readouterr().err
    assert error == "jexit: seed=0 is being run by another command; wait for it, or stop it\n"
    assert not list((tmp_path / "seed=0").iterdir()) and not (tmp_path / "seed=0.json").exists()


def test_a_file_system_without_locks_is_told(tmp_path, capfd, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main([RL, f"--into={tmp_path}", "seed=0"]) == 1
    error = capfd.readouterr().err
    assert "seed=0.log cannot be locked ([Errno" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_sweep_that_was_stopped_goes_on(model_dir, tmp_path, number):
    arguments = command(model_dir, tmp_path, "seed=0,1", steps=30, checkpoint__every=5)
    line = [sys.executable, "-m", "jexit.sweep", *arguments]
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # Where the tests themselves are under nohup, too.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    metrics = tmp_path / "seed=0" / "metrics.jsonl"
    end = time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    _, text = process.communicate(timeout=100)
    assert process.returncode == INTERRUPTED
    assert f"stopped by {number.name}; the same command goes on from here" in text.decode()
    assert not list(tmp_path.glob("seed=1*"))
    steps_before = metrics.read_text().count("\n")
    subprocess.run(line, cwd=ROOT, check=True)
    steps = [json.loads(row)["step"] for row in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31)) and 3 <= steps_before < 30
    assert len(list(csv.DictReader((tmp_path / "table.csv").open()))) == 2
