"""Calibrates exits: makes the teacher's trajectories once, then trains the exits on them.

First, ridge regression fits the linear continuation, if there is one. Then, for `steps` steps, the
adapters learn to work with the continuation, and the exit heads train together with the adapters.
Finally, for `sft.lens_steps` steps, only the exit heads train.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jexit.config import Config
from jexit.data.loader import prepared
from jexit.dist import host_rows, place_parameters, place_rows, waiting
from jexit.io.model_source import open_model
from jexit.io.progress import Progress
from jexit.loops.continuation import check_enough, fitted_continuation, rows_at_a_time
from jexit.loops.flops import PassSize
from jexit.loops.stage import Stage
from jexit.loops.trainer import Trainer
from jexit.loops.trajectories import Trajectories, rows_of_batch, teacher_trajectories
from jexit.steps.completions import Completions
from jexit.steps.exit_heads import ExitStates, make_exit_states, make_lens_step
from jexit.steps.optim import make_optimizer
from jexit.steps.sft import make_sft_step
from jexit.steps.state import Params, TrainState, new_state, step_key

STATES_STREAM = 3  # stream of `step_key` for the depths of the exits' states
HEADS_TOKENS = 512  # tokens, each at all exits, in a step that trains the heads alone


def calibrate(config: Config, workdir: pathlib.Path) -> None:
    """Calibrates the exits of the model and writes the model to `WORKDIR/model`."""
    fitted = open_model(config.model.path).exit_head.continuation == "linear"
    if config.exits.continuation == "linear" and not fitted:  # before the teacher writes
        check_enough(config, max(1, config.sft.pool // config.sft.completions))
    stage, lens_steps = Stage.open(config, workdir, updates=config.steps), config.sft.lens_steps
    trajectories = teacher_trajectories(stage)
    before = stage.measure_before()
    step_fn = make_sft_step(
        stage.split, stage.optimizer, config.sft, micro_batches=config.optim.accumulate
    )
    # The same optimiser, except that it changes only the heads.
    heads_only = dataclasses.replace(config.optim, lora_lr=0.0, full_lr=0.0, continuation_lr=0.0)
    lens = make_optimizer(heads_only, max(lens_steps, 1), stage.labels)
    lens_fn = make_lens_step(stage.split, lens, config.sft)
    remembered: tuple[ExitStates, int] | None = None
    shown = {name: name for name in ("kl/exits", "kl/teacher", "loss/exit", "depth/fraction")}
    trainer = Trainer(
        config,
        workdir,
        "sft",
        shown,
        steps=config.steps + lens_steps,
        ranked_after=config.steps if lens_steps else 0,  # a model needs the heads of the last phase
    )
    state = trainer.restore(new_state(stage.split.trainable, stage.optimizer))
    if int(state.step) == 0:
        trainable = fitted_continuation(stage, trajectories, state.trainable)
        state = state.replace(trainable=trainable)

    here = host_rows(rows_of_batch(config))

    def batch_of(step: int) -> tuple[Completions, dict[str, float]]:
        """Returns this host's rows of the batch of step `step`, and metrics of the whole batch."""
        batch, rows = trajectories.batch(step, here)
        prompt_J = [len(one.prompt) for row in rows for one in row]
        completion_J = [len(one.completion) for row in rows for one in row]
        first_J = [
            index == 0 or not trajectories.shared for row in rows for index in range(len(row))
        ]
        size = PassSize.of_branches(prompt_J, completion_J, first_J)
        flops = stage.flops.sft_step(
            size, sum(completion_J), samples=config.sft.samples, target=config.sft.target
        )
        padding = 1.0 - size.tokens / (len(rows) * batch.tokens_BT.shape[1])
        return batch, {"data/padding": padding, "model_flops": flops}

    batches = prepared(batch_of, int(state.step), config.steps)

    def adapters_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        batch, totals = next(batches)
        trainer.shapes((batch.tokens_BT.shape, batch.completion_tokens_BC.shape))
        batch = place_rows(batch, here)
        with waiting(f"step {step + 1}"):
            state, metrics = step_fn(state, stage.split.fixed, batch, step_key(config.seed, step))
        return state, metrics | totals | stage.learning_rates(step)

    def heads_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        nonlocal remembered
        if step == config.steps > 0:  # the new phase starts with fresh moments
            moments = place_parameters(stage.optimizer.init(state.trainable))
            state = state.replace(opt_state=moments)
        if remembered is None:
            remembered = exit_states(stage, trajectories, state.trainable)
        states, positions = remembered
        trainer.shapes(("heads",))
        position_M = np.random.default_rng((config.seed, step)).choice(positions, HEADS_TOKENS)
        with waiting(f"step {step + 1}"):
            state, metrics = lens_fn(state, stage.split.fixed, states, position_M)
        rates = stage.learning_rates(step - config.steps, updates=lens_steps)
        flops = stage.flops.lens_step(HEADS_TOKENS)
        return state, metrics | {"model_flops": flops, "lr/exit": rates["lr/exit"]}

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        return (adapters_step if step < config.steps else heads_step)(state, step)

    state = trainer.chosen(trainer.run(state, one_step))
    remembered = None  # frees the devices' memory for the evaluation
    stage.finish(trainer, state, before)


def exit_states(
    stage: Stage, trajectories: Trajectories, trainable: Params
) -> tuple[ExitStates, int]:
    """Returns the training data of the exit heads, and the number of positions in it.

    Only positions whose pass could leave early are stored, in the order of the batches, which is
    shuffled, until there are `sft.lens_tokens` or no further batches. Surplus room follows them.
    """
    config = stage.config
    size = rows_at_a_time(config, len(trajectories))
    here, batches = host_rows(size), max(1, len(trajectories) // size)
    actions = sum(len(one.completion) - 1 for row in trajectories.rows for one in row)
    most, count = min(config.sft.lens_tokens, actions), 0
    states = ExitStates.empty(stage.split, most)
    add = make_exit_states(stage.split, config.sft.sharpness)
    with Progress(most, description="the exits' states") as progress:
        for step in range(batches):
            batch, rows = trajectories.batch(step, here)
            acts_BC = np.zeros((size, batch.completion_tokens_BC.shape[1]), bool)
            for acts_C, row in zip(acts_BC, rows, strict=True):
                # The last pass over a prompt produces a completion's first token and never leaves.
                passes = np.concatenate([np.arange(len(one.completion)) for one in row])
                acts_C[: len(passes)] = passes > 0
            place_M = np.full(acts_BC.size, len(states.kl_NE), np.int32)  # no place
            acting = np.flatnonzero(acts_BC)[: most - count]
            place_M[acting] = count + np.arange(len(acting))
            key = step_key(config.seed, step, STATES_STREAM)
            with waiting("the exits' states"):
                given = (trainable, stage.split.fixed, place_rows(batch, here), place_M, key)
                states = add(states, *given)
            count += len(acting)
            progress.update(count)
            if count == most:
                break
    return states, count
