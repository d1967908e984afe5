"""Evaluates a model on a task under halting policies, and runs the measures of `eval.measures`."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jexit.config import Config, control_of
from jexit.dist import is_primary
from jexit.evaluation.accuracy import Examination, check_room, evaluate_policy
from jexit.evaluation.compare import PROBLEMS, write_problems
from jexit.evaluation.completer import ModelCompleter
from jexit.evaluation.controls import compared, evaluate_control
from jexit.evaluation.finished import FinishedPolicies
from jexit.evaluation.measures import Measurer
from jexit.evaluation.tables import print_evaluation
from jexit.io.files import write_json_atomic
from jexit.io.fingerprint import fingerprint
from jexit.io.progress import Progress
from jexit.io.workdir import start_run
from jexit.loops.flops import ModelFlops
from jexit.loops.pictures import draw
from jexit.loops.setup import load_model, load_task, make_decoder, with_trained_exits
from jexit.model.policies import check_policy
from jexit.results import VERSION, Evaluation
from jexit.steps.state import split_model
from jexit.tasks import check_measures


def evaluate(config: Config, workdir: pathlib.Path) -> None:
    """Evaluates the policies `eval.policies`, then runs the measures `eval.measures`.

    Writes `eval.json`, `problems.csv`, `completions.json` and a report to `workdir`. A first
    `eval.json`, in which `complete` is false, is written before the measures start. For a model
    from a training run, the hazard settings of that run replace those of `config`.
    """
    given, config = config, with_trained_exits(config)
    measurer, flops = _open(config)
    decoder, examination, attempts = measurer.decoder, measurer.examination, measurer.attempts
    start_run(workdir, given)
    policies, parts = config.eval.policies, measurer.parts()
    finished = FinishedPolicies(workdir / "policies", fingerprint(decoder.parts), examination)
    with Progress(len(policies) + len(parts), description="eval") as progress:
        results = []
        for policy in policies:
            if known := finished.read(policy):
                result, attempts[policy] = known
            else:
                if of := control_of(policy):
                    made = evaluate_control(decoder, examination, policy, attempts[of])
                else:
                    made = evaluate_policy(decoder, examination, policy)
                result, attempts[policy] = made
                compute = flops.compute_fraction(result)
                result = result.model_copy(update={"compute_fraction": compute})
                finished.write(policy, result, attempts[policy])
            results.append(result)
            shown = {"accuracy": result.accuracy, "depth/fraction": result.depth_fraction}
            progress.update(len(results), policy=policy, **shown)
        written: dict[str, Any] = {
            "version": VERSION,
            "complete": False,
            "task": dataclasses.asdict(config.task),
            "split": config.eval.split,
            "model": {"path": config.model.path, "layers": decoder.layers, "exits": measurer.exits},
            "runs": results,
            "controls": [
                compared(of, policy, attempts[of], attempts[policy], decoder.layers, config.seed)
                for policy in policies
                if (of := control_of(policy))
            ],
        }
        evaluation, examples = Evaluation(**written), measurer.examples()
        if is_primary():
            decoded = {policy: attempts[policy] for policy in policies}
            write_problems(workdir / PROBLEMS, examination.problems, decoded)
            evaluation.write(workdir / "eval.json")
            kept = [example.model_dump(exclude_unset=True) for example in examples]
            write_json_atomic(workdir / "completions.json", kept)
        for done, (part, measure) in enumerate(parts, start=len(policies) + 1):
            written.setdefault(part, []).extend(measure())
            progress.update(done, measure=part)
    evaluation = Evaluation(**written | {"complete": True})
    if not is_primary():
        return
    evaluation.write(workdir / "eval.json")
    finished.clear()
    print_evaluation(evaluation)
    print(f"Wrote {workdir / 'eval.json'}")
    print(f"Drew {draw(workdir)}")


def _open(config: Config) -> tuple[Measurer, ModelFlops]:
    """Loads model and task, and returns the objects that run the measures and count the FLOPs.

    Raises UserError if a policy or measure of `config` cannot run.
    """
    task = load_task(config.task, config.eval.split)
    check_measures(task, config.eval.measures)
    model, tokenizer = load_model(config, trains=False)
    examination = Examination.of(task, tokenizer, config)
    positions = model.arch.max_positions
    check_room(examination.prompts, "eval", config.eval.max_new_tokens, positions)
    split = split_model(model, full=False)
    parts = split.decodable(split.trainable)
    decoder = make_decoder(config, parts, model.arch.layers, tokenizer)
    for policy in (*config.eval.policies, config.eval.measured):
        if control_of(policy) is None:
            check_policy(decoder.policy(policy), (*model.exit_layers, model.arch.layers))
    if {"filler", "substantivity"} & set(config.eval.measures):
        # Raises UserError if the tokenizer cannot write filler.
        ModelCompleter(decoder, config.eval.measured, positions).filler("")

    def with_steps(steps: str) -> Examination:
        options = config.task.options | {"steps": steps}
        task_config = dataclasses.replace(config.task, options=options)
        task = load_task(task_config, config.eval.split)
        return Examination.of(task, tokenizer, dataclasses.replace(config, task=task_config))

    measurer = Measurer(
        config=config,
        decoder=decoder,
        examination=examination,
        with_steps=with_steps,
        split=split,
        exits=tuple(model.exit_layers),
        positions=positions,
    )
    return measurer, ModelFlops.of(model, full=False)
