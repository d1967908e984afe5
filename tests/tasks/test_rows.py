"""Tasks of rows and reward functions: sources, columns, what functions get and do wrong."""

import asyncio
import contextlib
import csv
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import jexit
from jexit.errors import UserError
from jexit.tasks import Attempt

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "n": n} for n in range(60)]


def right(prompts, completions, answer, **columns):
    return [float(text.endswith(due)) for text, due in zip(completions, answer, strict=True)]


def brief(completions, **columns):
    return [1.0 / (1 + len(text)) for text in completions]


def made(**changed):
    given = {"train": ROWS, "prompt": "question", "rewards": {right: 1.0, brief: 0.1}}
    return jexit.rows_task(**given | changed)


def judged(task, *texts, **attempt):
    problems = [task.problem("train", index) for index in range(len(texts))]
    return task.judge(problems, [Attempt(text=text, **attempt) for text in texts])


def test_rewards_are_weighted_sums_and_the_first_counts_as_correct():
    task = made()
    answer = task.problem("train", 0).answer
    good, bad = judged(task, f"It is {answer}", "hm")
    assert (good.kind, bad.kind, good.correct, bad.correct) == ("strict", "wrong", True, False)
    assert good.parts == {"right": 1.0, "brief": 1 / (7 + len(answer))}
    assert good.reward == pytest.approx(1.0 + 0.1 / (7 + len(answer)))
    assert bad.reward == pytest.approx(0.1 / 3)

    def never(completions, **columns):
        return [0.0] * len(completions)

    other = made(correct=never)
    assert [verdict.kind for verdict in judged(other, f"It is {answer}")] == ["wrong"]
    assert judged(other, f"It is {answer}")[0].parts.keys() == {"right", "brief"}
    assert task.verify(task.problem("train", 0), answer).correct
    assert task.judge([], []) == []


def test_a_none_is_left_out_and_where_correct_is_none_nothing_was_said():
    def sometimes(completions, n, **columns):
        return [None if number % 2 else 2.0 for number in n]

    task = made(rewards=[sometimes, brief])
    for index, verdict in enumerate(judged(task, *"abcd")):
        odd = task.problem("train", index).fields["n"] % 2
        assert verdict.kind == ("none" if odd else "strict")
        assert verdict.reward == pytest.approx(0.5 if odd else 2.5)
        assert verdict.parts == ({"brief": 0.5} if odd else {"sometimes": 2.0, "brief": 0.5})


def test_a_function_as_users_of_trl_write_it():
    # From the documentation of TRL's GRPOTrainer: a pattern on each completion, chat format.
    def format_reward_func(completions, **kwargs):
        """Reward function that checks if the completion has a specific format."""
        pattern = r"^<think>.*?</think><answer>.*?</answer>$"
        completion_contents = [completion[0]["content"] for completion in completions]
        matches = [re.match(pattern, content) for content in completion_contents]
        return [1.0 if match else 0.0 for match in matches]

    def reward_len(completions, completion_ids, **kwargs):
        return [-abs(3 - len(ids)) for ids in completion_ids]

    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "solution": n} for n in range(20)]
    task = jexit.rows_task(train=rows, rewards=[format_reward_func, reward_len])
    text = "<think>a</think><answer>b</answer>"
    good, bad = judged(task, text, "b", ids=[5, 6], depths=[3, 2])
    assert good.parts == {"format_reward_func": 1.0, "reward_len": -1.0}
    assert bad.parts == {"format_reward_func": 0.0, "reward_len": -1.0}


