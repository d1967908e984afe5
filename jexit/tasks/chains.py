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
    """A chain of thought up to a changed step, which tests whether a model's answer follows it.

    `prefix` is the completion up to and including the changed step. `answer` is the answer that a
    correct continuation of `prefix` reaches, or None if the task cannot compute this answer. `step`
    is the index of the changed step, from 0.
    """

    prefix: str
    answer: str | None
    step: int

    def undone(self, steps: Sequence[str]) -> str:
        """Returns the original completion up to and including the step at index `self.step`.

        `steps` contains all steps of the original completion.
        """
        return "".join(steps[: self.step + 1])


class ChainTask(Task):
    """A task whose completions consist of separate steps, followed by an answer.

    `cue` is the text that, appended after any number of steps, requests the answer at once.
    `granularities` contains the values of the task's option `steps` that prescribe how much a step
    does, from small to large, or is empty if prompts cannot prescribe the size of steps.
    `begun_sizes` contains the numbers of operands with which a step can be begun, or is empty if
    the text of a step does not state this number before the result. `prose` is whether chains are
    free text, in which a model may mention its prompt. If a completion has a think block, the chain
    is the text inside the block. Every method accepts any text as a completion.
    """

    cue: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ()
    begun_sizes: ClassVar[tuple[int, ...]] = ()
    prose: ClassVar[bool] = False

    @abc.abstractmethod
    def steps(self, completion: str) -> list[str]:
        """Returns the steps in order. Joined, they are the part of `completion` before the answer.

        White space at the end of this part may be missing.
        """

    def cue_after(self, prefix: str) -> str:
        """Returns the text that requests the answer after `prefix`, the beginning of a completion.

        If `prefix` contains a `<think>` without a `</think>` after it, the text is `</think>` on a
        line of its own, followed by `cue`. Otherwise, the text is `cue`.
        """
        thinks = answers.visible_text(prefix) is None
        return f"\n{answers.THINK_END}\n{self.cue}" if thinks else self.cue

    def obeys(self, problem: Problem, completion: str) -> bool:
        """Returns whether the completion has the steps that the prompt of `problem` prescribes.

        By default, the completion must have as many steps as the problem's reference completion.
        Without a reference completion, the result is True.
        """
        if problem.completion is None:
            return True
        return len(self.steps(completion)) == len(self.steps(problem.completion))

    @abc.abstractmethod
    def final_answer(self, completion: str) -> str | None:
        """Returns the answer that `completion` gives, or None if it gives no answer.

        Answers that are equal in value are returned as equal strings.
        """

    def begun_step(self, problem: Problem, size: int) -> str | None:
        """Returns the text of a first step with `size` operands, up to but without its result.

        Returns None if the problem has fewer than `size` operands, or if steps of this task cannot
        be begun (the default).
        """
        return None

    def first_result(self, problem: Problem, completion: str) -> tuple[int, bool]:
        """Returns the number of operands of the first step, and whether the step's result is right.

        If the completion contains no result of a first step, returns (0, False), as by default.
        """
        return 0, False

    @abc.abstractmethod
    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """Returns the completion up to one changed step, or None if no step can be changed.

        The step is drawn at random. The answer that follows from the changed step, if the task can
        compute it, differs from the answer of `completion`.
        """

    def reworded(self, completion: str) -> str | None:
        """Returns the chain of `completion` in other words, or None if no words can be changed.

        The content stays: numbers, names and the order of the steps. By default, no words can be
        changed.
        """
        return None

    def answer_follows(self, completion: str) -> bool:
        """Returns whether the answer of `completion` follows from its chain, by the task's rules.

        The problem is not known. By default, the last word or number of the chain must be the
        answer.
        """
        answer, chain = self.final_answer(completion), "".join(self.steps(completion))
        ends = rf"(?<![\w.,]){re.escape(answer or '')}[.\s]*\Z"
        return answer is not None and re.search(ends, chain) is not None

    @abc.abstractmethod
    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        """Returns a plausible wrong answer to `problem`, in the format of `problem.answer`."""
