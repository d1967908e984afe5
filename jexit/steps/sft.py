"""The calibration step: exit heads learn target hazards; adapters learn to predict after an exit.

A hazard is the probability of leaving at an exit. Its target is near 1 where the prediction at the
exit already agrees with the teacher's at full depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, Float, Int, PRNGKey
from jexit.config import SFTConfig
from jexit.kernels import linear_kl
from jexit.losses.masked import masked_sum
from jexit.losses.sft import draw_exit_indices, expected_exit_loss
from jexit.model.exits import depth_log_prob, depth_of_exit_index, log_hazards
from jexit.model.policies import Prescribed
from jexit.model.transformer import Transformer, run
from jexit.steps.completions import Completions, flat
from jexit.steps.optim import Metrics, accumulated_gradients, apply_gradients, micro_batch, summed
from jexit.steps.state import FixedParams, Params, SplitModel, TrainState
from jexit.steps.targets import target_hazards


def make_sft_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    config: SFTConfig,
    *,
    micro_batches: int = 1,
) -> Callable[[TrainState, FixedParams, Completions, PRNGKey], tuple[TrainState, Metrics]]:
    """Returns the jitted calibration step (state, fixed, batch, key) → (state, metrics).

    For each of `micro_batches` parts of the batch, the teacher runs once (`target_hazards`), S =
    `config.samples` depths per token are drawn from the target hazards, and the student runs S
    times at these depths (`calibration_loss`). The loss is the mean over the S runs and all action
    positions (tokens whose pass could leave early).
    """

    def step(
        state: TrainState, fixed: FixedParams, batch: Completions, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        teacher = split.teacher(state.trainable, fixed)
        teacher_head_VD = teacher.head_VD if split.teacher_has_own_head else None
        target_key, student_key = jax.random.split(key)
        actions = jnp.maximum(jnp.sum(batch.action_BC), 1) * config.samples

        def loss_fn(params: Params, item: Taught, key: PRNGKey) -> tuple[Array, Metrics]:
            student = split.student(params, fixed)
            return calibration_loss(student, item, actions, config, key, teacher_head_VD)

        def gradients_of(index: Array) -> tuple[Array, Metrics, Params]:
            rows = micro_batch(batch, index, micro_batches)
            student = split.student(state.trainable, fixed)
            hidden_BCD, leave_BCE, stay_BCE = target_hazards(
                student, teacher, rows, target=config.target, sharpness=config.sharpness
            )
            exits_SBC = draw_exit_indices(
                jax.random.fold_in(target_key, index),
                leave_BCE,
                stay_BCE,
                samples=config.samples,
                explore=config.explore,
            )
            return accumulated_gradients(
                split.value_and_grad(loss_fn),
                state.trainable,
                lambda sample: Taught(rows, hidden_BCD, leave_BCE, exits_SBC[sample]),
                config.samples,
                jax.random.fold_in(student_key, index),
            )

        loss, metrics, gradients = summed(gradients_of, micro_batches)
        state, update_metrics = apply_gradients(state, optimizer, gradients, loss)
        metrics["tokens"] = jnp.sum(batch.token_BC).astype(jnp.float32) * config.samples
        return state, metrics | update_metrics

    return jax.jit(step, donate_argnums=0)


class Taught(NamedTuple):
    """A micro-batch with the targets of the student and the depths at which the student runs."""

    rows: Completions
    hidden_BCD: Array  # final hidden states of the teacher
    leave_BCE: Float[Array, "B C E"]  # log target hazards
    exits_BC: Int[Array, "B C"]  # prescribed exit indices


def calibration_loss(
    student: Transformer,
    item: Taught,
    actions: Array,
    config: SFTConfig,
    key: PRNGKey,
    teacher_head_VD: Array | None,
) -> tuple[Array, Metrics]:
    """Returns what one student run on `item` adds to the loss and metrics of the whole batch.

    The loss is the KL between student and teacher in the direction `config.direction` (see
    `linear_kl`) plus `config.exit_coef` times the loss of the exit heads. Both are summed over the
    action positions (tokens whose pass could leave early) and divided by `actions`, which is S
    times the number of these positions in the whole batch. `teacher_head_VD` is None if teacher and
    student share the output head. Depths drawn with exploration need `config.exit_loss="expected"`,
    because −log P(d) would teach the exploration to the heads.
    """
    rows, exits_BC = item.rows, item.exits_BC
    exit_layers, layers = student.exit_layers, student.arch.layers
    depth_BC = depth_of_exit_index(exits_BC, exit_layers, layers)
    result = run(
        student,
        rows.tokens_BT,
        policy=Prescribed(rows.input_depths(depth_BC, layers)),
        **rows.layout,
        dropout_key=key,
        hazards=True,
    )
    kl_BC = linear_kl(
        flat(rows.window(result.hidden_BTD)),
        flat(item.hidden_BCD),
        student.head_VD,
        direction=config.direction,
        head_teacher_VD=teacher_head_VD,
    ).reshape(depth_BC.shape)
    z_BCE = rows.window(result.hazard_logits_BTE)
    if config.exit_loss == "expected":
        exit_BC = expected_exit_loss(*log_hazards(z_BCE), item.leave_BCE, exits_BC)
    else:
        exit_BC = -depth_log_prob(depth_BC, z_BCE, exit_layers, layers)

    def mean(values_BC: Float[Array, "B C"]) -> Array:
        return masked_sum(values_BC, rows.action_BC) / actions

    kl, exit_loss = mean(kl_BC), mean(exit_BC)
    loss = kl + config.exit_coef * exit_loss
    metrics = {
        "loss": loss,
        "kl/teacher": kl,
        "loss/exit": exit_loss,
        "depth/fraction": mean(depth_BC / layers),
    }
    for index, layer in enumerate((*exit_layers, layers)):
        metrics[f"exit/{layer}"] = mean((exits_BC == index).astype(jnp.float32))
    return loss, metrics
