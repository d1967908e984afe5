"""A grid of runs: what it expands to, that it goes on where it stopped, and what its table says."""

import csv
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jexit.errors import INTERRUPTED
from jexit.main import _without_task_options
from jexit.sweep.__main__ import main
from jexit.sweep.plan import Sweep
from jexit.sweep.runner import Runner, shares
from report_files import evaluation, policy_figures, write_json
from small_runs import ROOT, saved_small_model, small_settings

GIVEN = ("--config=a.py:tiny", "--into=runs/x")
RL, EVAL = f"--config={ROOT}/configs/rl.py", f"{ROOT}/configs/eval.py"
PRETRAIN = f"--config={ROOT}/configs/pretrain.py"

# Stands for Python: ends at once with results, fails without a model, or waits to be stopped.
STAND_IN = """#!/bin/sh
for argument; do case $argument in --workdir=*) workdir=${argument#*=} ;; esac; done
mkdir -p "$workdir"
echo "$JAX_COMPILATION_CACHE_DIR" > "$workdir/compiled"
case "$*" in
  *checkpoint.every=2*) cp "$RESULT" "$workdir/after.json"; echo "jexit: collapsed"; exit 1 ;;
  *model.path=nowhere*) echo "jexit: no model directory at 'nowhere'"; exit 1 ;;
  *steps=7*) if [ ! -e "$workdir/begun" ]; then
    trap 'exit 3' TERM; touch "$workdir/begun"; while :; do sleep 0.05; done; fi ;;
esac
cp "$RESULT" "$workdir/after.json"
"""


def write_result(path, **changes):
    """What a training run measures of itself when it ends."""
    write_json(path, policy_figures("sample", random.Random(0)) | changes)


def begin(grid, *arguments):
    """A run that another command has begun, and finished."""
    sweep = Sweep.parse([*arguments, *grid])
    (cell,) = sweep.cells()
    next(sweep.commands(cell))
    write_result(cell.workdir / "after.json")


def table(directory):
    return list(csv.DictReader((directory / "table.csv").open()))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script, result = tmp_path / "python", tmp_path / "result.json"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    write_result(result)
    monkeypatch.setenv("RESULT", str(result))
    return str(script)


def test_every_combination_is_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = Sweep.parse([*GIVEN, "rl.depth_coef=0,0.4", "seed=0,1,2", "--config.steps=7"])
    cells = grid.cells()
    assert len(cells) == 6 and len({cell.workdir for cell in cells}) == 6
    assert cells[1].settings == {"rl.depth_coef": "0", "seed": "1"}
    settings = ("steps=7", "rl.depth_coef=0", "seed=1")
    workdir = "--workdir=runs/x/rl.depth_coef=0,seed=1"
    expected = ["--config=a.py:tiny", workdir, *(f"--config.{each}" for each in settings)]
    assert list(grid.commands(cells[1])) == [expected]
    # Values with commas in them are separated by bars; without a grid there is one run.
    cells = Sweep.parse([*GIVEN, "exits.layers=(2,4)|(4,)"]).cells()
    assert [cell.name for cell in cells] == ["exits.layers=(2,4)", "exits.layers=(4,)"]
    assert [cell.name for cell in Sweep.parse(GIVEN).cells()] == ["run"]


def test_a_setting_may_follow_the_values_of_the_grid(tmp_path):
    sweep = Sweep.parse(
        ["--config=a.py", f"--into={tmp_path}", "rl.depth_coef=0,2", "seed=0,1",
         "--config.model.path=runs/{seed}/at={rl.depth_coef}", "--config.task.options={steps}"]
    )  # fmt: skip
    found = [sweep.training(cell) for cell in sweep.cells()]
    assert [arguments[2] for arguments in found] == [
        f"--config.model.path=runs/{seed}/at={coef}" for coef in (0, 2) for seed in (0, 1)
    ]
    assert {arguments[3] for arguments in found} == {"--config.task.options={steps}"}


