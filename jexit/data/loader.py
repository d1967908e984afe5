"""Makes batches as pure functions of (seed, step), so that resuming needs only the step.

Each host uses only its own rows of a batch, so the batch does not depend on the number of hosts.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain
import numpy as np

from jexit.data.tokenizer import Tokenizer
from jexit.errors import SharedUserError, UserError
from jexit.tasks.base import Draw, Problem, Split, Task, stable_hash

# The number of indices in each seed's own stream of generated problems.
_STREAM = 1 << 40
_RETRY = 1 << 36
_MAX_RETRIES = 100

PREPARED_AHEAD = 2  # batches

Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBatch:
    """A packed batch: rows of several prompts with reference completions, padded at the end.

    `loss_mask_BT` float32 is the weight of each token *as a target*: 1 on the completion and its
    end-of-sequence token, 0 on the prompt and on padding. `segment_BT` int32 numbers the texts of a
    row from 1 (0: padding), and `position_BT` int32 the tokens of each text from 0. `task_BT` int32
    is the index of the text's task in the mixture (-1: padding). `lengths_N` int32 contains the
    number of tokens of each text, in the order in which the texts were drawn.
    """

    tokens_BT: np.ndarray
    loss_mask_BT: np.ndarray
    segment_BT: np.ndarray
    position_BT: np.ndarray
    task_BT: np.ndarray
    lengths_N: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """This host's problems of one step, with the token ids of their prompts.

    `skipped` is the number of problems that were left out because their prompts are too long. For
    finite data, it counts the whole split, and for generated data, the problems drawn for this
    batch.
    """

    problems: list[Problem]
    tokens: list[list[int]]
    skipped: int = 0


def prepared(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """Yields `make(step)` for steps `start` to `stop` - 1, computed ahead in a background thread.

    If `make` raises an error, the iterator raises it in place of that batch.
    """
    steps = grain.MapDataset.range(start, stop).map(make)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREPARED_AHEAD)
    return iter(steps.to_iter_dataset(options))


def text_batch(
    mixture: Sequence[tuple[Task, float]],
    tokenizer: Tokenizer,
    *,
    seed: int,
    step: int,
    batch_size: int,
    length: int,
) -> TextBatch:
    """Returns a pretraining batch of reference texts from a weighted mixture of tasks.

    `mixture` contains pairs of a task and its weight. The batch contains the first n texts of a
    random stream that depends on `seed` and `step`, with the largest n that `pack` fits into
    `batch_size` rows of `length` tokens. Raises UserError if a text with its end-of-sequence token
    is longer than `length`, if a task has no reference completions, or if the weights are negative
    or all zero.
    """
    weights = {str(i): weight for i, (_, weight) in enumerate(mixture)}
    for task, weight in mixture:
        if weight < 0:
            raise UserError(
                f"the weight of task {task.name!r} in a text mixture is {weight}, but weights must "
                "be at least 0; raise it"
            )
    if sum(weights.values()) <= 0:
        raise UserError(
            "the task weights of a text mixture are "
            f"{[(task.name, weight) for task, weight in mixture]}, but at least one must be above "
            "0; raise one"
        )
    room = batch_size * length
    texts: list[tuple[list[int], int, int]] = []  # ids, prompt length, task index
    while sum(len(ids) for ids, *_ in texts) <= room:
        problems, tasks = [], []
        for number in range(len(texts), len(texts) + batch_size):
            # The steps' ranges do not overlap: a text has at least one token.
            position = step * room + number
            tasks.append(int(Draw("mixture", seed, position).weighted(weights)))
            task, _ = mixture[tasks[-1]]
            problems.append(_problem_at(task, "train", seed=seed, position=position))
        encoded = _encoded(tokenizer, problems, length)
        texts += [(*text, task) for text, task in zip(encoded, tasks, strict=True)]
    lengths = [len(ids) for ids, *_ in texts]
    count = int(np.searchsorted(np.cumsum(lengths), room, side="right"))
    while max(row_of := pack(lengths[:count], length)) >= batch_size:
        count -= 1

    tokens_BT = np.full((batch_size, length), tokenizer.pad_id, np.int32)
    loss_mask_BT = np.zeros(tokens_BT.shape, np.float32)
    segment_BT, position_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    task_BT = np.full_like(tokens_BT, -1)
    filled_B = np.zeros(batch_size, np.int32)
    for row, (ids, prompt, task) in zip(row_of, texts, strict=False):
        here = slice(filled_B[row], filled_B[row] + len(ids))
        tokens_BT[row, here] = ids
        loss_mask_BT[row, here] = [0.0] * prompt + [1.0] * (len(ids) - prompt)
        segment_BT[row, here] = segment_BT[row].max() + 1
        position_BT[row, here] = np.arange(len(ids))
        task_BT[row, here] = task
        filled_B[row] += len(ids)
    return TextBatch(
        tokens_BT=tokens_BT,
        loss_mask_BT=loss_mask_BT,
        segment_BT=segment_BT,
        position_BT=position_BT,
        task_BT=task_BT,
        lengths_N=np.array(lengths[:count], np.int32),
    )


def encode_references(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    remedy: str = "use a task with reference completions (rows_task: completion=COLUMN)",
) -> list[list[int]]:
    """Returns the token ids of each problem's reference completion, with an end-of-sequence token.

    Raises UserError, with a message that ends in `remedy`, for a problem without a reference
    completion.
    """
    for problem in problems:
        if problem.completion is None:
            raise UserError(
                f"the problem {problem.prompt[:60]!r} has no reference completion; {remedy}"
            )
    texts = tokenizer.encode_batch([problem.completion or "" for problem in problems])
    return [[*ids, tokenizer.eos_id] for ids in texts]


def references_within(
    tokenizer: Tokenizer, problems: Sequence[Problem], limit: int
) -> list[list[int]]:
    """Returns what `encode_references` does, for fine-tuning on the same problems on all hosts.

    Raises SharedUserError if a reference has more tokens than `limit`, the setting
    `finetune.max_new_tokens`.
    """
    references = encode_references(tokenizer, problems)
    for problem, ids in zip(problems, references, strict=True):
        if len(ids) > limit:
            raise SharedUserError(
                f"the reference completion of {problem.prompt[:60]!r} has {len(ids)} tokens, "
                f"but the limit is {limit}; raise config.finetune.max_new_tokens"
            )
    return references


def _encoded(
    tokenizer: Tokenizer, problems: Sequence[Problem], length: int
) -> list[tuple[list[int], int]]:
    """Returns (token ids, prompt length) for each problem.

    The ids are those of the prompt, the reference completion and the end-of-sequence token. Raises
    UserError if a problem has more than `length` of them, or no reference completion.
    """
    prompts = encode_problems(tokenizer, problems)
    completions = encode_references(tokenizer, problems)
    made = []
    for problem, prompt, completion in zip(problems, prompts, completions, strict=True):
        ids = [*prompt, *completion]
        if len(ids) > length:
            raise UserError(
                f"a training example has {len(ids)} tokens, over the limit of {length} (its prompt "
                f"is {problem.prompt[:60]!r}); raise config.pretrain.length, or choose a task with "
                "shorter texts"
            )
        made.append((ids, len(prompt)))
    return made


def pack(lengths: Sequence[int], room: int) -> list[int]:
    """Packs texts of the given lengths into rows of `room` tokens; returns the row of each text.

    This is best-fit decreasing: from the longest to the shortest, each text goes into the fullest
    row that has room for it, or into a new row.
    """
    row_of = [0] * len(lengths)
    rows: list[tuple[int, int]] = []  # (room that is left, row), the fullest first
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        assert lengths[text] <= room, "a text is longer than a row"
        at = bisect.bisect_left(rows, (lengths[text], 0))
        left, row_of[text] = rows.pop(at) if at < len(rows) else (room, len(rows))
        bisect.insort(rows, (left - lengths[text], row_of[text]))
    return row_of


def prompt_batch(
    task: Task,
    tokenizer: Tokenizer,
    *,
    split: Split,
    seed: int,
    step: int,
    batch_size: int,
    max_prompt_tokens: int,
    skip_long: bool = False,
    rows: Sequence[int] | None = None,
) -> PromptBatch:
    """Returns this host's part of one step's batch: the rows `rows` (None: all rows).

    Finite data is visited in epochs. An epoch visits every problem once, in an order drawn from
    (seed, epoch), and a batch may extend into the next epoch. Generated data never repeats an
    index, and each seed has its own indices.

    Raises UserError if the split is empty, or if a prompt is longer than `max_prompt_tokens`. With
    `skip_long`, problems with longer prompts are left out and counted; UserError is then raised
    only if no problem remains.
    """
    rows = range(batch_size) if rows is None else rows
    positions = [step * batch_size + int(row) for row in rows]
    size, skipped = task.size(split), 0
    if size is None or not skip_long:
        problems = [_problem_at(task, split, seed=seed, position=p) for p in positions]
    else:
        require_problems(task, split)
        kept = _short_enough(task, tokenizer, split, max_prompt_tokens)
        order, skipped = _shuffled(seed, len(kept)), size - len(kept)
        problems = [task.problem(split, kept[order[p]]) for p in positions]
    tokens = encode_problems(tokenizer, problems)
    for row, position in enumerate(positions):
        for attempt in range(1, _MAX_RETRIES + 1):
            if len(tokens[row]) <= max_prompt_tokens or not skip_long:
                break
            skipped += 1
            again = position + attempt * _RETRY
            problems[row] = _problem_at(task, split, seed=seed, position=again)
            tokens[row] = tokenizer.encode_prompt(problems[row].messages)
        check_prompt_length(problems[row], tokens[row], max_prompt_tokens)
    return PromptBatch(problems=problems, tokens=tokens, skipped=skipped)


def encode_problems(tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[list[int]]:
    """Returns the token ids of each problem's prompt, including the earlier chat messages."""
    return tokenizer.encode_prompts([problem.messages for problem in problems])


