"""Tasks that users name: files and modules, what is wrong with them, and their options."""

import dataclasses
import pathlib

import pytest

from jexit.config import TaskConfig
from jexit.errors import MissingFile, UserError
from jexit.loops.setup import load_task
from jexit.tasks import Attempt, Rewards, make_task
from jexit.tasks.references import ALIASES, code_hash
from jexit.tasks.sums import Sums
from jexit.tasks.user_code import guarded_judge

ROWS = "import jexit\nROWS = [{'prompt': str(n)} for n in range(40)]\n"
RIGHT = "def right(completions, **columns):\n    return [1.0] * len(completions)\n"
MADE = "task = jexit.rows_task(train=ROWS, rewards=right)\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(text, name="mine.py"):
        pathlib.Path(name).write_text(text)
        return name

    return written


def test_a_short_name_is_an_alias_of_what_anyone_can_write():
    for name, reference in ALIASES.items():
        if name not in ("exploretom", "gsm8k"):
            both = [make_task(each).problem("train", 3) for each in (name, reference)]
            assert both[0] == both[1]
    assert isinstance(make_task("jexit.tasks.sums:Sums", operands_max=4), Sums)


def test_a_file_or_a_module_holds_a_task_or_what_makes_one(write):
    write(ROWS + RIGHT + MADE)
    assert make_task("mine.py").size("train") + 5 + make_task("mine.py").size("val") == 40
    assert make_task("./mine.py:task").problem("train", 0) == make_task("mine:task").problem(
        "train", 0
    )
    write("BIG = 7\n", "neighbour.py")
    write(
        ROWS + RIGHT + "import neighbour\n"
        "def small(rows: int = 3, *, of: str = 'x'):\n"
        "    return jexit.rows_task(train=ROWS[: rows * neighbour.BIG], rewards=right)\n",
        "functions.py",
    )
    assert sum(make_task("functions.py:small").size(s) for s in ("train", "val", "test")) == 21
    task = make_task("functions.py:small", rows=2, of="y")
    assert sum(task.size(split) for split in ("train", "val", "test")) == 14
    # A subclass of Task gets the config's rewards, as jexit's own do.
    write("from jexit.tasks.sums import Sums\nclass Mine(Sums):\n    pass\n", "classes.py")
    task = make_task("classes.py:Mine", rewards=Rewards(strict=3.0), operands_max=4)
    assert (task.rewards.strict, task.operands) == (3.0, (3, 4))
    assert make_task("mine.py", rewards=Rewards(strict=3.0)).name == "mine.py"  # has its own


