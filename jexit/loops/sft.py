"""Calibration: teacher trajectories once, then steps that shape the exits.

A linear continuation is fitted by ridge regression. In the first `steps` adapters learn, with the
heads. Then the continuation is fitted again, to the trunk that they have moved, and for
`sft.lens_steps` the heads alone learn what its exits are worth.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jexit.config import Config
from jexit.data.loader import prepared
from jexit.dist import host_rows, place_rows, waiting
from jexit.loops.continuation import fitted_continuation
from jexit.loops.flops import Work
from jexit.loops.stage import Stage
from jexit.loops.trainer import Trainer
from jexit.loops.trajectories import teacher_trajectories
from jexit.steps.completions import Completions
from jexit.steps.lens import make_lens_step
from jexit.steps.optim import make_optimizer
from jexit.steps.sft import make_sft_step
from jexit.steps.state import TrainState, new_state, step_key


def calibrate(config: Config, workdir: pathlib.Path) -> None:
    """Runs stage 1 and writes `WORKDIR/model`: base reference, adapters, heads, continuation."""
    stage, lens_steps = Stage.open(config, workdir, updates=config.steps), config.sft.lens_steps
    trajectories = teacher_trajectories(stage)
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
        trainable = fitted_continuation(stage, trajectories, state.trainable)
        return dataclasses.replace(state, trainable=trainable)

    state = trainer.restore(new_state(stage.split.trainable, stage.optimizer))
    if int(state.step) == 0:
        state = fitted(state)

    here = host_rows(config.batch_size)

    def batch_of(step: int) -> tuple[Completions, dict[str, float]]:
        """This host's rows of a step, and the whole batch's padding and model FLOPs."""
        batch, rows = trajectories.batch(step, here)
        work = Work.of([len(row.prompt) + len(row.completion) for row in rows])
        completion = sum(len(row.completion) for row in rows)
        if step < config.steps:
            flops = stage.flops.sft_step(
                work, completion, samples=config.sft.samples, target=config.sft.target
            )
        else:
            flops = stage.flops.lens_step(work, completion, exits=config.sft.lens_exits)
        padding = 1.0 - work.tokens / (len(rows) * batch.tokens_BT.shape[1])
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
