"""Runs of a task that a user's file holds: its metrics, its mistakes, and going on after them."""

import itertools
import json
import re
import sys

import pytest

from jexit.errors import UserError
from jexit.main import main
from jexit.tasks import make_task
from small_runs import ROOT, metrics, run, small_settings

ROWS = """
import jexit
rows = [
    {"prompt": f"sum {n}", "answer": str(n % 7), "reference": f"####{n % 7}"} for n in range(99)
]
"""
REWARDS = """
def has(completions, answer, **columns):
    return [float(due in text) for text, due in zip(completions, answer)]

def shallow(depths, **columns):
    return [-sum(each) / 100 for each in depths]
"""
TASK = """
task = jexit.rows_task(train=rows, rewards={has: 1.0, shallow: 0.5}, completion="reference")
"""
# Of four batches of an update: its third.
THIRD = """
calls = 0
def broken(completions, **columns):
    global calls
    calls += len(completions) == 8  # an update's; an evaluation has other sizes
    if calls == 3:
        FAULT
    return [0.0] * len(completions)
task = jexit.rows_task(train=rows, rewards=[has, broken])
"""


@pytest.fixture
def task_file(tmp_path):
    return tmp_path / "mine.py"


def test_training_and_evaluation_take_a_users_file(model_dir, tmp_path, task_file):
    task_file.write_text(ROWS + REWARDS + TASK)
    own = {"task__name": f"{task_file}:task", "steps": 2}
    run("rl", model_dir, tmp_path / "rl", **own)
    run("eval", tmp_path / "rl", tmp_path / "eval", **own, eval__measures=("exits",))
    for row in metrics(tmp_path / "rl"):
        assert 0 <= row["reward/has"] <= 1 and row["reward/shallow"] < 0
        assert row["reward/verifier"] == pytest.approx(
            row["reward/has"] + 0.5 * row["reward/shallow"], abs=1e-6
        )
        assert row["accuracy"] == row["reward/has"]
    sample = json.loads((tmp_path / "rl" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["rewards"].keys() == {"has", "shallow"}
    assert sample["rewards"]["shallow"] == -sum(sample["depths"]) / 100
    text = json.loads((tmp_path / "eval" / "eval.json").read_text())["runs"][0]["text"]
    assert text.keys() == {"reward/has", "reward/shallow"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("open('/nowhere')", r"'broken' failed \(.*mine.py, line \d+: FileNotFoundError"),
        ("return [0.0]", "'broken' returned 1 values for 8 completions"),
        ("\n        while True: pass", "'broken' took longer than 0.5 s"),
    ],
)
def test_a_mistake_in_the_third_batch_loses_nothing(model_dir, tmp_path, task_file, fault, said):
    task_file.write_text(ROWS + REWARDS + THIRD.replace("FAULT", fault))
    own = {"task__name": str(task_file), "task__time_limit": 0.5}
    with pytest.raises(
        UserError, match=rf"reward function {said}.* \(the run in .* is saved up to step 2"
    ):
        run("rl", model_dir, tmp_path / "run", **own)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    # Its mistake was of its third call: run anew, the same text goes on from there to the end.
    sys.modules.pop(next(name for name in sys.modules if name.startswith("jexit_task_mine")))
    run("rl", model_dir, tmp_path / "run", **own)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_mistake_in_a_validation_loses_nothing(model_dir, tmp_path, task_file):
    validation = THIRD.replace("len(completions) == 8", "len(completions) < 8")
    task_file.write_text(
        ROWS + REWARDS + validation.replace("calls == 3", "calls == 2").replace("FAULT", "1 / 0")
    )
    own = {"checkpoint__every": 2, "checkpoint__keep_best": 1, "task__name": str(task_file)}
    with pytest.raises(UserError, match=r"'broken' failed .* \(the run in .* up to step 2"):
        run("rl", model_dir, tmp_path / "run", **own)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_on_the_command_line_it_is_a_sentence_and_an_exit_code(
    model_dir, tmp_path, task_file, capsys
):
    flags = ["jexit", f"--config={ROOT / 'configs' / 'rl.py'}", f"--workdir={tmp_path / 'run'}"]
    settings = small_settings(model_dir, task__name=str(task_file)).items()
    flags += [f"--config.{key}={value}" for key, value in settings]
    for text, said in (
        ("def task(:", "mine.py, line 1: invalid syntax"),
        ("tsk = 3", "mine.py has no 'task', only tsk; name a jexit.tasks.Task that it"),
        (ROWS + "task = jexit.rows_task(train=[], rewards=len)", "no problem in its train split"),
    ):
        task_file.write_text(text)
        assert main(flags) == 1
        error = capsys.readouterr().err
        assert error.startswith("jexit: ") and said in error and "Traceback" not in error
        assert not (tmp_path / "run").exists()


def test_the_example_of_the_docs_runs_as_it_stands(model_dir, tmp_path, task_file):
    (block,) = re.findall(
        r"```python\n(# mine.py\n.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL
    )
    task_file.write_text(block)
    run("rl", model_dir, tmp_path / "run", task__name=str(task_file), steps=1)
    assert {"reward/right", "reward/brief"} < metrics(tmp_path / "run")[0].keys()


def test_countdown_judges_expressions():
    reference = f"{ROOT / 'examples' / 'countdown.py'}:task"
    task = make_task(reference, numbers=3, rows=200)
    for index in range(40):
        problem = task.problem("train", index)
        target, numbers = problem.fields["target"], problem.fields["numbers"]
        solved = [
            f"{a}{one}{b}{two}{c}"
            for a, b, c in itertools.permutations(numbers)
            for one, two in itertools.product("+-*", repeat=2)
        ]
        bracketed = re.sub(r"^(\d+.\d+)", r"(\1)", solved[0])
        for text in (*solved, f"{solved[0]}={target}\nor so", bracketed):
            comes_to = eval(text.partition("=")[0])  # digits and signs from above
            verdict = task.verify(problem, text)
            assert verdict.parts == {"makes_it": comes_to == target, "uses_them": 1.0}
        for text, uses in ((f"{numbers[0]}", 1 / 3), (f"{solved[0]}+1", 3 / 4), ("", 0), ("a", 0)):
            assert task.verify(problem, text).parts == {"makes_it": 0.0, "uses_them": uses}
        assert not task.verify(problem, "(" * 90 + "1").correct


@pytest.mark.slow
def test_countdown_is_learnt_from_nothing(tmp_path):
    """The command of the file's head, with the shipped model."""
    flags = ["--config.steps=50", "--config.rl.accuracy_floor=0.3", f"--workdir={tmp_path / 'run'}"]
    name = f"--config.task.name={ROOT / 'examples' / 'countdown.py'}"
    assert main(["jexit", f"--config={ROOT / 'configs' / 'rl.py'}", name, *flags]) == 0
    verifier = [row["reward/verifier"] for row in metrics(tmp_path / "run")]
    assert sum(verifier[-10:]) > 2 * sum(verifier[:10])