def test_an_evaluation_gets_the_runs_model_and_task(tmp_path):
    flags = [f"--into={tmp_path}", "--config=a.py", "--eval=e.py", "--eval.eval.problems=9"]
    grid = Sweep.parse([*flags, "task.name=sums,tom", "--config.task.options.steps=mixed"])
    (cell, _), workdir = grid.cells(), tmp_path / "task.name=sums"
    commands = grid.commands(cell)
    assert next(commands)[1:] == [
        f"--workdir={workdir}", "--config.task.options.steps=mixed", "--config.task.name=sums",
    ]  # fmt: skip
    # The run has written its config by now, with what its own file says of the task.
    task = {"name": "sums", "path": "", "options": {"parts": ["sums", "tom"], "steps": "mixed"}}
    write_json(workdir / "config.json", {"command": "rl", "task": task})
    (evaluating,) = commands
    assert evaluating == [
        "--config=e.py",
        f"--workdir={workdir / 'eval'}",
        "--config.task.name=sums",
        "--config.task.path=",
        "--config.task.options.parts=('sums', 'tom')",
        "--config.task.options.steps=mixed",
        f"--config.model.path={workdir}",
        "--config.eval.problems=9",
    ]
    write_result(workdir / "after.json")
    for value, flag in (("3", "'3'"), ("None", "'None'"), (3, "3"), ("mixed", "mixed")):
        task["options"] = {"steps": value}
        assert f"--config.task.options.steps={flag}" in grid.evaluating(cell, task)
        assert _without_task_options(grid.evaluating(cell, task))[1] == {"steps": value}
    assert list(grid.commands(cell)) == [evaluating]  # the run is over, its evaluation is not
    for complete in (False, True):  # unless its measures are done
        write_json(workdir / "eval" / "eval.json", evaluation() | {"complete": complete})
        assert list(grid.commands(cell)) == [] if complete else [evaluating]


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
    assert "other arguments (--config.steps=10 differs); choose another --into" in error
    cell.begin("run", [*reversed(begun.training(cell))])
    begun.begun([cell])  # the same settings in another order
    write_json(cell.workdir / "config.json", {"task": {}})
    write_result(cell.workdir / "after.json")
    next(commands)
    (cell.workdir / "eval").mkdir()
    assert main([*given, "--config.steps=10", "--eval.eval.problems=1000"]) == 1
    assert "--config.eval.problems=1000 differs" in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()


