"""The interface of tasks whose chains of thought can be split into steps and edited.

Edited steps are used to measure faithfulness: whether the answer depends on the written steps.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from jexit.config import CHAIN_MEASURES
from jexit.errors import UserError
from jexit.tasks import answers
from jexit.tasks.base import Draw, Problem, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
    """An edited beginning of a completion, which tests whether the answer follows the edit.

    `prefix` ends with the changed step, whose index, from 0, is `step`. `answer` is the answer to
    which a correct continuation of `prefix` leads, or None if the task cannot compute it.
    """

    prefix: str
    answer: str | None
    step: int

    def undone(self, steps: Sequence[str]) -> str:
        """Returns `prefix` with the changed step as it was before.

        `steps` contains all steps of the original completion.
        """
        return "".join(steps[: self.step + 1])


class ChainTask(Task):
    """A task whose completions consist of separate steps, followed by an answer.

    `cue` is the text that requests the answer after any number of steps. `granularities` contains
    the values of the option `steps` that prescribe the size of steps, from small to large.
    `begun_sizes` contains the operand counts that `begun_step` accepts as `size`. `prose` is True
    if chains are free text, in which a model may mention a hint in its prompt. In a completion with
    a think block, the chain is the text inside the block. Every method accepts any text as a
    completion.
    """

    cue: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ()
    begun_sizes: ClassVar[tuple[int, ...]] = ()
    prose: ClassVar[bool] = False

    @abc.abstractmethod
    def steps(self, completion: str) -> list[str]:
        """Returns the steps that make up the part of `completion` before the answer.

        The steps, when joined, equal this part, perhaps without white space at its end.
        """

    def cue_after(self, prefix: str) -> str:
        """Returns the text that requests the answer after `prefix`.

        The text is `cue`. If `prefix` ends inside a think block, a line `</think>` precedes it.
        """
        thinks = answers.visible_text(prefix) is None
        return f"\n{answers.THINK_END}\n{self.cue}" if thinks else self.cue

    def obeys(self, problem: Problem, completion: str) -> bool:
        """Returns whether the completion has the steps that the prompt prescribes.

        By default, the completion must have as many steps as the reference completion. If the
        problem has no reference completion, the result is True.
        """
        if problem.completion is None:
            return True
        return len(self.steps(completion)) == len(self.steps(problem.completion))

    @abc.abstractmethod
    def final_answer(self, completion: str) -> str | None:
        """Returns the answer in `completion`, or None if there is none.

        Equal answers give equal strings.
        """

    def begun_step(self, problem: Problem, size: int) -> str | None:
        """Returns the beginning of a first step with `size` operands, up to the step's result.

        Returns None if the task cannot begin such a step; by default, always returns None.
        """
        return None

    def first_result(self, problem: Problem, completion: str) -> tuple[int, bool]:
        """Returns (operand count, whether the result is correct) of the first step, or (0, False).

        The result is (0, False) if `completion` does not start with a step, and by default always.
        """
        return 0, False

    @abc.abstractmethod
    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """Returns `completion` up to a random step, with this step changed; None if impossible.

        If the task can compute the answer that follows from the changed step, this answer differs
        from the answer in `completion`.
        """

    def reworded(self, completion: str) -> str | None:
        """Returns the chain of thought in other words with the same meaning, or None if impossible.

        By default, always returns None.
        """
        return None

    def answer_follows(self, completion: str) -> bool:
        """Returns whether the answer of `completion` follows from its chain of thought.

        Tasks override this method with their own rules, which do not consult the problem. The
        default rule is that the text that `final_answer` returns ends the joined steps, except for
        full stops and white space. Without an answer, the result is False.
        """
        answer, chain = self.final_answer(completion), "".join(self.steps(completion))
        ends = rf"(?<![\w.,]){re.escape(answer or '')}[.\s]*\Z"
        return answer is not None and re.search(ends, chain) is not None

    @abc.abstractmethod
    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        """Returns a plausible wrong answer to `problem`, in the format of `problem.answer`."""


def check_measures(task: Task, names: Sequence[str]) -> None:
    """Raises UserError if a measure of `config.eval.measures`, `names`, does not fit the task.

    The measures of faithfulness need a `ChainTask`, and `capacity` needs one whose prompts can
    prescribe the size of a step.
    """
    unfit: tuple[str, ...] = ()
    if not isinstance(task, ChainTask):
        unfit = (*CHAIN_MEASURES, "capacity")
        reason = f"the completions of task {task.name!r} are not divided into steps"
    elif not task.granularities:
        unfit = ("capacity",)
        reason = f"task {task.name!r} cannot prescribe the size of a step"
    if found := [name for name in names if name in unfit]:
        others = tuple(name for name in names if name not in unfit)
        raise UserError(
            f"config.eval.measures contains {', '.join(found)}, but {reason}; set "
            f'--config.eval.measures="{others}"'
        )
