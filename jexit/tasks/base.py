"""The interface of a task, which provides problems by index and judges any text without raising."""

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

_PARTS = 8  # of all generated problems: one part is the test split, one the validation split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its right answer.

    `prompt` is the user's message before any chat template is applied. `answer` is the right answer
    as text. `completion` is a reference completion without its end token, or None if the data has
    none. `earlier` contains the messages before the prompt: a system message, worked examples or
    earlier turns of a conversation. `fields` contains everything else that describes the problem,
    such as its operands or its template.
    """

    prompt: str
    answer: str
    completion: str | None = None
    earlier: tuple[Message, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation to complete: the earlier messages and then the prompt."""
        return (*self.earlier, {"role": "user", "content": self.prompt})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """The reward for each kind of verdict.

    The defaults follow arXiv:2603.21376, as far as they are published there.
    """

    strict: float = 1.0
    lenient: float = 0.5
    wrong: float = 0.0
    none: float = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of one completion.

    `kind` is `strict` for the right answer in the required format, `lenient` for the right answer
    if only the lenient parse found it, `wrong` for another answer in either format, and `none` if
    no answer was found. `parts` maps the names of a task's own reward functions to their rewards
    before weighting.
    """

    kind: VerdictKind
    reward: float
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def correct(self) -> bool:
        return self.kind in ("strict", "lenient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One completion of a prompt, with the depth of the pass that produced each token.

    `text` is the text to judge. It has no special tokens, and it starts with `<think>` if the
    prompt ends in `<think>`. `truncated` is whether the completion reached the token limit.
    `verdict` is None until the attempt is judged.
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
    """A source of problems that are accessed by index, and the judge of their completions.

    `problem(split, index)` depends only on the task's own settings, the split and the index. A data
    cursor is therefore a single number, and resuming is exact. The model learns from `train`.
    Training runs report on `val` and make their choices by it. Results are reported on `test`. The
    splits share no problem in substance.
    """

    name: str = ""  # make_task gives one that has none the name that config.task.name has
    time_limit: float = 60.0  # seconds that judging a batch may take
    judges_batches: bool = False  # True: judging one completion costs as much as a batch

    def __init__(self, *, rewards: Rewards | None = None) -> None:
        self.rewards = Rewards() if rewards is None else rewards

    @abc.abstractmethod
    def problem(self, split: Split, index: int) -> Problem:
        """Returns the problem at `index`, which counts from 0.

        `index` must be below `size(split)`, unless that is None. A generated task raises
        NoMoreProblems if its `val` or `test` split has no further problem.
        """

    def size(self, split: Split) -> int | None:
        """Returns the number of problems in the split, or None (the default) for generated ones."""
        check_split(split)
        return None

    @abc.abstractmethod
    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judges a completion's text, without special tokens. Must not raise on any text."""

    def judge(self, problems: Sequence[Problem], attempts: Sequence[Attempt]) -> list[Verdict]:
        """Judges one attempt at each problem and returns the verdicts in the same order."""
        return [
            self.verify(problem, self.answerable(attempt.text, cut=attempt.truncated))
            for problem, attempt in zip(problems, attempts, strict=True)
        ]

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        """Returns the start and the end of the text that marks a completion's answer, or None.

        The default is the last `####`. None means that no text marks an answer. Never raises.
        """
        start = text.rfind("####")
        return None if start < 0 else (start, start + len("####"))

    def answerable(self, completion: str, *, cut: bool) -> str:
        """Returns the text by which to judge a completion: all of it, or nothing if cut too early.

        `cut` is whether the completion reached the token limit. In that case its last number or
        place may be an intermediate result, so only a marked answer counts.
        """
        return "" if cut and self.answer_mark(completion) is None else completion

    def text_totals(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> dict[str, tuple[float, int]]:
        """Returns metrics of the chains of thought besides accuracy, each as a sum and a count.

        The totals of parts of a batch add up to those of the whole batch. By default, there are no
        metrics.
        """
        return {}

    def verdict(self, kind: VerdictKind) -> Verdict:
        """Returns the verdict of this kind with the task's own reward for it."""
        return Verdict(kind=kind, reward=float(getattr(self.rewards, kind)))


def turns(pairs: Iterable[tuple[str, str]]) -> tuple[Message, ...]:
    """Converts pairs of a user's text and an assistant's text into messages."""
    return tuple(
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    )


_HALF = "is not valid Unicode"


def is_unicode(text: str) -> bool:
    """Returns whether a string can be written as UTF-8, which half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def conversation_fault(said: Any) -> str | None:
    """Returns the reason why a prompt is invalid, or None if it is valid.

    A valid prompt is a text that is not blank, or a list of chat messages that ends with the
    user's.
    """
    if isinstance(said, str):
        return "is empty" if not said.strip() else None if is_unicode(said) else _HALF
    if not isinstance(said, Sequence) or not said:
        return "is neither a text nor chat messages"
    for message in said:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return f"has a message whose role is not one of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return "has a message whose content is not a text"
        if not is_unicode(message["content"]):
            return _HALF
    return None if said[-1]["role"] == "user" else "does not end with the user's message"


def check_split(split: str) -> None:
    """Raises UserError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise UserError(
            f"split is {split!r}, but it must be 'train', 'val' or 'test'; name one of them"
        )


def stable_hash(*parts: object) -> int:
    """Returns a 64-bit hash of the parts' text, equal in every process and Python version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(key: str) -> Split:
    """Returns the split of the problem that `key` identifies.

    One problem in eight is in `val`, and one in eight is in `test`. The split depends on the
    problem itself and not on how it was drawn, so no problem can occur in two splits, whatever the
    seeds.
    """
    part = stable_hash("held out", key) % _PARTS
    return "test" if part == 0 else "val" if part == 1 else "train"


class Draw:
    """A source of random choices that are the same on every Python version.

    Python guarantees a stable sequence across versions only for `random.Random.random`, so every
    method here is derived from it.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random(stable_hash(*key)).random

    def integer(self, low: int, high: int) -> int:
        """Returns an integer that is uniform between `low` and `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, options: Any) -> Any:
        """Returns an element of a sequence, drawn uniformly."""
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[Any], count: int) -> tuple[Any, ...]:
        """Returns the elements at `count` different places of a sequence, in random order."""
        left = list(options)
        return tuple(left.pop(self.integer(0, len(left) - 1)) for _ in range(count))

    def weighted(self, weights: Mapping[str, float]) -> str:
        """Returns a key, drawn with a probability proportional to its weight."""
        point = self._random() * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return key  # rounding left the point at the very end: the last key
