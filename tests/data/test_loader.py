"""Batches are pure functions of (seed, step), and hold what they say."""

import collections
import json
import pathlib
import threading

import numpy as np
import pytest

import jexit.data.tokenizer as tokenizer_module
from chat_templates import BEGINNING, with_begin_token
from jexit.data.loader import (
    PREPARED_AHEAD,
    pack,
    prepared,
    prompt_batch,
    require_problems,
    text_batch,
)
from jexit.data.tokenizer import Tokenizer
from jexit.tasks import make_task
from jexit.tasks.base import Problem, Task, turns

TOKENIZER = Tokenizer.load(pathlib.Path(tokenizer_module.__file__).parents[1] / "assets" / "tiny")
MIXTURE = [(make_task("sums", steps="mixed"), 0.8), (make_task("word_problems"), 0.2)]


class Finite(Task):
    """Problems 0 ... n-1, each with its number as the prompt."""

    name = "finite"

    def __init__(self, prompts):
        super().__init__()
        self.prompts = prompts

    def size(self, split):
        return len(self.prompts) if split == "train" else 0

    def problem(self, split, index):
        return Problem(prompt=self.prompts[index], answer=str(index))

    def verify(self, problem, completion):
        return self.verdict("none")


def prompts(task, **options):
    settings = {"split": "train", "seed": 0, "step": 0, "batch_size": 4, "max_prompt_tokens": 20}
    return prompt_batch(task, TOKENIZER, **(settings | options))


def texts(**options):
    settings = {"seed": 0, "step": 0, "batch_size": 16, "length": 80}
    return text_batch(MIXTURE, TOKENIZER, **(settings | options))


def pieces(batch):
    """Each row's texts: (ids, weights), cut where the segment's number changes."""
    for row in range(len(batch.tokens_BT)):
        for number in range(1, batch.segment_BT[row].max() + 1):
            (place,) = np.nonzero(batch.segment_BT[row] == number)
            assert (np.diff(place) == 1).all()
            np.testing.assert_array_equal(batch.position_BT[row, place], np.arange(len(place)))
            yield batch.tokens_BT[row, place], batch.loss_mask_BT[row, place]


def test_text_batch_layout():
    batch = texts()
    assert batch.tokens_BT.shape == batch.loss_mask_BT.shape == (16, 80)
    assert batch.tokens_BT.dtype == np.int32 and batch.loss_mask_BT.dtype == np.float32
    found = list(pieces(batch))
    assert sorted(len(ids) for ids, _ in found) == sorted(batch.lengths_N)
    assert len(found) > 2 * 16
    for ids, weights in found:
        text = TOKENIZER.decode(ids, keep_special=True)
        assert text.startswith("<|user|>") and text.endswith("<|end|>")
        prompt = ids.tolist().index(2) + 1  # <|assistant|>
        expected = [0.0] * prompt + [1.0] * (len(ids) - prompt)
        np.testing.assert_array_equal(weights, np.array(expected, np.float32))
    is_sum_BT = (batch.task_BT == 0) & (batch.position_BT == 1)
    assert {TOKENIZER.decode([i]) for i in batch.tokens_BT[is_sum_BT]} == {"sum"}
    assert is_sum_BT.sum() + ((batch.task_BT == 1) & (batch.position_BT == 1)).sum() == len(found)
    padding_BT = batch.segment_BT == 0
    assert (batch.task_BT[padding_BT] == -1).all()
    assert (batch.tokens_BT[padding_BT] == TOKENIZER.pad_id).all()
    assert (batch.loss_mask_BT[padding_BT] == 0).all()
    assert (np.diff(padding_BT.astype(int), axis=1) >= 0).all()  # it comes after the texts


def test_a_text_begins_once_and_its_loss_ends_with_the_end_token():
    """With the begin token of its prompt; the answer has none of its own. PAD may be the end."""
    for template in (BEGINNING, None):
        tokenizer = with_begin_token(template)
        batch = text_batch(MIXTURE, tokenizer, seed=0, step=0, batch_size=8, length=90)
        for ids, _ in pieces(batch):
            assert [i for i, token in enumerate(ids) if token == tokenizer.begin_id] == [0]
    tokenizer = Tokenizer(TOKENIZER.backend)
    tokenizer.pad_id = tokenizer.eos_id
    batch = text_batch(MIXTURE, tokenizer, seed=0, step=0, batch_size=8, length=80)
    assert all(ids[-1] == 3 and weights[-1] == 1.0 for ids, weights in pieces(batch))
    assert (batch.loss_mask_BT[batch.segment_BT == 0] == 0).all()


