"""The interface of tasks whose chains of thought can be split into steps and changed.

Changed steps serve to measure faithfulness: whether the answer depends on the written steps.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from jexit.tasks import answers
from jexit.tasks.base import Draw, Problem, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
    """A completion up to and including a changed step, which tests whether the answer follows it.

    `answer` is what a correct continuation of `prefix` answers, or None if the task cannot compute
    it. `step` is the index of the changed step, from 0.
    """

    prefix: str
    answer: str | None
    step: int

    def undone(self, steps: Sequence[str]) -> str:
        """Returns the same part of the original completion, which has these `steps`."""
        return "".join(steps[: self.step + 1])


class ChainTask(Task):
    """A task whose completions consist of separate steps, followed by an answer.

    `cue` is the text that requests the answer after any number of steps. `granularities` contains
    the values of the option `steps` that prescribe the size of steps, from small to large.
    `begun_sizes` contains the numbers of operands with which a step can be begun, if the text of a
    step states this number before the result. `prose` is whether chains are free text, in which a
    model may mention its prompt. In a completion with a think block, the chain is the text inside
    the block. Every method accepts any text as a completion.
    """

    cue: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ()
    begun_sizes: ClassVar[tuple[int, ...]] = ()
    prose: ClassVar[bool] = False

    @abc.abstractmethod
    def steps(self, completion: str) -> list[str]:
        """Returns the steps; joined, they are the part of `completion` before the answer.

        White space at the end of this part may be missing.
        """

    def cue_after(self, prefix: str) -> str:
        """Returns the text that requests the answer after `prefix`.

        This is `cue`, after a `</think>` on a line of its own if `prefix` is in a think block.
        """
        thinks = answers.visible_text(prefix) is None
        return f"\n{answers.THINK_END}\n{self.cue}" if thinks else self.cue

    def obeys(self, problem: Problem, completion: str) -> bool:
        """Returns whether the completion has the steps that the prompt prescribes.

        By default, it must have as many steps as the reference completion, if there is one.
        """
        if problem.completion is None:
            return True
        return len(self.steps(completion)) == len(self.steps(problem.completion))

    @abc.abstractmethod
    def final_answer(self, completion: str) -> str | None:
        """Returns the answer that `completion` gives, or None; equal values are equal strings."""

    def begun_step(self, problem: Problem, size: int) -> str | None:
        """Returns the text of a first step with `size` operands before its result, or None."""
        return None

    def first_result(self, problem: Problem, completion: str) -> tuple[int, bool]:
        """Returns the first step's operands and whether its result is correct, or (0, False)."""
        return 0, False

    @abc.abstractmethod
    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """Returns the completion up to one changed step, drawn at random, or None.

        The answer that follows, if the task can compute it, differs from that of `completion`.
        """

    def reworded(self, completion: str) -> str | None:
        """Returns the chain in other words, with all numbers and names in their order, or None."""
        return None

    def answer_follows(self, completion: str) -> bool:
        """Returns whether the answer of `completion` follows from its chain, by the task's rules.

        The problem is not known. By default, the chain must end in the answer.
        """
        answer, chain = self.final_answer(completion), "".join(self.steps(completion))
        ends = rf"(?<![\w.,]){re.escape(answer or '')}[.\s]*\Z"
        return answer is not None and re.search(ends, chain) is not None

    @abc.abstractmethod
    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        """Returns a plausible wrong answer to `problem`, in the format of `problem.answer`."""
