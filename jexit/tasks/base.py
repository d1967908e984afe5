"""The interface of tasks, which provide problems by index and judge completions."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from jexit.errors import UserError
from jexit.settings import is_unicode, shown

Split = Literal["train", "val", "test"]
VerdictKind = Literal["strict", "lenient", "wrong", "none"]

Message = Mapping[str, str]  # `role` (system, user or assistant) and `content`

NOT_UNICODE = "contains text that is not valid Unicode"
ROLES = ("system", "user", "assistant")
SPLITS: tuple[Split, ...] = get_args(Split)
VERDICT_KINDS: tuple[VerdictKind, ...] = get_args(VerdictKind)

_PARTS = 8  # of all generated problems: one part is the test split, one the validation split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its correct answer.

    `prompt` is the user's message, before a chat template is applied. `answer` is the correct
    answer. `completion` is a reference completion without end-of-sequence token, or None if there
    is none. `earlier` contains the chat messages before the prompt, such as worked examples.
    `fields` contains further data about the problem, such as its operands.
    """

    prompt: str
    answer: str
    completion: str | None = None
    earlier: tuple[Message, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.earlier, {"role": "user", "content": self.prompt})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """The reward for each kind of verdict; the defaults are those of arXiv:2603.21376."""

    strict: float = 1.0
    lenient: float = 0.5
    wrong: float = 0.0
    none: float = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of one completion.

    `kind` is `strict` for the correct answer in the required format, `lenient` for the correct
    answer in another format, `wrong` for another answer, and `none` if no answer was found.
    `reward` is the task's reward, before depth and length penalties. If the task has reward
    functions, `parts` maps the name of each function that did not return None to its unweighted
    reward.
    """

    kind: VerdictKind
    reward: float
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def correct(self) -> bool:
        return self.kind in ("strict", "lenient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One completion of a prompt, with the number of layers that ran for each token.

    `text` contains no special tokens, and starts with `<think>` if the prompt ends in `<think>`.
    `ids` contains the token ids. `depths` contains, for each token, the number of layers that ran
    to produce it. `truncated` is True if the completion reached the token limit. `verdict` is None
    until the completion is judged.
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
    """The base class of tasks, which provide problems by index and judge completions.

    `problem(split, index)` depends only on the task's settings, the split and the index, so a
    resumed run continues with exactly the problems that an uninterrupted run would see. The model
    learns from `train`, training runs choose checkpoints by `val`, and results are reported on
    `test`. No problem occurs in two splits, not even with other names or wording.
    """

    name: str = ""  # make_task gives one that has none the name that config.task.name has
    time_limit: float = 60.0  # seconds that judging a batch may take

    def __init__(self, *, rewards: Rewards | None = None) -> None:
        self.rewards = Rewards() if rewards is None else rewards

    @abc.abstractmethod
    def problem(self, split: Split, index: int) -> Problem:
        """Returns the problem at position `index` of `split`, counted from 0.

        A task that generates its problems raises NoMoreProblems if `val` or `test` does not contain
        enough distinct problems.
        """

    def size(self, split: Split) -> int | None:
        """Returns the number of problems in `split`, or None, the default, if it is unlimited."""
        check_split(split)
        return None

    @abc.abstractmethod
    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Returns the verdict on a completion without special tokens; must accept any text."""

    def judge(self, problems: Sequence[Problem], attempts: Sequence[Attempt]) -> list[Verdict]:
        """Returns a verdict for each attempt; attempt i is a completion of problem i.

        By default, calls `verify` on the text that `answerable` returns.
        """
        return [
            self.verify(problem, self.answerable(attempt.text, cut=attempt.truncated))
            for problem, attempt in zip(problems, attempts, strict=True)
        ]

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        """Returns the offsets (start, end) of the mark that introduces the answer, or None.

        By default, the mark is the last `####`. Must not raise for any text.
        """
        start = text.rfind("####")
        return None if start < 0 else (start, start + len("####"))

    def answerable(self, completion: str, *, cut: bool) -> str:
        """Returns the text by which to judge a completion: `completion` itself or an empty string.

        The result is empty if the completion reached the token limit (`cut`) and contains no answer
        mark, because its last number or place may then be an intermediate result.
        """
        return "" if cut and self.answer_mark(completion) is None else completion

    def text_totals(
        self, problems: Sequence[Problem], attempts: Sequence[Attempt]
    ) -> dict[str, tuple[float, int]]:
        """Returns the task's own metrics of judged attempts, as a dict from names to (sum, count).

        The value of a metric is its sum divided by its count, so the totals of several batches can
        be added. By default, a task has no metrics of its own.
        """
        return {}

    def verdict(self, kind: VerdictKind) -> Verdict:
        """Returns a verdict of the given kind, with the reward that `self.rewards` has for it."""
        return Verdict(kind=kind, reward=float(getattr(self.rewards, kind)))


def turns(pairs: Iterable[tuple[str, str]]) -> tuple[Message, ...]:
    """Converts pairs (user's text, assistant's text) into alternating chat messages."""
    return tuple(
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    )


def conversation_fault(said: Any) -> str | None:
    """Returns why `said` is not a valid prompt, or None if it is valid.

    The reason gives the value and the rule, and continues a sentence whose subject is the prompt. A
    valid prompt is a string that is not blank, or a sequence of chat messages whose last message is
    the user's; all texts must be valid Unicode.
    """
    if isinstance(said, str):
        if not said.strip():
            return "is empty, but it must contain text"
        return None if is_unicode(said) else NOT_UNICODE
    if not isinstance(said, Sequence) or not said:
        return f"is {shown(said)}, but it must be a text or a list of chat messages"
    for message in said:
        if not isinstance(message, Mapping):
            return f"contains the message {shown(message)}, but it must have a role and a content"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            allowed = ", ".join(ROLES)
            return f"has a message with the role {shown(role)}, but it must be one of {allowed}"
        if not isinstance(content, str):
            return f"has a message with the content {shown(content)}, but it must be a text"
        if not is_unicode(content):
            return NOT_UNICODE
    if role != "user":
        return f"ends with a message of the role {role!r}, but the last message must be the user's"
    return None


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(
            f"split is {split!r}, but it must be 'train', 'val' or 'test'; name one of them"
        )


def stable_hash(*parts: object) -> int:
    """Returns a hash of the parts as strings, an integer from 0 to 2⁶⁴ − 1.

    The hash is the same in every process and Python version.
    """
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(key: str) -> Split:
    """Returns the split of the problem that the string `key` identifies.

    A hash of `key` puts one eighth of all problems into `val`, one eighth into `test`, and the
    others into `train`. The split depends on nothing else, so no problem can occur in two splits.
    """
    part = stable_hash("held out", key) % _PARTS
    return "test" if part == 0 else "val" if part == 1 else "train"


class Draw:
    """A random generator, seeded with `key`, that gives the same draws in every Python version.

    Every method uses only `random.Random.random`, because Python guarantees that only this method
    returns the same numbers in every version.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random(stable_hash(*key)).random

    def integer(self, low: int, high: int) -> int:
        """Returns an integer from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, options: Any) -> Any:
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[Any], count: int) -> tuple[Any, ...]:
        left = list(options)
        return tuple(left.pop(self.integer(0, len(left) - 1)) for _ in range(count))

    def weighted(self, weights: Mapping[str, float]) -> str:
        """Returns a key of `weights` with a probability proportional to its weight."""
        point = self._random() * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return key  # rounding left the point at the very end: the last key
