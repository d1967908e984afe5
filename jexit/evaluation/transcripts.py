"""Problems answered with a chain of thought, for interventions on the text of the chain.

An intervention forces a prefix of a completion. The model did not write this prefix, so the answer
is read only from the text after it. If the answer was forced, this text begins with the cue, which
requests the answer. If the text contains no answer, the reply has none.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

from jexit.evaluation.completer import ModelCompleter
from jexit.tasks.answers import THINK_START
from jexit.tasks.base import Attempt, Draw, Problem
from jexit.tasks.chains import ChainTask

_OPENED = re.compile(rf"\s*{THINK_START}\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """The text that the model wrote after a forced prefix, and the answer in this text, if any.

    If the answer was forced, `text` begins with the cue, the text that requests the answer.
    `correct` is the task's verdict.
    """

    text: str
    answer: str | None
    correct: bool
    depths: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """Problems that the model answered with a chain of thought, and the model's replies.

    `completer` writes the text after forced prefixes. `numbers` contains the index of each problem
    in the evaluation. A random draw depends only on this index, on `seed` and on the measure, so
    draws are the same under every policy.
    """

    task: ChainTask
    problems: Sequence[Problem]
    replies: Sequence[Attempt]
    completer: ModelCompleter
    numbers: Sequence[int]
    seed: int = 0

    @classmethod
    def of(
        cls,
        task: ChainTask,
        problems: Sequence[Problem],
        replies: Sequence[Attempt],
        completer: ModelCompleter,
        seed: int = 0,
    ) -> Transcripts:
        """Returns the transcripts of the completions that have at least one step and an answer."""
        chosen = [
            number
            for number, reply in enumerate(replies)
            if task.steps(reply.text)
            and task.final_answer(task.answerable(reply.text, cut=reply.truncated)) is not None
        ]
        kept = [[some[number] for number in chosen] for some in (problems, replies)]
        return cls(task, *kept, completer, chosen, seed)

    @functools.cached_property
    def answers(self) -> list[str | None]:
        return [self.task.final_answer(reply.text) for reply in self.replies]

    @functools.cached_property
    def chains(self) -> list[list[str]]:
        return [self.task.steps(reply.text) for reply in self.replies]

    def opening(self, index: int) -> str:
        """Returns the text before a completion's first step: the tag that opens the think block.

        The tag comes from the completion `index` or from its prompt; without a tag, the result is
        empty. If an answer is forced directly after the tag, the block is closed first.
        """
        opened = _OPENED.match("".join(self.chains[index]))
        return opened.group() if opened else self.completer.opening

    def correct(self, index: int) -> bool:
        return self.task.verify(self.problems[index], self.replies[index].text).correct

    def draw(self, name: str, index: int) -> Draw:
        return Draw("faithfulness", name, self.seed, self.numbers[index])

    def canonical(self, answer: str) -> str | None:
        """Returns the normal form of `answer`, which equal answers share.

        Returns None if the task cannot read `answer` as an answer.
        """
        return self.task.final_answer(self.task.cue + answer)

    def forced(self, rows: Sequence[tuple[Problem, str]]) -> list[Reply | None]:
        """Returns the model's answer to each (problem, prefix) after the cue that requests it.

        An entry is None if prompt and prefix are too long to leave room for an answer.
        """
        asked = [(problem, chain + self.task.cue_after(chain)) for problem, chain in rows]
        return self.continued(asked, answer_only=True)

    @functools.cached_property
    def answer_texts(self) -> list[str | None]:
        """The text of each completion's answer after the cue, the text that requests the answer.

        An entry is None if the answer does not follow the cue.
        """
        texts: list[str | None] = []
        for reply, answer in zip(self.replies, self.answers, strict=True):
            _, cue, text = reply.text.rpartition(self.task.cue.strip())
            gap = self.task.cue[len(self.task.cue.rstrip()) :]
            text = text.removeprefix(gap).rstrip()
            there = cue and text and self.task.final_answer(self.task.cue + text) == answer
            texts.append(text if there else None)
        return texts

    def log_likelihoods(self, rows: Sequence[tuple[int, str]]) -> list[float | None]:
        """Returns the log-likelihood in nats of each completion's own answer after another chain.

        A row contains the index of a completion and the chain of thought that replaces its chain.
        An entry is None if the text is too long, or if `answer_texts` is None for the completion.
        """
        there = [(index, chain) for index, chain in rows if self.answer_texts[index] is not None]
        found = iter(
            self.completer.log_likelihoods(
                [self.problems[index] for index, _ in there],
                [chain + self.task.cue_after(chain) for _, chain in there],
                [self.answer_texts[index] or "" for index, _ in there],
            )
        )
        return [None if self.answer_texts[index] is None else next(found) for index, _ in rows]

    def continued(
        self, rows: Sequence[tuple[Problem, str]], *, answer_only: bool = False
    ) -> list[Reply | None]:
        """Returns the model's continuation of each (problem, prefix); all are decoded together.

        With `answer_only`, the prefixes end in the cue, which requests the answer, and only answers
        are decoded. An entry is None if prompt and prefix are too long to leave room for an answer.
        """
        replies = self.completer.complete(
            [problem for problem, _ in rows], [text for _, text in rows], answer_only=answer_only
        )
        lead = self.task.cue if answer_only else ""
        return [
            None if reply is None else self._read(problem, prefix, lead + reply.text, reply)
            for (problem, prefix), reply in zip(rows, replies, strict=True)
        ]

    def _read(self, problem: Problem, prefix: str, text: str, attempt: Attempt) -> Reply:
        # The whole text is read too: the prefix may open a chain that is never closed, and then the
        # numbers in the chain are not an answer.
        seen = self.task.answerable(prefix + attempt.text, cut=attempt.truncated)
        whole = self.task.final_answer(seen)
        answer = None if whole is None else self.task.final_answer(text)
        correct = answer is not None and self.task.verify(problem, text).correct
        return Reply(text=text, answer=answer, correct=correct, depths=attempt.depths)
