"""What a model does on a task under halting policies, and what can be measured of it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jexit.config import Config, control_of
from jexit.dist import is_primary
from jexit.eval.depth import compared
from jexit.io.metrics import write_json_atomic
from jexit.io.progress import Progress, closing_table
from jexit.io.workdir import start_run
from jexit.loops.decoder import Decoder, ModelCompleter
from jexit.loops.flops import ModelFlops
from jexit.loops.measure import Measurer, check_measures, rounds
from jexit.loops.pictures import draw
from jexit.loops.policies import (
    Examination,
    check_room,
    evaluate_control,
    evaluate_policy,
)
from jexit.loops.setup import (
    engine_size,
    load_model,
    load_task,
    sampling_law,
    with_trained_law,
)
from jexit.results import VERSION, Evaluation, PolicyResult
from jexit.steps.state import split_model


def evaluate(config: Config, workdir: pathlib.Path) -> None:
    """Runs `eval.policies` and `eval.measures`; writes `eval.json`, completions and a report.

    What the policies gave is on the disk before the measures start, with `complete` false. A run's
    model is measured under the law of depths that it trained with, whatever the config says.
    """
    given, config = config, with_trained_law(config)
    task = load_task(config.task, config.eval.split)
    check_measures(task, config.eval.measures)
    model, tokenizer = load_model(config, trains=False)
    examination = Examination.of(task, tokenizer, config)
    positions = model.arch.max_positions
    check_room(examination.prompts, "eval", config.eval.max_new_tokens, positions)
    split, flops = split_model(model, full=False), ModelFlops.of(model, full=False)
    decoder = Decoder(
        parts=split.decodable(split.trainable),
        layers=model.arch.layers,
        tokenizer=tokenizer,
        law=sampling_law(config),
        size=engine_size(config),
        temperature=config.eval.temperature,
        max_new_tokens=config.eval.max_new_tokens,
        seed=config.seed,
    )
    for policy in (*config.eval.policies, config.eval.measured):
        if control_of(policy) is None:
            decoder.policy(policy, 1, 1)  # refuse a wrong one before the first runs
    if "filler" in config.eval.measures:
        # Refuse a tokenizer without.
        ModelCompleter(decoder, config.eval.measured, positions).filler("")
    start_run(workdir, given.to_dict())
    total = len(config.eval.policies) + rounds(task, config.eval)
    with Progress(total, description="eval", enabled=is_primary()) as progress:
        results, made = [], {}
        for policy in config.eval.policies:
            if of := control_of(policy):
                result, made[policy] = evaluate_control(decoder, examination, policy, made[of])
            else:
                result, made[policy] = evaluate_policy(decoder, examination, policy)
            results.append(result)
            shown = {"accuracy": result.accuracy, "depth/fraction": result.depth_fraction}
            progress.update(len(results), policy=policy, **shown)
        controls = [
            compared(result.control_of, result.policy, made[result.control_of],
                     made[result.policy], decoder.layers, config.seed)
            for result in results
            if result.control_of
        ]  # fmt: skip
        exits = model.exit_layers
        written: dict[str, Any] = {
            "version": VERSION,
            "complete": False,
            "task": dataclasses.asdict(config.task),
            "split": config.eval.split,
            "model": {"path": config.model.path, "layers": decoder.layers, "exits": list(exits)},
            "runs": [
                result.model_copy(
                    update={"compute_fraction": flops.compute_fraction(result.depth_fraction)}
                )
                for result in results
            ],
            "controls": controls,
        }
        if is_primary():
            Evaluation(**written).write(workdir / "eval.json")
        measurer = Measurer(config, decoder, examination, split, exits, positions, made)
        examples = measurer.examples()
        if is_primary():
            write_json_atomic(workdir / "completions.json", examples)
        measures = measurer.run(len(results), progress)
    if not is_primary():
        return
    written |= {"complete": True, **measures}
    evaluation = Evaluation(**written)
    evaluation.write(workdir / "eval.json")
    print_results(evaluation.model_dump(exclude_unset=True))
    print(f"Wrote {workdir / 'eval.json'}")
    print(f"Drew {draw(workdir)}")


def print_results(written: dict[str, Any]) -> None:
    """What `eval.json` holds, as tables: a line a policy, a control, a measure."""
    print(
        f"{'policy':<16}{'accuracy':>10}{'95 % interval':>18}{'depth':>8}{'of L':>7}{'compute':>9}"
        f"{'tokens':>8}{'layers/problem':>16}"
    )
    for run in written["runs"]:
        print(
            f"{run['policy']:<16}{run['accuracy']:>10.1%}{_per_cent(run['accuracy_ci95']):>18}"
            f"{run['depth_mean']:>8.2f}{run['depth_fraction']:>7.0%}"
            f"{run['compute_fraction']:>9.0%}{run['completion_length']:>8.1f}{run['layers_per_problem']:>16.1f}"
        )
    for pair in written["controls"]:
        print(
            f"{pair['policy']} less {pair['control']}: accuracy {pair['accuracy_difference']:+.1%} "
            f"({_per_cent(pair['accuracy_difference_ci95'])}), layers "
            f"{pair['depth_fraction_difference']:+.1%} of L"
        )
    for entry in written.get("exits", ()):
        print(f"{'exit':<16}{'KL, nats':>10}{'same token':>12}{'under 0.05':>12}")
        for part in entry["exits"]:
            print(
                f"{part['exit']:<16}{part['kl_nats']:>10.2f}{part['same_token']:>12.1%}"
                f"{part['close']:>12.1%}"
            )
        print(f"{'leaving under':<16}{'KL, nats':>10}{'same token':>12}{'at L':>12}{'of L':>7}")
        for part in entry["leaving"]:
            stayed = part["same_token_full_depth"]
            print(
                f"{part['threshold_nats']:<16g}{part['kl_nats']:>10.2f}{part['same_token']:>12.1%}"
                f"{'' if stayed is None else f'{stayed:.1%}':>12}{part['depth_fraction']:>7.0%}"
            )
    for entry in written.get("hazards", ()):
        print(f"hazards under {entry['policy']}: expected calibration error {entry['ece']:.3f}")
    if entries := written.get("faithfulness"):
        print(f"{'measure':<18}{'policy':<16}{'value':>8}{'95 % interval':>18}{'of L':>7}{'n':>6}")
    for entry in entries or ():
        for measure in entry["measures"]:
            print(
                f"{measure['name']:<18}{entry['policy']:<16}{measure['value']:>8.2f}"
                f"{_per_cent(measure['ci95']):>18}{measure['depth_fraction']:>7.0%}"
                f"{measure['problems']:>6}"
            )
    for entry in entries or ():
        for measure in entry["measures"]:
            if measure["caveat"]:
                print(f"{measure['name']} under {entry['policy']}: {measure['caveat']}")
    if pairs := written.get("faithfulness_paired"):
        print(
            f"{'same problems':<18}{'policy':<16}{'value':>8}{'full':>8}{'less full':>11}"
            f"{'95 % interval':>18}{'n':>6}"
        )
    for pair in pairs or ():
        print(
            f"{pair['measure']:<18}{pair['policy']:<16}{pair['value']:>8.2f}"
            f"{pair['against_value']:>8.2f}{pair['difference']:>+11.2f}"
            f"{_per_cent(pair['difference_ci95']):>18}{pair['problems']:>6}"
        )
    for part, title in (("capacity", "a step does"), ("begun_steps", "a step begun of")):
        if entries := written.get(part):
            print(
                f"{title:<18}{'policy':<16}{'accuracy':>8}{'95 % interval':>18}{'of L':>7}"
                f"{'as asked':>10}"
            )
        for entry in entries or ():
            print(
                f"{entry['granularity']:<18}{entry['policy']:<16}{entry['accuracy']:>8.1%}"
                f"{_per_cent(entry['accuracy_ci95']):>18}{entry['depth_fraction']:>7.0%}"
                f"{entry['obeyed']:>10.0%}"
            )


def _per_cent(interval: tuple[float, float]) -> str:
    return "{:.1%} – {:.1%}".format(*interval)


def compare(before: PolicyResult, after: PolicyResult, title: str) -> None:
    """The closing table of a training run, from what `Stage.measure` gives."""
    names = {
        "accuracy": "accuracy",
        "depth/fraction": "depth_fraction",
        "compute/fraction": "compute_fraction",
        "depth/mean": "depth_mean",
        "completion/length": "completion_length",
        "layers/problem": "layers_per_problem",
    }
    rows = [(name, getattr(before, key), getattr(after, key)) for name, key in names.items()]
    shared = before.text.keys() & after.text.keys()
    rows += [(name, before.text[name], after.text[name]) for name in sorted(shared)]
    closing_table(rows, title)
