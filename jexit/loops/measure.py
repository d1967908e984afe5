"""The measurements of an evaluation beyond accuracy: hazards, faithfulness, capacity, examples."""

from __future__ import annotations

import dataclasses
from typing import Any

from jexit.config import Config, EvalConfig, TaskConfig
from jexit.eval.begun_steps import BegunSteps, begun_steps
from jexit.eval.continuations import Reply, Sample
from jexit.eval.depth import Completion
from jexit.eval.exits import exit_quality
from jexit.eval.faithfulness import MEASURES, Measure, measured, policies_paired
from jexit.eval.hazards import Recorded, hazard_reliability, hazards_of
from jexit.eval.intervals import wilson_interval
from jexit.eval.scores import Scores, paired
from jexit.io.progress import Progress
from jexit.loops.decoder import Decoder, ModelCompleter
from jexit.loops.policies import Examination, evaluate_policy, policy_result
from jexit.loops.setup import load_task
from jexit.model import policies as halting
from jexit.results import PolicyResult
from jexit.steps.state import SplitModel
from jexit.tasks import ChainTask, Task

DIRECT = "at_once"  # the value of `task.steps` that asks for an answer without a chain


def check_measures(task: Task, names: tuple[str, ...]) -> None:
    """Raises ValueError for a measurement that the task cannot have."""
    if "capacity" in names and not granularities(task):
        raise ValueError(
            f"config.eval.measures has capacity, and task {task.name!r} cannot prescribe how much "
            "a step does; leave it out"
        )
    chains = [name for name in names if name in MEASURES]
    if chains and not isinstance(task, ChainTask):
        raise ValueError(
            f"config.eval.measures has {chains[0]}, and the completions of task {task.name!r} have "
            "no steps; leave it out"
        )


def granularities(task: Task) -> tuple[str, ...]:
    return task.granularities if isinstance(task, ChainTask) else ()


def _begins_steps(task: Task) -> bool:
    return isinstance(task, ChainTask) and bool(task.begun_sizes)


def policies_of(config: EvalConfig) -> tuple[str, ...]:
    """The policy that is measured, and full depth on the same weights."""
    return tuple(dict.fromkeys((config.measured, "full")))


def rounds(task: Task, config: EvalConfig) -> int:
    """How many steps of progress the measurements are."""
    names, policies = config.measures, len(policies_of(config))
    count = sum(name in names for name in ("exits", "hazards"))
    count += policies * bool(set(names) & set(MEASURES))
    if "capacity" in names:
        count += policies * (len(granularities(task)) + 1 + _begins_steps(task))
    return count


