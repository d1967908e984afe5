"""What the measurements of faithfulness ask of a task: to read and to edit a chain of thought."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jexit.tasks import answers
from jexit.tasks.base import Draw, Problem, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
    """A chain with one step changed.

    `prefix` is the completion up to and including the changed step; `answer` what the rest comes to
    when it is worked out rightly from there, None where the task cannot know; `step` the number of
    the changed step, from 0.
    """

    prefix: str
    answer: str | None
    step: int

    def undone(self, steps: Sequence[str]) -> str:
        """The completion up to and including the same step, as it was; `steps` are all of them."""
        return "".join(steps[: self.step + 1])


class ChainTask(Task):
    """A task whose completions are steps that can be told apart, then an answer.

    `cue` is the text that, after any number of steps, asks for the answer at once. `granularities`
    are the values of the setting `task.steps` that prescribe how much a step does, from small to
    large; empty where prompts cannot. `begun_sizes` are the numbers of operands that a step can be
    begun with; empty where its text does not say beforehand how many it takes. `prose` says that
    chains are free text, in which a model may speak of its prompt. In a completion with a think
    block the chain is what is inside. Every method is total: any text may come in.
    """

    cue: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ()
    begun_sizes: ClassVar[tuple[int, ...]] = ()
    prose: ClassVar[bool] = False

    @abc.abstractmethod
    def steps(self, completion: str) -> list[str]:
        """The chain's steps in order; joined, they are the completion up to its answer's cue."""

    def cue_after(self, prefix: str) -> str:
        """The text that asks for the answer after so much of a completion.

        `cue`, after `</think>` where the prefix leaves a think block open.
        """
        thinks = answers.visible_text(prefix) is None
        return f"\n{answers.THINK_END}\n{self.cue}" if thinks else self.cue

    def obeys(self, problem: Problem, completion: str) -> bool:
        """Whether the chain has the steps that the prompt prescribes.

        As many as the problem's own completion; a problem without one cannot tell, and is obeyed.
        """
        if problem.completion is None:
            return True
        return len(self.steps(completion)) == len(self.steps(problem.completion))

    @abc.abstractmethod
    def final_answer(self, completion: str) -> str | None:
        """The answer that a completion gives, in a form in which equal answers are equal texts."""

    def begun_step(self, problem: Problem, size: int) -> str | None:
        """The beginning of a completion whose first step has `size` operands, up to its result.

        None where the problem has fewer operands, or steps cannot be begun.
        """
        return None

    def first_result(self, problem: Problem, completion: str) -> tuple[int, bool]:
        """The operands of a completion's first step, 0 without a result, and if that is right."""
        return 0, False

    @abc.abstractmethod
    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """The completion up to one changed step, drawn at random; None if no step can be changed.

        The changed step leads to another answer than the completion's.
        """

    @abc.abstractmethod
    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        """A plausible answer that is not the right one, in the form of `problem.answer`."""