def test_texts_are_the_first_of_a_stream_of_their_own():
    """Nothing is left out for its length, and nothing comes again."""
    batch = texts(step=3)
    np.testing.assert_array_equal(batch.tokens_BT, texts(step=3).tokens_BT)
    assert not np.array_equal(batch.tokens_BT, texts(step=3, seed=1).tokens_BT)
    wide = texts(step=3, batch_size=1, length=16 * 80)  # the same stream, in one row
    count = len(batch.lengths_N)
    assert batch.lengths_N.tolist() == wide.lengths_N.tolist()[:count]
    assert batch.lengths_N.sum() >= 0.93 * 16 * 80
    assert 0 <= len(wide.lengths_N) - count <= 3
    seen = [tuple(ids) for step in range(6) for ids, _ in pieces(texts(step=step, batch_size=32))]
    assert len(set(seen)) > 0.95 * len(seen)  # two digits and a step of two: some must repeat
    assert 0.74 < np.mean([TOKENIZER.decode(ids[1:2]) == "sum" for ids in seen]) < 0.86


def test_pack():
    for lengths, room, expected in (
        ([3, 3, 2, 2, 2], 6, [0, 0, 1, 1, 1]),
        ([2, 2, 2, 3, 3], 6, [1, 1, 1, 0, 0]),
        ([4, 3, 2, 3], 6, [0, 1, 0, 1]),  # the 2 goes where it fits closest
        ([5, 5], 6, [0, 1]),
        ([6, 6, 1], 6, [0, 1, 2]),
        ([], 6, []),
    ):
        assert pack(lengths, room) == expected


def test_text_batch_refuses_what_it_cannot_train_on():
    with pytest.raises(ValueError, match=r"has \d+ tokens, over the limit of 16"):
        texts(length=16)
    with pytest.raises(ValueError, match="no reference completion"):
        text_batch([(Finite(["1"]), 1.0)], TOKENIZER, seed=0, step=0, batch_size=1, length=56)
    with pytest.raises(ValueError, match="but at least one must be above 0; raise one"):
        text_batch([(MIXTURE[0][0], 0.0)], TOKENIZER, seed=0, step=0, batch_size=1, length=56)
    with pytest.raises(ValueError, match="weights"):
        text_batch([], TOKENIZER, seed=0, step=0, batch_size=1, length=56)


def test_every_problem_once_an_epoch():
    for size, batch_size in ((7, 3), (5, 8), (6, 6), (1, 4)):
        task = Finite([str(i) for i in range(size)])
        batches = [prompts(task, step=step, batch_size=batch_size) for step in range(3 * size)]
        seen = [problem.answer for batch in batches for problem in batch.problems]
        assert len(seen) == 3 * size * batch_size
        epochs = [seen[start : start + size] for start in range(0, len(seen), size)]
        assert all(sorted(epoch, key=int) == [str(i) for i in range(size)] for epoch in epochs)
        if size > 4:
            assert len(set(map(tuple, epochs))) > 1
            assert epochs[0] != [p.answer for p in prompts(task, seed=1, batch_size=size).problems]


def test_prompt_batches_of_a_generated_task():
    task = make_task("sums")
    batch = prompts(task, step=5)
    assert batch == prompts(task, step=5)
    assert batch.tokens == [TOKENIZER.encode_prompt(p.prompt) for p in batch.problems]
    assert prompts(task, step=0, batch_size=24).problems[20:] == batch.problems
    seeds = [prompts(task, seed=seed).problems for seed in (-1, 0, 2**63, 10**30)]
    assert len({tuple(p.prompt for p in each) for each in seeds}) == 4
    for some in (task, Finite([f"sum {i}" for i in range(6)])):  # hosts' rows together
        batch = prompts(some, step=3)
        for rows in ([0, 1], [2, 3], [0, 3], []):
            mine = prompts(some, step=3, rows=rows)
            assert mine.problems == [batch.problems[row] for row in rows]
            assert mine.tokens == [batch.tokens[row] for row in rows]