def test_a_file_is_read_again_when_its_text_changes(write):
    name = write(ROWS + RIGHT + MADE)
    first, hashed = make_task(name), code_hash(name, {})
    assert make_task(name) is first and code_hash("mine.py:task", {}) == hashed
    write(ROWS.replace("40", "24") + RIGHT + MADE)
    assert make_task(name).size("train") < first.size("train")
    assert code_hash(name, {}) != hashed and len(hashed) == 64
    assert code_hash("sums", {}) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def task(:\n", "cannot be read .*mine.py, line 1: invalid syntax.*; fix this error"),
        (
            "x = 1\n\ny = x / 0\n",
            "cannot be read .*mine.py, line 3: ZeroDivisionError: division by",
        ),
        ("import sys\nsys.exit(3)\n", "cannot be read .*mine.py, line 2: SystemExit: 3"),
        ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError: No module named"),
        ("tasks = 1\n", "mine.py has no 'task', only tasks; name a jexit.tasks.Task that it"),
        ("task = 1\n", "mine.py is 1, but it must be a jexit.tasks.Task or a function that return"),
        ("task = lambda: 3\n", "mine.py returned 3, but it must return a jexit.tasks.Task, such"),
        ("def task():\n    raise OSError('no disk')\n", "made .*mine.py, line 2: OSError: no disk"),
        ("def task(rows):\n    return None\n", "missing 1 required positional argument: 'rows'"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(write, text, said):
    with pytest.raises(UserError, match=said) as caught:
        make_task(write(text))
    assert "\n" not in str(caught.value)


def test_wrong_names_and_options_are_one_sentence(write):
    name = write(ROWS + RIGHT + MADE)
    for reference, options, said in (
        ("nowhere.py:task", {}, "task file nowhere.py does not exist; .* relative to /"),
        ("no_such_module:task", {}, "no_such_module cannot be imported .*No module named"),
        (name, {"rows": 3}, "already a Task, so it does not take config.task.options.rows; make"),
        (f"{name}:right", {}, r"mine.py:right returned|mine.py:right' cannot be made"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            make_task(reference, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(MissingFile):
        make_task("nowhere.py")


def test_a_users_own_judge_is_guarded(write):
    name = write(
        "import time\nfrom jexit.tasks import Problem, Task\n"
        "class Mine(Task):\n    name = 'mine'\n"
        "    def problem(self, split, index):\n"
        "        return Problem(prompt=f'{index}', answer='1')\n"
        "    def verify(self, problem, completion):\n"
        "        if completion == 'slow': time.sleep(60)\n"
        "        return self.verdict('strict' if completion else 1 / 0)\n"
    )
    task = make_task(f"{name}:Mine")
    task.time_limit = 0.2
    problems = [task.problem("train", 0)]
    assert guarded_judge(task, problems, [Attempt(text="1")])[0].correct
    for text, said in (
        ("", r"task 'mine' cannot judge \(.*mine.py, line 9: ZeroDivisionError: division by zero"),
        ("slow", "task 'mine' took longer than 0.2 s for one batch; .* raise config.task.time_lim"),
    ):
        with pytest.raises(UserError, match=said):
            guarded_judge(task, problems, [Attempt(text=text)])
        blend = make_task("blend", parts=(f"{name}:Mine", "sums"))
        blend.tasks["mine"].time_limit = 0.2
        with pytest.raises(UserError, match=said):
            blend.judge([blend.problem("train", 0)], [Attempt(text=text)])


@pytest.mark.parametrize(
    ("verify", "said"),
    [
        (
            "return True",
            "returned True, but it must return a jexit.tasks.Verdict with a finite rew",
        ),
        ("return Verdict(kind='right', reward=1.0)", "returned Verdict.*but it must return"),
        ("return Verdict(kind='wrong', reward=float('nan'))", "with a finite reward"),
    ],
)
def test_what_a_users_own_task_returns_is_checked(write, verify, said):
    name = write(
        "from jexit.tasks import Problem, Task, Verdict\n"
        "class Mine(Task):\n"
        "    def problem(self, split, index):\n"
        "        return Problem(prompt=f'{10 / index}', answer='1')\n"
        f"    def verify(self, problem, completion):\n        {verify}\n"
        "    def text_totals(self, problems, attempts):\n        raise KeyError('x')\n"
    )
    task = make_task(f"{name}:Mine")
    problem = task.problem("train", 1)
    with pytest.raises(UserError, match=said):
        guarded_judge(task, [problem], [Attempt(text="")])
    with pytest.raises(UserError, match=r"Mine: problem failed \(.*line 4: ZeroDivisionError"):
        task.problem("train", 0)
    with pytest.raises(UserError, match=r"Mine: text_totals failed .*line 8: KeyError: 'x'"):
        task.text_totals([], [])
    task.judge = lambda problems, attempts: []
    with pytest.raises(UserError, match="returned 0 verdicts for 1 completions"):
        guarded_judge(task, [problem], [Attempt(text="")])


def test_a_blend_passes_its_limit_on_and_its_hash_covers_its_parts(write):
    name = write(ROWS + RIGHT + MADE)
    blend = make_task("blend", parts=(name, "sums"))
    blend.time_limit = 3.0
    assert [task.time_limit for task in blend.tasks.values()] == [3.0, 3.0]
    assert code_hash("blend", {"parts": (name, "sums")}) == code_hash(name, {})
    assert code_hash("blend", {"parts": ("sums", "tom")}) == ""
    problems = [blend.problem("train", index) for index in range(2)]
    attempts = [Attempt(text=""), Attempt(text="")]
    verdicts = blend.judge(problems, attempts)
    attempts = [dataclasses.replace(a, verdict=v) for a, v in zip(attempts, verdicts, strict=True)]
    totals = blend.text_totals(problems, attempts)
    assert totals["sums/accuracy"] == (0, 1) and totals[f"{name}/accuracy"] == (1, 1)


def test_keywords_of_a_users_function_are_its_own(write, monkeypatch, tmp_path):
    """Also `path` and `name`; `rewards` is jexit's only where the annotation says so."""
    name = write(
        ROWS + RIGHT + "import jexit.tasks\n"
        "def task(path='a', name='b', rewards=None, **others):\n"
        "    made = jexit.rows_task(train=ROWS, rewards=right)\n"
        "    made.got = path, name, rewards, others\n"
        "    return made\n"
    )
    config = TaskConfig(name=name, options={"path": "x", "name": "y", "more": 1})
    assert load_task(config, "train").got == ("x", "y", None, {"more": 1})
    with pytest.raises(UserError, match=r"options.rewards is set, but .* config.task.reward_s"):
        load_task(TaskConfig(name=name, options={"rewards": 3}), "train")
    assert load_task(TaskConfig(name="sums", reward_wrong=-2.0), "train").rewards.wrong == -2.0
    parts = {"parts": (name, "sums")}
    assert code_hash("jexit.tasks.blend:task", parts) == code_hash("blend", parts) != ""
    with pytest.raises(UserError, match="parts is 5, but it must be a list of task names"):
        make_task("blend", parts=5)


def test_a_file_that_is_no_python_and_a_coroutine_are_refused(write, recwarn):
    for text, said in (
        ("x = 1\0", r"cannot be read \(.*mine.py, line 1: .*null bytes"),
        ("async def task(): pass", "returned <coroutine object task .*, but it must return"),
    ):
        with pytest.raises(UserError, match=said):
            make_task(write(text))
    assert not recwarn.list
