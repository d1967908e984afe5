"""The interface of tasks whose chains of thought can be read and edited to measure faithfulness."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jexit.tasks import answers
from jexit.tasks.base import Draw, Problem, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
    """A chain of thought with one changed step.

    `prefix` is the completion up to and including the changed step. `answer` is the answer that
    follows if the rest is worked out correctly from there, or None if the task cannot know it.
    `step` is the index of the changed step, from 0.
    """

    prefix: str
    answer: str | None
    step: int

    def undone(self, steps: Sequence[str]) -> str:
        """Returns the original completion up to and including this step, given all its `steps`."""
        return "".join(steps[: self.step + 1])


class ChainTask(Task):
    """A task whose completions consist of separate steps and then an answer.

    `cue` is the text that requests the answer at once, after any number of steps. `granularities`
    are the values of the option `steps` that prescribe how much a step does, from small to large.
    The tuple is empty if prompts cannot prescribe this. `begun_sizes` are the numbers of operands
    with which a step can be begun. The tuple is empty if the text of a step does not state this
    number before the result. `prose` is whether chains are free text, in which a model may mention
    its prompt. If a completion has a think block, the chain is the text inside it. Every method
    accepts any text as a completion.
    """

    cue: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ()
    begun_sizes: ClassVar[tuple[int, ...]] = ()
    prose: ClassVar[bool] = False

    @abc.abstractmethod
    def steps(self, completion: str) -> list[str]:
        """Returns the steps in order. Joined, they are the completion up to its answer's cue."""

    def cue_after(self, prefix: str) -> str:
        """Returns the text that requests the answer after the beginning `prefix` of a completion.

        This is `cue`, with `</think>` before it if the prefix leaves a think block open.
        """
        thinks = answers.visible_text(prefix) is None
        return f"\n{answers.THINK_END}\n{self.cue}" if thinks else self.cue

    def obeys(self, problem: Problem, completion: str) -> bool:
        """Returns whether the chain has the steps that the prompt prescribes.

        By default, the chain must have the same number of steps as the problem's reference
        completion. Without a reference completion, the result is True.
        """
        if problem.completion is None:
            return True
        return len(self.steps(completion)) == len(self.steps(problem.completion))

    @abc.abstractmethod
    def final_answer(self, completion: str) -> str | None:
        """Returns the answer that a completion gives, or None if it gives none.

        Equal answers are returned as equal texts.
        """

    def begun_step(self, problem: Problem, size: int) -> str | None:
        """Returns the start of a completion whose first step has `size` operands, up to its result.

        Returns None if the problem has fewer operands or if steps cannot be begun.
        """
        return None

    def first_result(self, problem: Problem, completion: str) -> tuple[int, bool]:
        """Returns the number of operands of the first step, and whether its result is right.

        The number is 0 if there is no result.
        """
        return 0, False

    @abc.abstractmethod
    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """Returns the completion up to one changed step, or None if no step can be changed.

        The step is drawn at random. Its change leads to another answer than the completion's.
        """

    @abc.abstractmethod
    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        """Returns a plausible wrong answer, in the form of `problem.answer`."""