@dataclasses.dataclass
class Measurer:
    """What is measured of one model, from its completions and from new ones.

    `made` holds completions that there are already, by policy.
    """

    config: Config
    decoder: Decoder
    examination: Examination
    split: SplitModel
    exits: tuple[int, ...]
    positions: int
    made: dict[str, list[Completion]]

    def run(self, done: int, progress: Progress) -> dict[str, Any]:
        """The parts of `eval.json` that `eval.measures` names."""
        names, policies = self.config.eval.measures, policies_of(self.config.eval)
        parts: dict[str, list[dict[str, Any]]] = {}

        def add(part: str, entry: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            parts.setdefault(part, []).append(entry)
            progress.update(done, measure=part, policy=entry["policy"])

        if "exits" in names:
            add("exits", self._exits())
        if "hazards" in names:
            add("hazards", self._hazards(self.config.eval.measured))
        if chosen := [name for name in names if name in MEASURES]:
            by_policy: dict[str, list[Measure]] = {}
            for policy in policies:
                entry, by_policy[policy] = self._faithfulness(policy, chosen)
                add("faithfulness", entry)
            parts["faithfulness_paired"] = [
                {"policy": policy, "against": "full"} | pair
                for policy in policies[:-1]
                for pair in self._paired(policy, by_policy)
            ]
        if "capacity" in names:
            for granularity in (*granularities(self.examination.task), DIRECT):
                task_config = dataclasses.replace(self.config.task, steps=granularity)
                examination = self._examination(task_config)
                done_by_policy = {
                    policy: evaluate_policy(self.decoder, examination, policy)
                    for policy in policies
                }
                for policy, (result, made) in done_by_policy.items():
                    entry = _brief(result) | {
                        "granularity": granularity,
                        "accuracy_ci95": result.accuracy_ci95,
                        "step_size": result.text.get("step_size"),
                        **_obedience(examination, made),
                    }
                    if policy != "full":
                        pair = _accuracy_paired(made, done_by_policy["full"][1])
                        entry |= {
                            "less_full": pair["difference"],
                            "less_full_ci95": pair["difference_ci95"],
                        }
                    add("capacity", entry)
            if _begins_steps(self.examination.task):
                begun = {policy: self._begun_steps(policy) for policy in policies}
                parts["begun_steps"] = [
                    {"policy": policy} | tried.record(None if policy == "full" else full)
                    for policy, by_size in begun.items()
                    for tried, full in zip(by_size, begun["full"], strict=True)
                ]
                done += len(policies)
                progress.update(done, measure="begun_steps", policy=", ".join(policies))
        return parts

    def examples(self) -> list[dict[str, Any]]:
        """Completions for reading: each token with its depth and the hazards that it met."""
        examples = []
        for policy in self.config.eval.policies:
            made = self.made[policy][: self.config.eval.heat_maps]
            if not made:
                continue
            hazards = hazards_of(self._student, self._recorded(made), self._law(policy))
            for index, completion in enumerate(made):
                problem = self.examination.problems[index]
                examples.append(
                    {
                        "policy": policy,
                        "prompt": problem.prompt,
                        "completion": completion.text,
                        "tokens": self.examination.tokenizer.tokens(completion.ids),
                        "depths": completion.depths,
                        "hazards": hazards[index],
                        "verdict": completion.verdict,
                        "answer": problem.answer,
                    }
                )
        return examples

    @property
    def _student(self) -> tuple[Any, ...]:
        return self.split.decodable(self.split.trainable)

    def _law(self, policy: str) -> halting.Sample:
        """What makes a hazard of a logit: the sampler's temperature and floor, else σ(z)."""
        return self.decoder.law if policy == "sample" else halting.Sample()

    def _completions(self, policy: str) -> list[Completion]:
        if policy not in self.made:
            _, self.made[policy] = evaluate_policy(self.decoder, self.examination, policy)
        return self.made[policy]

    def _recorded(self, made: list[Completion]) -> Recorded:
        """Of the first problems' completions."""
        return Recorded(
            self.examination.prompts[: len(made)],
            [completion.ids for completion in made],
            [completion.depths for completion in made],
            self.examination.tokenizer.pad_id,
        )

    def _examination(self, task: TaskConfig) -> Examination:
        config = dataclasses.replace(self.config, task=task)
        return Examination.of(
            load_task(task, config.eval.split), self.examination.tokenizer, config
        )

    def _exits(self) -> dict[str, Any]:
        recorded = self._recorded(self._completions("full"))
        quality = exit_quality(self._student, self.exits, self.decoder.layers, recorded)
        return {"policy": "full"} | quality

    def _hazards(self, policy: str) -> dict[str, Any]:
        sft = self.config.sft
        return {"policy": policy} | hazard_reliability(
            self._student,
            self.split.decodable_teacher(self.split.trainable),
            self.exits,
            self._recorded(self._completions(policy)),
            self._law(policy),
            sharpness=sft.sharpness,
            target=sft.target,
        )

    def _faithfulness(self, policy: str, names: list[str]) -> tuple[dict[str, Any], list[Measure]]:
        task = self.examination.task
        assert isinstance(task, ChainTask)
        made = self._completions(policy)
        result = _brief(policy_result(policy, self.examination, made, self.decoder.layers))
        sample = Sample.of(
            task,
            self.examination.problems,
            [Reply(text=c.text, depths=c.depths, cut=c.truncated) for c in made],
            ModelCompleter(self.decoder, policy, self.positions),
            self.config.seed,
        )
        measures = measured(sample, names)
        return result | {"measures": [measure.record() for measure in measures]}, measures

    def _begun_steps(self, policy: str) -> list[BegunSteps]:
        """After prompts that ask for no size, whatever the evaluation's own ask for."""
        examination = self._examination(dataclasses.replace(self.config.task, steps="free"))
        assert isinstance(examination.task, ChainTask)
        completer = ModelCompleter(self.decoder, policy, self.positions)
        return begun_steps(examination.task, examination.problems, completer)

    def _paired(self, policy: str, by_policy: dict[str, list[Measure]]) -> list[dict[str, Any]]:
        """A policy less full depth on the problems that both have: accuracy and each measure."""
        accuracy = _accuracy_paired(self._completions(policy), self._completions("full"))
        measures = policies_paired(by_policy[policy], by_policy["full"], self.config.seed)
        return [{"measure": "accuracy"} | accuracy, *measures]


def _accuracy_paired(ours: list[Completion], theirs: list[Completion]) -> dict[str, Any]:
    """The accuracy of completions of the same problems, and its difference."""
    pair = paired(
        *(
            Scores.shares(range(len(made)), [float(completion.right) for completion in made])
            for made in (ours, theirs)
        )
    )
    assert pair is not None, "an examination has a problem"
    return pair


def _obedience(examination: Examination, made: list[Completion]) -> dict[str, Any]:
    """The share of completions with the steps that are prescribed, and the accuracy of those."""
    task = examination.task
    assert isinstance(task, ChainTask)
    pairs = zip(examination.problems, made, strict=True)
    right = [one.right for problem, one in pairs if task.obeys(problem, one.text)]
    return {
        "obeyed": len(right) / len(made),
        "accuracy_obeyed": sum(right) / len(right) if right else None,
        "accuracy_obeyed_ci95": wilson_interval(sum(right), len(right)) if right else None,
    }


def _brief(result: PolicyResult) -> dict[str, Any]:
    names = ("policy", "problems", "accuracy", "depth_fraction", "completion_length")
    return {name: getattr(result, name) for name in names}