def test_damaged_files_are_named_and_files_of_something_else_left_alone(tmp_path, capsys):
    def said(*arguments):
        assert main([*arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    given = ["--config=a.py", f"--into={tmp_path}", "seed=0"]
    assert "/dev/null/x" in said(RL, "--into=/dev/null/x")
    for name in ("seed=0", "seed=7"):  # the command's own run, and another
        (tmp_path / name).mkdir()
        for record in (
            {"settings": 3},
            {"settings": {"seed": None}},
            {"settings": {"seed": "0"}, "run": 3},
            {"settings": {"seed": "0"}, "eval": [3]},
            {"run": ["--config=a.py"]},
        ):
            write_json(tmp_path / f"{name}.json", record)
            error = said(*given, "--table_only")
            assert f"{name}.json does not contain the settings of its run" in error
            assert error.rstrip().endswith(str(tmp_path / name))
        (tmp_path / f"{name}.json").unlink()
    write_json(tmp_path / "notes.json", {"a": 1})
    write_json(tmp_path / "completions.json", [])
    assert "none of the 1 runs" in said(*given, "--table_only")
    (tmp_path / "seed=0" / "eval").mkdir()
    write_json(tmp_path / "seed=0" / "config.json", [])
    assert "seed=0/config.json contains a JSON list, not an object" in said(*given, "--eval=e.py")
    (tmp_path / "seed=0" / "after.json").write_text('{"accuracy":')
    assert "seed=0/after.json is not valid JSON" in said(*given, "--table_only")


def test_wrong_arguments_are_refused_in_a_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--into=x"], "--config is missing"),
        (["--config=a.py"], "--into is missing"),
        ([*GIVEN, "--steps=3"], "'--steps=3' is not an argument of a sweep"),
        ([*GIVEN, "seed=1,1"], "seed has the value '1' 2 times, but values must differ"),
        ([*GIVEN, "seed=1,2", "--config.seed=3"], "seed is both in the grid and in --config.seed"),
        ([*GIVEN, "--eval.seed=3"], "--eval.KEY=VALUE is given without --eval=FILE"),
        ([*GIVEN, "--jobs=none"], "--jobs is 'none'"),
        ([*GIVEN, "--table_only"], "none of the 1 runs in runs/x has finished"),
        ([*GIVEN, "--jobs=10000"], "--jobs is 10000, but only"),
        ([*GIVEN, "model.path=a/b|a b"], "would share a directory"),
        ([*GIVEN, "seed=0", "seed=1"], "seed is given 2 times; give it once"),
        (GIVEN, "run cannot start: the config file a.py does not exist"),
        (
            [RL, GIVEN[1], "rl.dept_coef=0,1"],
            "rl.dept_coef=0 cannot start: config.rl.dept_coef does",
        ),
        (
            [PRETRAIN, GIVEN[1]],
            "cannot start: pretrain measures no model, but a sweep compares",
        ),
        ([RL, GIVEN[1], "--eval=e.py"], "run cannot start: the config file e.py does not exist"),
        ([RL, GIVEN[1], f"--eval={EVAL}", "--eval.eval.problemz=3"], "config.eval.problemz does"),
        (
            [RL, GIVEN[1], f"--eval={EVAL}", "--config.task.name=word_problems"],
            "cannot start: config.eval.measures contains capacity, but task 'word_problems' cannot",
        ),
    ):
        assert main(arguments) == 1
        text = capsys.readouterr().err
        assert words in text and text.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_table_has_every_number_of_the_finished_runs(tmp_path, capsys):
    for seed in (0, 2):
        write_result(tmp_path / f"seed={seed}" / "after.json", accuracy=0.25 + seed / 4)
    measured = evaluation()
    measured["runs"][0] |= {"accuracy": 0.25, "accuracy_ci95": [0.2, 0.3]}
    write_json(tmp_path / "seed=2" / "eval" / "eval.json", measured)
    assert main(["--config=a.py", f"--into={tmp_path}", "seed=0,1,2", "--table_only"]) == 0
    wrote, heads, means = capsys.readouterr().out.splitlines()
    assert "2 of 3 runs" in wrote
    assert " ".join(heads.split()).startswith("seeds accuracy after depth after layers per problem")
    assert " ".join(means.split()).startswith("2 50.0 (25.0 to 75.0) ")
    first, second = table(tmp_path)
    assert first["seed"] == "0" and first["after/accuracy"] == "0.25"
    assert first["full/accuracy"] == ""
    expected = {
        "seed": "2", "after/accuracy": "0.75", "after/text/step_size": "2.5",
        "full/accuracy": "0.25", "full/accuracy_ci95/low": "0.2", "full/accuracy_ci95/high": "0.3",
        "sample less shuffled/accuracy_difference": "0.62",
        "full/faithfulness/hint/detail/answered": "0.31",
    }  # fmt: skip
    assert expected.items() <= second.items()
    for name in ("less full/faithfulness/hint/difference", "/capacity/3/accuracy", "/hazards/ece"):
        assert f"sample {name}" in second or f"sample{name}" in second
    assert not [name for name in second if "per_second" in name]  # of the machine, not of the run
    # Evaluations are runs too, once they are complete.
    for name in ("a", "b"):
        value = measured | {"complete": name == "a"}
        write_json(tmp_path / "evals" / f"model.path={name}" / "eval.json", value)
    given = [f"--into={tmp_path / 'evals'}", "--config=e.py", "model.path=a,b", "--table_only"]
    assert main(given) == 0
    (line,) = table(tmp_path / "evals")
    assert line["model.path"] == "a" and line["full/tokens"] == "3000"


def test_other_values_of_the_same_keys_add_to_the_study(tmp_path, capsys, monkeypatch):
    given = ["--config=a.py", f"--into={tmp_path}", "--table_only"]
    for depth_coef, seed in (("10", "0"), ("2", "0"), ("2", "1")):
        begin([f"rl.depth_coef={depth_coef}", f"seed={seed}"], *given)
    assert main([*given, "rl.depth_coef=2", "seed=1"]) == 0
    assert "3 of 3 runs" in capsys.readouterr().out
    values = [(line["rl.depth_coef"], line["seed"]) for line in table(tmp_path)]
    assert values == [("2", "1"), ("2", "0"), ("10", "0")]  # its own, then the others by size
    for other in (["seed=1"], ["seed=1", "rl.depth_coef=2"], []):
        assert main([*given, *other]) == 1
        assert "of another sweep, but this sweep varies" in capsys.readouterr().err
    # What another command began meanwhile is in the table.
    arguments = [RL, f"--into={tmp_path / 'new'}"]

    def run(self, cells):
        for seed in (0, 1):
            begin([f"seed={seed}"], *arguments)
        return []

    monkeypatch.setattr(Runner, "run", run)
    assert main([*arguments, "seed=0"]) == 0
    assert [line["seed"] for line in table(tmp_path / "new")] == ["0", "1"]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capfd, monkeypatch, stand_in):
    monkeypatch.setattr(sys, "executable", stand_in)
    into = tmp_path / "sweep"
    assert main([RL, f"--into={into}", "model.path=nowhere,there", "--jobs=2"]) == 1
    captured = capfd.readouterr()
    assert captured.err == (
        "jexit: model.path=nowhere ended with exit code 1: no model directory at 'nowhere' "
        f"(see {into / 'model.path=nowhere.log'})\n"
    )
    assert "1 of 2 runs" in captured.out
    assert [line["model.path"] for line in table(into)] == ["there"]
    cores = os.sched_getaffinity(0)  # several jobs have cores of their own
    assert sorted(core for share in shares(len(cores)) for core in share) == sorted(cores)


