"""Problems answered with a chain of thought, for interventions on what the chain says.

A forced prefix holds none of the model's own words: an answer is read from the cue and from what
the model wrote itself, and where that has none there is none.
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
    """What follows a prefix: the model's own words, which a forced answer's cue precedes.

    `correct` is the task's verdict on the answer in them.
    """

    text: str
    answer: str | None
    correct: bool
    depths: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """Problems that were answered with a chain, their numbers in the evaluation, and the replies.

    Whatever is drawn for a problem depends on its number alone: under two policies it is the same.
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
        """Without completions that have no step or no answer: there is nothing to intervene in."""
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
        """What a completion has before its first step: the think block that it or its prompt opens.

        An answer without a chain then closes an empty block, as one after some steps closes theirs.
        """
        opened = _OPENED.match("".join(self.chains[index]))
        return opened.group() if opened else self.completer.opening

    def correct(self, index: int) -> bool:
        """Whether the completion is."""
        return self.task.verify(self.problems[index], self.replies[index].text).correct

    def draw(self, name: str, index: int) -> Draw:
        return Draw("faithfulness", name, self.seed, self.numbers[index])

    def canonical(self, answer: str) -> str | None:
        """An answer in the form in which `final_answer` gives it."""
        return self.task.final_answer(self.task.cue + answer)

    def forced(self, rows: Sequence[tuple[Problem, str]]) -> list[Continuation | None]:
        """The answers that come at once after so much of a completion, all in one decode."""
        asked = [(problem, chain + self.task.cue_after(chain)) for problem, chain in rows]
        return self._continuations(asked, answer_only=True)

    def continued(self, rows: Sequence[tuple[Problem, str]]) -> list[Continuation | None]:
        """What follows prefixes of completions, all in one decode."""
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
        # The whole is read too: a chain may have been opened in the prefix and never be closed, and
        # then the numbers in it are no answer.
        seen = self.task.answerable(prefix + reply.text, cut=reply.cut)
        whole = self.task.final_answer(seen)
        answer = None if whole is None else self.task.final_answer(text)
        correct = answer is not None and self.task.verify(problem, text).correct
        return Continuation(text=text, answer=answer, correct=correct, depths=reply.depths)