def require_problems(task: Task, split: Split) -> None:
    if task.size(split) == 0:
        raise UserError(
            f"task {task.name!r} has no problem in its {split} split; put data for this split into "
            f"config.task.path or, in a task file of your own, pass rows as {split}= to rows_task"
        )


def check_prompt_length(problem: Problem, ids: Sequence[int], max_prompt_tokens: int) -> None:
    if len(ids) > max_prompt_tokens:
        raise UserError(
            f"the prompt {problem.prompt[:60]!r} has {len(ids)} tokens, over the limit of "
            f"{max_prompt_tokens}; raise config.task.max_prompt_tokens"
        )


def _problem_at(task: Task, split: Split, *, seed: int, position: int) -> Problem:
    """Returns the problem at `position` in the endless stream that `seed` determines."""
    size = task.size(split)
    if size is None:
        # Seeds may be large or negative; their hash picks the range of indices.
        return task.problem(split, (stable_hash("stream", seed) >> 20) * _STREAM + position)
    require_problems(task, split)
    return task.problem(split, _shuffled(seed, size)[position])


@functools.lru_cache(maxsize=8)
def _shuffled(seed: int, size: int) -> grain.MapDataset:
    """Returns an endless dataset of the indices 0 … size − 1, shuffled anew in every epoch."""
    seed = stable_hash("epochs", seed) & 0x7FFFFFFF  # seeds may be large or negative
    return grain.MapDataset.range(size).shuffle(seed=seed).repeat()


@functools.lru_cache(maxsize=8)
def _short_enough(
    task: Task, tokenizer: Tokenizer, split: Split, max_prompt_tokens: int
) -> tuple[int, ...]:
    """Returns the indices of the problems in a finite split whose prompts are within the limit.

    Raises UserError if there are none.
    """
    problems = [task.problem(split, index) for index in range(task.size(split) or 0)]
    lengths = map(len, encode_problems(tokenizer, problems))
    kept = tuple(i for i, tokens in enumerate(lengths) if tokens <= max_prompt_tokens)
    if not kept:
        raise UserError(
            f"every prompt of task {task.name!r}, split {split!r}, is over the limit of "
            f"{max_prompt_tokens} tokens; raise config.task.max_prompt_tokens"
        )
    return kept
