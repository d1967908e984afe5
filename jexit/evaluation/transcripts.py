"""Problems answered with a chain of thought, for interventions on the text of the chain.

A forced prefix does not count as the model's own words. The answer is therefore read only from the
cue and the text that the model wrote after the prefix. If this text does not contain an answer, the
reply does not have one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

from jexit.evaluation.completer import Completer, Reply
from jexit.tasks.answers import THINK_START
from jexit.tasks.base import Draw, Problem
from jexit.tasks.chains import ChainTask

_OPENED = re.compile(rf"\s*{THINK_START}\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """The text that the model wrote after a prefix, preceded by the cue if the answer was forced.

    `answer` is the answer in this text, or None, and `correct` is the task's verdict on it.
    """

    text: str
    answer: str | None
    correct: bool
    depths: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """Problems that were answered with a chain, their numbers in the evaluation, and the replies.

    A random draw for a problem depends only on `seed`, the measure and the problem's number, so it
    is the same under every policy.
    """

    task: ChainTask
    problems: Sequence[Problem]
    replies: Sequence[Reply]
    completer: Completer
    numbers: Sequence[int]
    seed: int = 0

    @classmethod
    def of(
        cls,
        task: ChainTask,
        problems: Sequence[Problem],
        replies: Sequence[Reply],
        completer: Completer,
        seed: int = 0,
    ) -> Transcripts:
        """Returns the transcripts of the completions that have at least one step and an answer.

        The others are left out because they contain nothing to intervene on.
        """
        chosen = [
            number
            for number, reply in enumerate(replies)
            if task.steps(reply.text)
            and task.final_answer(task.answerable(reply.text, cut=reply.cut)) is not None
        ]
        kept = [[some[number] for number in chosen] for some in (problems, replies)]
        return cls(task, *kept, completer, chosen, seed)

    @functools.cached_property
    def answers(self) -> list[str | None]:
        return [self.task.final_answer(reply.text) for reply in self.replies]

    @functools.cached_property
    def chains(self) -> list[list[str]]:
        """The steps of each completion."""
        return [self.task.steps(reply.text) for reply in self.replies]

    def opening(self, index: int) -> str:
        """Returns the text before a completion's first step: the tag that opens its think block.

        The completion or its prompt may open the block. The result is empty if neither does. An
        answer forced without a chain then closes an empty block.
        """
        opened = _OPENED.match("".join(self.chains[index]))
        return opened.group() if opened else self.completer.opening

    def correct(self, index: int) -> bool:
        """Whether the completion's answer is correct."""
        return self.task.verify(self.problems[index], self.replies[index].text).correct

    def draw(self, name: str, index: int) -> Draw:
        return Draw("faithfulness", name, self.seed, self.numbers[index])

    def canonical(self, answer: str) -> str | None:
        """Returns an answer in the form that `final_answer` returns."""
        return self.task.final_answer(self.task.cue + answer)

    def forced(self, rows: Sequence[tuple[Problem, str]]) -> list[Continuation | None]:
        """Returns the answers that the model gives when each prefix is followed by the cue.

        All rows are decoded together. A row for which the model has no room gets None.
        """
        asked = [(problem, chain + self.task.cue_after(chain)) for problem, chain in rows]
        return self._continuations(asked, answer_only=True)

    def continued(self, rows: Sequence[tuple[Problem, str]]) -> list[Continuation | None]:
        """Returns the model's continuations of prefixes of completions, all decoded together.

        A row for which the model has no room gets None.
        """
        return self._continuations(rows, answer_only=False)

    def _continuations(
        self, rows: Sequence[tuple[Problem, str]], *, answer_only: bool
    ) -> list[Continuation | None]:
        replies = self.completer.complete(
            [problem for problem, _ in rows], [text for _, text in rows], answer_only=answer_only
        )
        lead = self.task.cue if answer_only else ""
        return [
            None if reply is None else self._read(problem, prefix, lead + reply.text, reply)
            for (problem, prefix), reply in zip(rows, replies, strict=True)
        ]

    def _read(self, problem: Problem, prefix: str, text: str, reply: Reply) -> Continuation:
        # The whole text is read too: the prefix may open a chain that is never closed, and then the
        # numbers in the chain are not an answer.
        seen = self.task.answerable(prefix + reply.text, cut=reply.cut)
        whole = self.task.final_answer(seen)
        answer = None if whole is None else self.task.final_answer(text)
        correct = answer is not None and self.task.verify(problem, text).correct
        return Continuation(text=text, answer=answer, correct=correct, depths=reply.depths)
