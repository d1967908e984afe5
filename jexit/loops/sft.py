"""Calibration: teacher trajectories once, then steps that shape the exits.

A linear continuation is fitted by ridge regression. In the first `steps` adapters learn, with the
heads. Then the continuation is fitted again, to the trunk that they have moved, and for
`sft.lens_steps` the heads alone learn what its exits are worth.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from jexit.config import Config
from jexit.data.buckets import LengthBuckets
from jexit.data.loader import encode_references, prepared
from jexit.data.teacher_store import TeacherStore, Trajectory
from jexit.dist import barrier, from_primary, host_rows, is_primary, place_rows, waiting
from jexit.io.fingerprint import fingerprint
from jexit.io.progress import Progress
from jexit.loops.continuation import fitted_continuation
from jexit.loops.flops import Work
from jexit.loops.setup import engine_size
from jexit.loops.stage import Stage
from jexit.loops.trainer import Trainer
from jexit.rollout import rollout
from jexit.steps.completions import Completions, pad_completions
from jexit.steps.lens import make_lens_step
from jexit.steps.optim import make_optimizer
from jexit.steps.sft import make_sft_step
from jexit.steps.state import TrainState, new_state, step_key

TEACHER_STREAM = 1  # of step_key: the teacher's own generations


def calibrate(config: Config, workdir: pathlib.Path) -> None:
    """Runs stage 1 and writes `WORKDIR/model`: base reference, adapters, heads, continuation."""
    stage, lens_steps = Stage.open(config, workdir, updates=config.steps), config.sft.lens_steps
    trajectories = teacher_trajectories(stage)
    buckets = LengthBuckets(
        [len(row.prompt) for row in trajectories], [len(row.completion) for row in trajectories]
    )
    before = stage.measure_before()
    step_fn = make_sft_step(
        stage.split, stage.optimizer, config.sft, micro_batches=config.optim.accumulate
    )
    # The same optimiser, which leaves all but the heads alone.
    heads_only = dataclasses.replace(config.optim, lora_lr=0.0, full_lr=0.0, continuation_lr=0.0)
    lens = make_optimizer(heads_only, max(lens_steps, 1), stage.labels)
    lens_fn = make_lens_step(stage.split, lens, config.sft, micro_batches=config.optim.accumulate)
    shown = ("kl/exits", "kl/teacher", "loss/exit", "depth/fraction")
    trainer = Trainer(
        config,
        workdir,
        "sft",
        shown={name: name for name in shown},
        steps=config.steps + lens_steps,
    )

    def fitted(state: TrainState) -> TrainState:
        trainable = fitted_continuation(stage, trajectories, buckets, state.trainable)
        return dataclasses.replace(state, trainable=trainable)

    state = trainer.restore(new_state(stage.split.trainable, stage.optimizer))
    if int(state.step) == 0:
        state = fitted(state)

    here = host_rows(config.batch_size)

    def batch_of(step: int) -> tuple[Completions, dict[str, float]]:
        """This host's rows of a step, and the whole batch's padding and model FLOPs."""
        index_B, shape = buckets.batch(seed=config.seed, step=step, batch_size=config.batch_size)
        rows = [trajectories[index] for index in index_B[here.index_B]]
        batch = pad_completions(
            [row.prompt for row in rows],
            [row.completion for row in rows],
            stage.tokenizer.pad_id,
            shape,
        )
        whole = [trajectories[index] for index in index_B]
        work = Work.of([len(row.prompt) + len(row.completion) for row in whole])
        completion = sum(len(row.completion) for row in whole)
        if step < config.steps:
            flops = stage.flops.sft_step(
                work, completion, samples=config.sft.samples, target=config.sft.target
            )
        else:
            flops = stage.flops.lens_step(work, completion, exits=config.sft.lens_exits)
        padding = 1.0 - work.tokens / (len(index_B) * shape[0])
        return batch, {"data/padding": padding, "model_flops": flops}

    batches = prepared(batch_of, int(state.step), config.steps + lens_steps)

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        batch, totals = next(batches)
        learning = step < config.steps
        trainer.shapes((learning, batch.tokens_BT.shape, batch.completion_tokens_BC.shape))
        batch = place_rows(batch, here)
        if step == config.steps > 0:  # the heads' own phase, with moments of its own
            state = fitted(state)
            state = dataclasses.replace(state, opt_state=stage.optimizer.init(state.trainable))
        phase_fn = step_fn if learning else lens_fn
        with waiting(f"step {step + 1}"):
            state, metrics = phase_fn(state, stage.split.fixed, batch, step_key(config.seed, step))
        return state, metrics | totals | rates(step)

    def rates(step: int) -> dict[str, Any]:
        if step < config.steps:
            return stage.learning_rates(step)
        name, of_phase = "lr/exit", step - config.steps
        return {name: stage.learning_rates(of_phase, updates=lens_steps)[name]}

    state = trainer.run(state, one_step)
    stage.finish(trainer, stage.chosen(trainer, state), before)


def teacher_trajectories(stage: Stage) -> list[Trajectory]:
    """`sft.pool` completions by the teacher (or the data set's own), those on disk not again."""
    config, sft, split, tokenizer = stage.config, stage.config.sft, stage.split, stage.tokenizer
    batch_size = min(sft.generate_batch, sft.pool)
    batches = -(-sft.pool // batch_size)
    settings = {
        "model": fingerprint((split.fixed.teacher, split.fixed.frozen)),
        "task": dataclasses.asdict(config.task),
        "source": sft.trajectories,
        "pool": sft.pool,
        "batch_size": batch_size,
        "temperature": sft.temperature,
        "max_new_tokens": sft.max_new_tokens,
        "seed": config.seed,
    }
    store = TeacherStore(stage.workdir / "teacher", settings, writer=jax.process_index())
    barrier("opening the teacher's trajectories")
    store.read()
    missing = [step for step in range(batches) if not store.holds(step, batch_size)]
    missing = from_primary("the teacher's missing trajectories", missing)
    here = host_rows(batch_size)
    with Progress(
        batches,
        start=batches - len(missing),
        description="teacher trajectories",
        enabled=is_primary(),
    ) as progress:
        for number, step in enumerate(missing, start=1 + batches - len(missing)):
            batch = stage.prompts(step, here)
            if sft.trajectories == "dataset":
                remedy = "set config.sft.trajectories=generate"
                completions = [
                    ids[: sft.max_new_tokens]
                    for ids in encode_references(tokenizer, batch.problems, remedy=remedy)
                ]
            else:
                result = rollout(
                    split.decodable_teacher(split.trainable),
                    batch.tokens,
                    max_new_tokens=sft.max_new_tokens,
                    temperature=sft.temperature,
                    eos_ids=tokenizer.eos_ids,
                    pad_id=tokenizer.pad_id,
                    key=step_key(config.seed, step, TEACHER_STREAM),
                    adapters=False,
                    total=batch_size,
                    size=engine_size(config),
                )
                completions = [result.completion(row) for row in range(result.rows)]
            rows = [
                # One token has no action position: nothing to calibrate.
                Trajectory(prompt, ids) if len(ids) > 1 else None
                for prompt, ids in zip(batch.tokens, completions, strict=True)
            ]
            mine = [place for place, first in enumerate(here.first_B) if first]
            store.append(step, here.index_B[mine], [rows[place] for place in mine])
            progress.update(number)
    barrier("the teacher's trajectories")
    store.read()
    made = store.trajectories[: sft.pool]
    if not made:
        raise ValueError(
            "the teacher's completions all end at once, so there is nothing to calibrate on; "
            "check the model and its chat template, or set config.sft.trajectories=dataset"
        )
    return made
