"""Runs the measures that `config.eval.measures` lists, and selects completions for heat maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from flax import nnx

from jexit.config import Config
from jexit.evaluation.accuracy import Examination, evaluate_policy, policy_result
from jexit.evaluation.capacity import begun_steps, less_full, prescribed, scores_of
from jexit.evaluation.completer import ModelCompleter
from jexit.evaluation.decoder import Decoder
from jexit.evaluation.exits import exit_quality
from jexit.evaluation.faithfulness import MEASURES, Measured, measured, policies_paired
from jexit.evaluation.hazards import hazard_calibration, hazards_of
from jexit.evaluation.planning import planning
from jexit.evaluation.replay import Recorded
from jexit.evaluation.scores import paired
from jexit.evaluation.serial_depth import opaque_serial_depth
from jexit.evaluation.transcripts import Transcripts
from jexit.model.policies import Sample
from jexit.results import Completion, Faithfulness, Planning, Record
from jexit.steps.state import SplitModel
from jexit.tasks import Attempt, ChainTask

DIRECT = "at_once"  # the value of `task.steps` that requests an answer without a chain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurer:
    """Measures one model under the policy `config.eval.measured`, and at full depth.

    `attempts` caches the decoded attempts of each policy. `with_steps(granularity)` returns the
    problems with prompts that prescribe the size of steps, by the task's option `steps`. `split`
    contains student and teacher. `exits` contains the number of layers before each exit, and
    `positions` is the model's maximum sequence length.
    """

    config: Config
    decoder: Decoder
    examination: Examination
    with_steps: Callable[[str], Examination]
    split: SplitModel
    exits: tuple[int, ...]
    positions: int
    attempts: dict[str, list[Attempt]] = dataclasses.field(default_factory=dict)
    _faithful: dict[str, list[Measured]] = dataclasses.field(init=False, default_factory=dict)

    def parts(self) -> list[tuple[str, Callable[[], Sequence[Record]]]]:
        """Returns the sections of `eval.json` to fill, each with the function that measures it.

        The functions must be called in this order. If a section occurs several times, it contains
        the records of all its functions.
        """
        names, task = self.config.eval.measures, self.examination.task
        once = {
            "exits": self._exits,
            "hazards": self._hazards,
            "serial_depth": self._serial_depth,
        }
        parts: list[tuple[str, Callable[[], Sequence[Record]]]]
        parts = [(name, measure) for name, measure in once.items() if name in names]
        if "planning" in names:
            for policy in self._policies:
                parts.append(("planning", functools.partial(self._planning, policy)))
        if set(names) & set(MEASURES):
            for policy in self._policies:
                parts.append(("faithfulness", functools.partial(self._faithfulness, policy)))
            parts.append(("faithfulness_paired", self._faithfulness_paired))
        if "capacity" in names:
            assert isinstance(task, ChainTask)
            for granularity in (*task.granularities, DIRECT):
                parts.append(("capacity", functools.partial(self._capacity, granularity)))
            if task.begun_sizes:
                parts.append(("begun_steps", self._begun_steps))
        return parts

    def examples(self) -> list[Completion]:
        """Returns the first `config.eval.heat_maps` completions of each policy, for heat maps."""
        examples = []
        for policy in self.config.eval.policies:
            made = self.attempts[policy][: self.config.eval.heat_maps]
            if not made:
                continue
            parts = self.decoder.under(policy).parts
            hazards = hazards_of(parts, self._recorded(made), self._hazard_policy(policy))
            for problem, attempt, found in zip(
                self.examination.problems[: len(made)], made, hazards, strict=True
            ):
                examples.append(
                    Completion(
                        policy=policy,
                        prompt=problem.prompt,
                        completion=attempt.text,
                        tokens=self.examination.tokenizer.tokens(attempt.ids),
                        depths=attempt.depths,
                        hazards=found,
                        verdict=attempt.verdict.kind if attempt.verdict else "",
                        answer=problem.answer,
                    )
                )
        return examples

    @property
    def _policies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.config.eval.measured, "full")))

    @property
    def _student(self) -> tuple[Any, ...]:
        return self.split.decodable(self.split.trainable)

    def _hazard_policy(self, policy: str) -> Sample:
        """Returns the temperature and the lower bound of the hazards for `policy`.

        For `sample` they are the decoder's, and for other policies 1 and 0.
        """
        return self.decoder.sample if policy == "sample" else Sample()

    def _attempts(self, policy: str) -> list[Attempt]:
        if policy not in self.attempts:
            _, self.attempts[policy] = evaluate_policy(self.decoder, self.examination, policy)
        return self.attempts[policy]

    def _recorded(self, attempts: Sequence[Attempt]) -> Recorded:
        """Returns `attempts`, with their prompts, for another forward pass.

        The attempts must be those at the first problems of the examination, in order.
        """
        return Recorded(
            self.examination.prompts[: len(attempts)],
            [made.ids for made in attempts],
            [made.depths for made in attempts],
            self.examination.tokenizer.pad_id,
        )

    def _completer(self, policy: str) -> ModelCompleter:
        return ModelCompleter(self.decoder, policy, self.positions)

    def _exits(self) -> list[Record]:
        recorded = self._recorded(self._attempts("full"))
        return [exit_quality("full", self._student, self.exits, self.decoder.layers, recorded)]

    def _hazards(self) -> list[Record]:
        policy, sft = self.config.eval.measured, self.config.sft
        return [
            hazard_calibration(
                policy,
                self._student,
                self.split.decodable_teacher(self.split.trainable),
                self.exits,
                self._recorded(self._attempts(policy)),
                self._hazard_policy(policy),
                sharpness=sft.sharpness,
                target=sft.target,
            )
        ]

    def _serial_depth(self) -> list[Record]:
        policy, config = self.config.eval.measured, self.config
        length = config.task.max_prompt_tokens + config.eval.max_new_tokens
        model = nnx.merge(*self._student)
        return [opaque_serial_depth(policy, model, self._attempts(policy), length)]

    def _planning(self, policy: str) -> list[Planning]:
        recorded = self._recorded(self._attempts(policy))
        return planning(policy, self._student, self.exits, self.decoder.layers, recorded)

    def _faithfulness(self, policy: str) -> list[Record]:
        task, attempts = self.examination.task, self._attempts(policy)
        assert isinstance(task, ChainTask)
        problems, completer = self.examination.problems, self._completer(policy)
        transcripts = Transcripts.of(task, problems, attempts, completer, self.config.seed)
        names = [name for name in self.config.eval.measures if name in MEASURES]
        self._faithful[policy] = measured(transcripts, names)
        known = {made.result.name for made in self._faithful[policy]}
        if absent := [name for name in names if name not in known]:
            logging.warning(
                "Under %s, no completion of task %r can be changed for the measures %s, so they "
                "are left out.", policy, task.name, ", ".join(absent),
            )  # fmt: skip
        result = policy_result(policy, self.examination, attempts, self.decoder.layers)
        return [
            Faithfulness(
                policy=policy,
                problems=result.problems,
                accuracy=result.accuracy,
                depth_fraction=result.depth_fraction,
                completion_length=result.completion_length,
                measures=tuple(made.result for made in self._faithful[policy]),
            )
        ]

    def _faithfulness_paired(self) -> list[Record]:
        """Compares the measured policy with full depth on the problems measured under both.

        Returns the differences of the accuracy and of each measure; [] if the policy is full depth.
        """
        found: list[Record] = []
        for policy in self._policies[:-1]:
            scores = (scores_of(self._attempts(name)) for name in (policy, "full"))
            accuracy = paired(policy, "accuracy", *scores)
            assert accuracy is not None, "an examination has a problem"
            measures = self._faithful[policy], self._faithful["full"]
            found += [accuracy, *policies_paired(policy, *measures, self.config.seed)]
        return found

    def _capacity(self, granularity: str) -> list[Record]:
        examination = self.with_steps(granularity)
        by_policy = {
            policy: evaluate_policy(self.decoder, examination, policy) for policy in self._policies
        }
        return [*prescribed(granularity, examination, by_policy)]

    def _begun_steps(self) -> list[Record]:
        """Measures first steps of forced sizes, after prompts that prescribe no size."""
        examination = self.with_steps("free")
        task, problems = examination.task, examination.problems
        assert isinstance(task, ChainTask)
        begun = {
            policy: begun_steps(policy, task, problems, self._completer(policy))
            for policy in self._policies
        }
        return [
            entry if policy == "full" else less_full(entry, scores, full)
            for policy, by_size in begun.items()
            for (entry, scores), (_, full) in zip(by_size, begun["full"], strict=True)
        ]
