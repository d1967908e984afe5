"""What a task is: prompts by index, and a checker that judges any text without raising."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from jexit.errors import UserError

Split = Literal["train", "val", "test"]
VerdictKind = Literal["strict", "lenient", "wrong", "none"]

Message = Mapping[str, str]  # `role` (system, user or assistant) and `content`

ROLES = ("system", "user", "assistant")
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_PARTS = 8  # of generated problems; one is the test split, one the validation split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One question.

    `prompt` is the user's message before any chat template, `answer` the right answer as text,
    `completion` a reference completion without its end token (None where the data has none),
    `earlier` the messages before the prompt (a system message, worked examples, turns of a
    conversation), and `fields` whatever else describes the problem (operands, template, ...).
    """

    prompt: str
    answer: str
    completion: str | None = None
    earlier: tuple[Message, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that a completion goes on with."""
        return (*self.earlier, {"role": "user", "content": self.prompt})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """What each kind of verdict earns (defaults: arXiv:2603.21376, as far as published)."""

    strict: float = 1.0
    lenient: float = 0.5
    wrong: float = 0.0
    none: float = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judged completion.

    `strict`: the right answer in the required format; `lenient`: the right answer, found only by
    the lenient parse; `wrong`: another answer, in either format; `none`: no answer found. `parts`
    are the rewards of a task's own functions by name, before their weights.
    """

    kind: VerdictKind
    reward: float
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def correct(self) -> bool:
        return self.kind in ("strict", "lenient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A completion of one prompt; a token's depth is of the pass that produced it.

    `text` is what is judged: without special tokens, and after the `<think>` that a prompt ends in.
    `truncated`: it ran into the limit of tokens. `verdict` is None until it is judged.
    """

    text: str
    ids: Sequence[int] = ()
    depths: Sequence[int] = ()
    truncated: bool = False
    verdict: Verdict | None = None

    @property
    def correct(self) -> bool:
        return self.verdict is not None and self.verdict.correct

    @property
    def layers_run(self) -> int:
        return sum(self.depths)


class Task(abc.ABC):
    """A source of problems with random access, and the judge of their completions.

    `problem(split, index)` depends on the task's own settings, the split and the index only, so a
    data cursor is a number and resuming is exact. `train` is learnt from, `val` is what training
    runs report and choose by, `test` what results report; they share no problem in substance.
    """

    name: str = ""  # make_task gives one that has none the name that config.task.name has
    time_limit: float = 60.0  # seconds that judging a batch may take

    def __init__(self, *, rewards: Rewards | None = None) -> None:
        self.rewards = Rewards() if rewards is None else rewards

    @abc.abstractmethod
    def problem(self, split: Split, index: int) -> Problem:
        """The problem at `index` (from 0; below `size(split)` where that is not None).

        A generated task raises NoMoreProblems where its val or test split has no further one.
        """

    def size(self, split: Split) -> int | None:
        """How many problems the split has; None, unless overridden, for a generated one."""
        check_split(split)
        return None

    @abc.abstractmethod
    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judges a completion's text (special tokens removed). Total: never raises on any text."""

    def judge(self, problems: Sequence[Problem], attempts: Sequence[Attempt]) -> list[Verdict]:
        """The verdict on an attempt at each problem."""
        return [
            self.verify(problem, self.answerable(attempt.text, cut=attempt.truncated))
            for problem, attempt in zip(problems, attempts, strict=True)
        ]

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        """Start and end of what marks the answer in a completion, the last `####`; None: nothing.

        Total.
        """
        start = text.rfind("####")
        return None if start < 0 else (start, start + len("####"))

    def answerable(self, completion: str, *, cut: bool) -> str:
        """What a completion is judged by: all of it, or nothing where it was cut off too early.

        `cut`: it ran into the limit of tokens. Then the last number or place in it is on the way to
        an answer, and only one that is marked has been given.
        """
        return "" if cut and self.answer_mark(completion) is None else completion

    def text_totals(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> dict[str, tuple[float, int]]:
        """Metrics of the chains of thought, beyond accuracy: sum and count of each.

        Totals of parts add up to those of the whole. None unless overridden.
        """
        return {}

    def verdict(self, kind: VerdictKind) -> Verdict:
        """The verdict of this kind with the task's own reward."""
        return Verdict(kind=kind, reward=float(getattr(self.rewards, kind)))


def turns(pairs: Iterable[tuple[str, str]]) -> tuple[Message, ...]:
    """Pairs of what the user and what the assistant says, as messages."""
    return tuple(
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    )


def conversation_fault(said: Any) -> str | None:
    """Why a prompt is neither a text nor messages that end with the user's, or None."""
    if isinstance(said, str):
        return None if said.strip() else "is empty"
    if not isinstance(said, Sequence) or not said:
        return "is neither a text nor chat messages"
    for message in said:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return f"has a message whose role is none of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return "has a message without a text as its content"
    return None if said[-1]["role"] == "user" else "does not end with the user's message"


def check_split(split: str) -> None:
    """Raises UserError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise UserError(f"a split is 'train', 'val' or 'test', got {split!r}; name one of them")


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the parts' text, equal in every process and Python version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(key: str) -> Split:
    """The split of the problem that `key` identifies: one in eight is `val`, one in eight `test`.

    Membership depends on the problem itself, not on how it was drawn, so no problem can occur on
    two sides whatever the seeds.
    """
    part = stable_hash("held out", key) % _PARTS
    return "test" if part == 0 else "val" if part == 1 else "train"


class Draw:
    """Random choices that are the same on every Python version.

    Only `random.Random.random` is promised to keep its sequence across versions; everything here
    is derived from it.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random(stable_hash(*key)).random

    def integer(self, low: int, high: int) -> int:
        """Uniform over low ... high, both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, options: Any) -> Any:
        """Uniform over a sequence."""
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[Any], count: int) -> tuple[Any, ...]:
        """`count` different places of a sequence, in random order."""
        left = list(options)
        return tuple(left.pop(self.integer(0, len(left) - 1)) for _ in range(count))

    def weighted(self, weights: Mapping[str, float]) -> str:
        """A key drawn in proportion to its weight."""
        point = self._random() * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return key  # rounding left the point at the very end: the last key