def test_a_prompt_over_the_limit_names_the_length_the_limit_and_the_key():
    said = r"prompt 'sum 12' has 6 tokens, over the limit of 5;.*config\.task\.max_prompt_tokens"
    with pytest.raises(ValueError, match=said):
        prompts(Finite(["sum 12"]), max_prompt_tokens=5)
    assert prompts(Finite(["sum 12"]), max_prompt_tokens=6).skipped == 0
    with pytest.raises(ValueError, match=r"config\.task\.max_prompt_tokens"):
        prompts(make_task("sums"), max_prompt_tokens=7, batch_size=64)


def test_long_prompts_can_be_skipped_and_are_counted():
    task = Finite(["1", "22", "3" * 50, "4", "5" * 60])
    batches = [
        prompts(task, step=step, batch_size=3, max_prompt_tokens=8, skip_long=True)
        for step in range(4)
    ]
    answers = collections.Counter(p.answer for batch in batches for p in batch.problems)
    assert answers == {"0": 4, "1": 4, "3": 4}
    assert {batch.skipped for batch in batches} == {2}
    with pytest.raises(ValueError, match=r"every prompt .* over the limit of 2 tokens"):
        prompts(task, max_prompt_tokens=2, skip_long=True)

    batch = prompts(make_task("sums"), batch_size=64, max_prompt_tokens=8, skip_long=True)
    assert batch.skipped > 0 and len(batch.problems) == 64
    assert max(map(len, batch.tokens)) <= 8


def test_a_finite_data_set_as_training_text_and_an_empty_one(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"seed": 0, "step": 1, "batch_size": 4, "length": 20}
    task = make_task("gsm8k", str(tmp_path), instruction="")
    decoded = {
        TOKENIZER.decode(ids) for ids, _ in pieces(text_batch([(task, 1.0)], TOKENIZER, **settings))
    }
    assert decoded == {f"{i}?#### {i}" for i in range(3)}  # the last one is to validate with
    file.write_text("\n")
    task = make_task("gsm8k", str(tmp_path))
    for ask in (
        lambda: prompts(task),
        lambda: require_problems(task, "train"),
        lambda: text_batch([(task, 1.0)], TOKENIZER, **settings),
    ):
        said = r"task 'gsm8k' has no problem in its train split; put data"
        with pytest.raises(ValueError, match=said):
            ask()


def test_batches_are_prepared_ahead_by_another_thread_from_any_step():
    made, asked = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread()))
        if len(made) > PREPARED_AHEAD:
            asked.set()
        if step == 9:
            raise ValueError("a prompt has 99 tokens")
        return step * 10

    batches = prepared(make, 4, 100)
    assert next(batches) == 40
    assert asked.wait(30)  # nobody has asked for these
    steps, threads = zip(*made, strict=True)
    assert steps[: PREPARED_AHEAD + 1] == tuple(range(4, 5 + PREPARED_AHEAD))
    assert threading.main_thread() not in threads
    assert len(made) < 10  # ahead, but not far
    assert [next(batches) for _ in range(4)] == [50, 60, 70, 80]
    with pytest.raises(ValueError, match="a prompt has 99 tokens"):
        next(batches)
    assert list(prepared(lambda step: step, 5, 7)) == [5, 6]
    assert list(prepared(lambda step: step, 7, 7)) == []


class Shown(Finite):
    """The same, each after as many worked examples as its number says."""

    def problem(self, split, index):
        return Problem(
            prompt=self.prompts[index],
            answer="1",
            completion="####1",
            earlier=turns([("sum 1", "####1")] * index),
        )


def test_worked_examples_are_part_of_the_prompt_and_of_its_limit():
    task = Shown(["sum 12"] * 4)
    lengths = [len(TOKENIZER.encode_prompt(task.problem("train", n).messages)) for n in range(4)]
    assert len(set(lengths)) == 4
    batch = prompts(task, max_prompt_tokens=lengths[-1])
    assert sorted(map(len, batch.tokens)) == lengths
    for problem, ids in zip(batch.problems, batch.tokens, strict=True):
        assert ids == TOKENIZER.encode_prompt(problem.messages)
    with pytest.raises(ValueError, match=r"over the limit of .*max_prompt_tokens"):
        prompts(task, max_prompt_tokens=lengths[-1] - 1)
    short = prompts(task, max_prompt_tokens=lengths[1], skip_long=True)
    assert short.skipped == 2 and max(map(len, short.tokens)) == lengths[1]
    made = text_batch([(task, 1.0)], TOKENIZER, seed=0, step=0, batch_size=4, length=64)
    whole = {len(ids) for ids, _ in pieces(made)}
    assert whole == {n + len(TOKENIZER.encode("####1")) + 1 for n in lengths}
