"""One step of calibration: exits learn the teacher's certainty, adapters to finish early."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, Float, HiddenBTD, PRNGKey
from jexit.config import SFTConfig
from jexit.kernels import exit_kl, linear_kl
from jexit.losses.masked import masked_sum
from jexit.losses.sft import draw_exit_indices, expected_exit_loss, target_log_hazards
from jexit.model.exits import Continuation, depth_log_prob, depth_of_exit_index, log_hazards
from jexit.model.policies import Full, Prescribed
from jexit.model.transformer import Run, Transformer, exit_hidden_states, run
from jexit.steps.completions import PackedCompletions
from jexit.steps.optim import (
    Metrics,
    accumulated_gradients,
    apply_gradients,
    micro_batch,
    summed,
)
from jexit.steps.state import Fixed, Params, SplitModel, TrainState


def make_sft_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    config: SFTConfig,
    *,
    micro_batches: int = 1,
) -> Callable[[TrainState, Fixed, PackedCompletions, PRNGKey], tuple[TrainState, Metrics]]:
    """The jitted calibration step (state, fixed, batch, key) → (state, metrics).

    Per micro-batch of rows: the teacher runs once; target hazards come from its exits' KL (or, with
    `target="student"`, from the student's own exits at full depth against the teacher's final
    distribution); S depth assignments are drawn; the student runs each. The loss, averaged over
    action positions and the S draws, is KL(student, teacher) + w_exit · exit loss. With explored
    depths the exit loss is the expected one: −log P(d) would teach the exploration to the heads.
    """
    model = split.student(split.trainable)
    layers, exit_layers = model.arch.layers, model.exit_layers

    def flat(hidden: Array) -> Array:
        return hidden.reshape(-1, hidden.shape[-1])

    def exit_kl_BCE(
        rows: PackedCompletions, final_BTD: HiddenBTD, speaker: Transformer, exits: Run,
        continuation: Continuation | None,
    ) -> Array:  # fmt: skip
        """KL(teacher final ‖ exit e) in nats at completion positions; no gradient."""
        final_BCD = rows.window(final_BTD)
        residual_EBCD = jax.vmap(rows.window)(exits.exit_residual_EBTD)
        exits_EBCD = exit_hidden_states(speaker, residual_EBCD, continuation)
        exits_END = exits_EBCD.reshape(exits_EBCD.shape[0], -1, exits_EBCD.shape[-1])
        kl_EN = exit_kl(flat(final_BCD), exits_END, speaker.head_VD).kl_EN
        return jnp.moveaxis(kl_EN.reshape(exits_EBCD.shape[:3]), 0, -1)

    def targets(
        student: Transformer, teacher: Transformer, rows: PackedCompletions
    ) -> tuple[HiddenBTD, Array, Array]:
        """The teacher's final hidden states [B,T,D] and target log hazards [B,C,E]."""
        from_teacher = config.target == "teacher"
        taught = run(
            teacher,
            rows.tokens_BT,
            policy=Full(),
            **rows.layout,
            adapters=False,
            exit_residual=from_teacher,
        )
        measured, speaker = taught, teacher
        if not from_teacher:
            speaker = student
            measured = run(
                student, rows.tokens_BT, policy=Full(), **rows.layout, exit_residual=True
            )
        continuation = student.blocks.continuation
        kl_BCE = exit_kl_BCE(rows, taught.hidden_BTD, speaker, measured, continuation)
        leave_BCE, stay_BCE = target_log_hazards(kl_BCE, config.sharpness)
        return jax.lax.stop_gradient((taught.hidden_BTD, leave_BCE, stay_BCE))

    def step(
        state: TrainState, fixed: Fixed, batch: PackedCompletions, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        teacher = split.teacher(state.trainable, fixed)
        target_key, student_key = jax.random.split(key)
        actions = jnp.maximum(jnp.sum(batch.action_BC), 1) * config.samples

        def prepared(index: Array) -> tuple[PackedCompletions, HiddenBTD, Array, Array]:
            rows = micro_batch(batch, index, micro_batches)
            taught_BTD, leave_BCE, stay_BCE = targets(
                split.student(state.trainable, fixed), teacher, rows
            )
            exits_SBC, _ = draw_exit_indices(
                jax.random.fold_in(target_key, index),
                leave_BCE,
                stay_BCE,
                samples=config.samples,
                explore=config.explore,
            )
            return rows, rows.window(taught_BTD), leave_BCE, exits_SBC

        def loss_fn(params: Params, item: tuple, key: PRNGKey) -> tuple[Array, Metrics]:
            rows, taught_BCD, leave_BCE, exits_BC = item
            student = split.student(params, fixed)
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
                flat(taught_BCD),
                student.head_VD,
                direction=config.direction,
                head_teacher_VD=teacher.head_VD if split.teacher_has_own_head else None,
            ).reshape(depth_BC.shape)
            z_BCE = rows.window(result.hazard_logits_BTE)
            if config.exit_loss == "expected":
                exit_BC = expected_exit_loss(
                    *log_hazards(z_BCE), leave_BCE, exits_BC, stay_weight=config.stay_weight
                )
            else:
                exit_BC = -depth_log_prob(depth_BC, z_BCE, exit_layers, layers)
            return shares(rows, kl_BC, exit_BC, depth_BC, exits_BC)

        def shares(
            rows: PackedCompletions, kl_BC: Array, exit_BC: Array, depth_BC: Array, exits_BC: Array
        ) -> tuple[Array, Metrics]:
            def mean(values_BC: Float[Array, "B C"]) -> Array:
                return masked_sum(values_BC, rows.action_BC) / actions

            kl, exit_loss = mean(kl_BC), mean(exit_BC)
            metrics = {
                "loss": kl + config.exit_coef * exit_loss,
                "kl/teacher": kl,
                "loss/exit": exit_loss,
                "depth/fraction": mean(depth_BC / layers),
            }
            for index, layer in enumerate((*exit_layers, layers)):
                metrics[f"exit/{layer}"] = mean((exits_BC == index).astype(jnp.float32))
            return metrics["loss"], metrics

        def sampled_gradients(index: Array) -> tuple[Array, Metrics, Params]:
            """The S students of one micro-batch share its teacher."""
            rows, taught_BCD, leave_BCE, exits_SBC = prepared(index)
            return accumulated_gradients(
                loss_fn,
                state.trainable,
                lambda sample: (rows, taught_BCD, leave_BCE, exits_SBC[sample]),
                config.samples,
                jax.random.fold_in(student_key, index),
            )

        loss, metrics, gradients = summed(sampled_gradients, micro_batches)
        state, update_metrics = apply_gradients(state, optimizer, gradients, loss)
        metrics["tokens"] = jnp.sum(batch.token_BC).astype(jnp.float32) * config.samples
        return state, metrics | update_metrics

    return jax.jit(step, donate_argnums=0)