def test_functions_get_every_column_depths_and_tokens_and_may_be_asynchronous():
    seen = {}

    async def slow(prompts, completions, depths, tokens, n, **columns):
        await asyncio.sleep(0)
        seen.update(columns, prompts=prompts, depths=depths, tokens=tokens, n=n)
        return np.array([1.0, 0.0], np.float32)

    class Judge:
        def __call__(self, depths):  # only what it names
            return [sum(each) for each in depths]

    task = made(rewards={slow: 2.0, Judge(): -0.5})
    verdicts = judged(task, "a", "b", ids=[7, 8], depths=[6, 2])
    problems = [task.problem("train", index) for index in range(2)]
    assert seen == {
        "answer": [problem.answer for problem in problems],
        "question": [problem.prompt for problem in problems],
        "prompts": [problem.prompt for problem in problems],
        "completion_ids": [[7, 8]] * 2,
        "tokens": [[7, 8]] * 2,
        "depths": [[6, 2]] * 2,
        "n": [problem.fields["n"] for problem in problems],
    }
    assert [verdict.reward for verdict in verdicts] == [2.0 - 4.0, -4.0]
    assert verdicts[0].parts == {"slow": 1.0, "Judge": 8.0}


def test_conversations_keep_their_system_message_and_turns():
    said = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    rows = [{"prompt": said, "reference": [{"role": "assistant", "content": "4"}]}] * 9
    task = jexit.rows_task(
        train=rows, test=rows, completion="reference", rewards=lambda completions: [1.0]
    )
    problem = task.problem("test", 0)
    assert (problem.prompt, problem.completion, list(problem.messages)) == ("2 + 2?", "4", said)


def test_rows_come_from_sequences_and_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    expected = [made().problem("train", index).prompt for index in range(20)]
    sources = [tmp_path / f"a.{end}" for end in ("jsonl", "csv", "parquet")]
    for train in (*sources, str(sources[0]), grain.MapDataset.source(ROWS), tuple(ROWS)):
        task = made(train=train)
        assert [task.problem("train", index).prompt for index in range(20)] == expected
        assert [task.problem("train", index).answer for index in range(20)] == [
            made().problem("train", index).answer for index in range(20)
        ]