def test_a_run_that_collapses_is_measured_and_reported(tmp_path, capfd, monkeypatch, stand_in):
    """It ends with an error, but leaves the model from before and what this model reaches."""
    monkeypatch.setattr(sys, "executable", stand_in)
    into = tmp_path / "sweep"
    given = [RL, f"--eval={EVAL}", f"--into={into}", "seed=0", "--config.checkpoint.every=2"]
    write_json(into / "seed=0" / "config.json", {"task": {"name": "sums"}})
    write_json(into / "seed=0" / "eval" / "eval.json", evaluation() | {"complete": False})
    assert main(given) == 1
    assert "jexit: seed=0 ended with exit code 1: collapsed" in capfd.readouterr().err
    assert json.loads((into / "seed=0.json").read_text())["eval"]  # was begun
    (line,) = table(into)
    assert float(line["after/accuracy"]) >= 0


def test_runs_share_what_they_compile(tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr(sys, "executable", stand_in)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    into, other = tmp_path / "grid", str(tmp_path / "other")
    assert main([RL, f"--into={into}", "seed=0,1"]) == 0
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", other)
    assert main([RL, f"--into={into}", "seed=2"]) == 0
    found = [(into / f"seed={seed}/compiled").read_text().strip() for seed in range(3)]
    assert found == [str(into / ".compiled")] * 2 + [other]


def test_a_run_of_another_command_is_left_alone(tmp_path, capfd, monkeypatch):
    """Its process has the lock of its log, also when the sweep that began it is gone."""
    (tmp_path / "seed=0").mkdir()
    with open(tmp_path / "seed=0.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    try:
        assert main([RL, f"--into={tmp_path}", "seed=0"]) == 1
    finally:
        holder.communicate(b"\n")
    error = capfd.readouterr().err
    assert error == "jexit: seed=0 is being run by another command; wait for it, or stop it\n"
    assert not list((tmp_path / "seed=0").iterdir()) and not (tmp_path / "seed=0.json").exists()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main([RL, f"--into={tmp_path}", "seed=0"]) == 1
    error = capfd.readouterr().err
    assert "seed=0.log cannot be locked (No locks available); choose an --into" in error
    assert error.count("\n") == 1


def test_a_sweep_that_was_stopped_goes_on(tmp_path, stand_in):
    code = f"import sys; sys.executable = {stand_in!r}; from jexit.sweep.__main__ import main; "
    into = tmp_path / "sweep"
    line = [sys.executable, "-c", f"{code} sys.exit(main())", RL, f"--into={into}", "seed=0,1"]
    process = start(signal.SIGHUP, [*line, "--config.steps=7"], into / "seed=0" / "begun")
    _, text = process.communicate(timeout=100)
    assert process.returncode == INTERRUPTED
    assert "stopped by SIGHUP; run the same command again to continue" in text.decode()
    assert not list(into.glob("seed=1*"))
    (into / "seed=1").mkdir()
    (into / "seed=1" / "begun").touch()
    subprocess.run([*line, "--config.steps=7"], cwd=ROOT, check=True)
    assert [row["seed"] for row in table(into)] == ["0", "1"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(tmp_path):
    settings = small_settings(saved_small_model(tmp_path / "model"), steps=30, checkpoint__every=5)
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    into = tmp_path / "sweep"
    line = [sys.executable, "-m", "jexit.sweep", RL, f"--into={into}", "seed=0,1", *flags]
    metrics = into / "seed=0" / "metrics.jsonl"
    process = start(signal.SIGINT, line, metrics, lines=3)
    process.communicate(timeout=100)
    before = metrics.read_text().count("\n")
    subprocess.run(line, cwd=ROOT, check=True)
    steps = [json.loads(row)["step"] for row in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31)) and 3 <= before < 30
    assert len(table(into)) == 2


def start(number, line, path, lines=0):
    """A process that gets a signal once a file is there and has some lines."""
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # Where the tests themselves are under nohup, too.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    end = time.monotonic() + 200
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    return process