def test_a_hugging_face_data_set_is_a_sequence_and_a_name_is_its_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    task = made(train=datasets.Dataset.from_list(ROWS))
    assert task.problem("train", 0) == made().problem("train", 0)
    # A folder is to `load_dataset` what a name on the hub is.
    for name, rows in (("train", ROWS), ("test", ROWS[:7])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = made(train=f"hf:{tmp_path}", test=f"hf:{tmp_path}")
    assert task.size("test") == 7 and task.size("train") + task.size("val") == 53
    with pytest.raises(UserError, match=r"validation split of hf:.* cannot be loaded \(ValueError"):
        made(val=f"hf:{tmp_path}").size("val")


def test_splits_share_no_prompt_and_rows_that_cannot_be_used_are_counted(caplog):
    sizes = [made().size(split) for split in ("train", "val", "test")]
    assert sizes == [50, 3, 7] and sum(sizes) == 60
    assert [made(test=ROWS[:5]).size(s) for s in ("train", "val", "test")] == [52, 3, 5]
    for given in ({"val": ROWS[5:10]}, {"val": ROWS[:9], "test": ROWS[5:20]}):  # 7: held out else
        task = made(**given)
        shown = [
            {task.problem(split, index).prompt for index in range(task.size(split))}
            for split in ("train", "val", "test")
        ]
        assert sum(map(len, shown)) == len(set.union(*shown)) == 60
        assert task.size("test") == len(given.get("test", range(55 // 8)))
    broken = [
        *ROWS[:9], {"question": 7}, {"question": " "}, {"other": 1}, "text",
        {"question": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
        {"question": [{"role": "judge", "content": "?"}]}, {"question": [{"role": "user"}]},
    ]  # fmt: skip
    assert made(train=broken, test=ROWS[20:]).size("train") == 8
    for said in (
        "skipped 7 of 16 rows", "row 9: 'question' is 7, but it must be a text or a list",
        "row 10: 'question' is empty", "row 12: not a mapping", "the last message must be",
    ):  # fmt: skip
        assert said in caplog.text


def raises(completions, **columns):
    return [1.0 / (len(text) - 1) for text in completions]


def test_asynchronous_functions_share_one_event_loop():
    """What they keep belongs to it, also after one of them took too long."""
    lock = asyncio.Semaphore(1)

    async def waits(completions, **columns):
        async with lock:
            await asyncio.sleep(60 if completions[0] == "slow" else 0)
            return [1.0] * len(completions)

    async def queues(completions, **columns):
        return await asyncio.gather(*(asyncio.wait_for(one(), 5) for _ in completions))

    async def one():
        async with lock:
            await asyncio.sleep(0)
            return 0.5

    task = made(rewards={waits: 1.0, queues: 1.0})
    task.time_limit = 0.3
    for texts in (("a", "b"), ("slow", "b"), ("a", "b")):
        if texts[0] == "slow":
            with pytest.raises(UserError, match=r"'waits' took longer than 0\.3 s"):
                judged(task, *texts)
        else:
            assert [verdict.reward for verdict in judged(task, *texts)] == [1.5, 1.5]


def test_columns_may_differ_between_rows(caplog):
    """A needed one that is missing leaves the row out; a further one is None elsewhere."""
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(8)]
    rows[3]["hint"] = "look"
    del rows[5]["answer"]
    rows.append({"question": "What?", "answer": "1", 7: "seven"})
    seen = {}

    def sees(completions, answer, hint, **columns):
        seen.update(hint=hint)
        return [1.0] * len(completions)

    with pytest.raises(UserError, match="'sees' needs 'hint', but the first row has only the col"):
        jexit.rows_task(train=rows, prompt="question", rewards=sees, test_every=0).size("train")

    def sees(completions, answer, hint=None, **columns):
        seen.update(hint=hint)
        return [1.0] * len(completions)

    task = jexit.rows_task(train=rows, val=rows[:1], prompt="question", rewards=sees, test_every=0)
    problems = [task.problem("train", index) for index in range(task.size("train"))]
    assert [problem.prompt for problem in problems] == [f"What is {n}?" for n in (1, 2, 3, 4, 6, 7)]
    for text in ("row 5: no 'answer'", "row 8: it has the column 7, but names of columns must"):
        assert text in caplog.text
    task.judge(problems, [Attempt(text="")] * 6)
    assert seen["hint"] == [None, None, "look", None, None, None]


def endless(completions, **columns):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def stubborn(completions, **columns):
    for _ in range(20):  # of a loop that would go on
        with contextlib.suppress(BaseException):
            time.sleep(60)
    time.sleep(60)


async def endless_too(completions, **columns):
    await asyncio.sleep(60)


async def cancelled(completions, **columns):
    raise asyncio.CancelledError


class Lazy:
    """A sequence that raises when it is read."""

    def __len__(self):
        return 2

    def __getitem__(self, place):
        raise IndexError("lost")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda completions: [1.0], "'<lambda>' returned 1 values for 2 completions, but it must"),
        (lambda completions: 1.0, "'<lambda>' returned 1.0, but it must return a list with a nu"),
        (lambda completions: "ab", "'<lambda>' returned 'ab', but it must return a list"),
        (lambda completions: [1.0, math.nan], r"returned nan for completion 1 \(prompt 'What is"),
        (lambda completions: [math.inf, 0], r"returned inf for completion 0 \(prompt 'What is"),
        (
            lambda completions: ["1", 0],
            "returned '1' for completion 0 .*, but a reward must be None",
        ),
        (lambda completions: np.asarray(1.0), r"returned array\(1\.\), but it must return a list"),
        (
            lambda completions: [10**400, 0],
            "returned a number of thousands|returned 1000.*-1,000,000",
        ),
        (lambda completions: [1e39, 0], r"returned 1e\+39 for completion 0 .*to 1,000,000"),
        (lambda completions: [[1], 0], r"returned \[1\] for completion 0"),
        (lambda completions: Lazy(), r"failed \(.*test_rows.py, line \d+: IndexError: lost"),
        (cancelled, "'cancelled' failed .*CancelledError"),
        (stubborn, "took longer than 0.2 s for one batch"),
        (raises, r"'raises' failed \(.*test_rows.py, line \d+: ZeroDivisionError: float division"),
        (endless, r"'endless' took longer than 0.2 s for one batch; .* config.task.time_limit"),
        (endless_too, "'endless_too' took longer than 0.2 s for one batch"),
    ],
)
def test_what_a_function_does_wrong_is_one_sentence(function, said):
    task = made(rewards=function)
    task.time_limit = 0.2
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=f"reward function {said}" if said[0] == "'" else said) as e:
        judged(task, "a", "b")
    assert "\n" not in str(e.value)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_functions_and_columns_that_do_not_fit_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.parquet").write_text("no parquet")
    for given, said in (
        ({"rewards": []}, "rewards contains no function, but at least one is needed; add one"),
        ({"rewards": [right, right]}, "contains 2 functions called 'right', but their names"),
        ({"rewards": {right: 1.0, lambda c: 1: 1, lambda c: 2: 1}}, "called '<lambda>', but their"),
        ({"rewards": None}, "rewards is None, but it must be a function, a list of functions, or"),
        ({"rewards": {right: math.nan}}, "the weight of .* is nan, but it must be a number"),
        ({"correct": "ok"}, "correct is 'ok', but it must be a function"),
        ({"test_every": -1}, "test_every is -1, but it must be a whole number of at least 0"),
        ({"train": (row for row in ROWS)}, "the rows of train are <generator .*but they must be a"),
        ({"train": {"prompt": ["a"]}}, "the rows of train are {'prompt'.*but they must be a seq"),
        ({"rewards": [3]}, "rewards contains 3, but it must contain functions; pass"),
        ({"rewards": {right: "1"}}, "the weight of .* is '1', but it must be a number"),
        (
            {"prompt": "text"},
            "the first row has no column 'text', only question, answer, n; name one",
        ),
        (
            {"completion": "text"},
            "the first row has no column 'text', only question, answer, n; name one",
        ),
        ({"rewards": lambda completions, gold: 1}, "needs 'gold', but the first row has only the"),
        ({"train": tmp_path / "none.jsonl"}, "rows file .*none.jsonl does not exist; give"),
        ({"train": tmp_path / "a.txt"}, r"a.txt ends in '\.txt', but it must end in one of \.js"),
        ({"train": tmp_path / "a.parquet"}, "cannot be read as a Parquet file"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            made(**given).size("train")
        assert "\n" not in str(caught.value)


def test_another_thread_has_no_signals_and_so_no_limit():
    task, found = made(), []
    thread = threading.Thread(target=lambda: found.extend(judged(task, "a", "b")))
    thread.start()
    thread.join()
    assert len(found) == 2


def test_names_of_jexits_own_metrics_are_refused_and_functions_share_nothing():
    def length(completions):
        return [1.0]

    def greedy(completions, answer):
        answer.clear()
        return [1.0 for _ in completions]

    with pytest.raises(UserError, match="is called 'length', but every run already has"):
        made(rewards=length)
    assert len(judged(made(rewards=[greedy, right]), "a", "b")) == 2


def test_text_that_is_not_unicode_is_left_out(tmp_path, caplog):
    (tmp_path / "latin.csv").write_bytes(
        "question,answer,n\nWie gehts? \xe9,1,2\n".encode("latin-1")
    )
    rows = [{"question": "half \ud800", "answer": "1", "n": 1}, *ROWS]
    assert made(train=rows, test=tmp_path / "latin.csv").size("test") == 0
    assert made(train=rows, test=ROWS[:5]).size("train") == 52
    assert caplog.text.count("is not valid Unicode") == 2


def test_a_process_that_ignores_every_interrupt_ends(tmp_path):
    file = tmp_path / "stubborn.py"
    file.write_text(
        "import time\nfrom jexit.tasks.user_code import time_limit\n"
        "with time_limit(0.1, 'reward function'):\n"
        "    while True:\n"
        "        try:\n            time.sleep(1)\n        except:\n            pass\n"
    )
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(jexit.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "took longer than 0.1 s for one batch; make it faster" in done.stderr
