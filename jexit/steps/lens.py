"""One step of the first phase of calibration: continuation and heads learn, the trunk stays.

The teacher runs once, without a backward pass; its residuals at the exits are all that continuation
and heads read. Nothing that a token at full depth runs can change.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, HiddenBTD, PRNGKey
from jexit.config import SFTConfig
from jexit.kernels import linear_kl
from jexit.losses.masked import masked_sum
from jexit.losses.sft import target_log_hazards
from jexit.model.exits import log_hazards
from jexit.model.policies import Full
from jexit.model.transformer import exit_hidden_states, run
from jexit.steps.completions import Completions
from jexit.steps.optim import Metrics, accumulated_gradients, apply_gradients, micro_batch
from jexit.steps.state import Fixed, Params, SplitModel, TrainState


def make_lens_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    config: SFTConfig,
    *,
    micro_batches: int = 1,
) -> Callable[[TrainState, Fixed, Completions, PRNGKey], tuple[TrainState, Metrics]]:
    """The jitted step (state, fixed, batch, key) → (state, metrics).

    loss = mean over action positions and exits of KL(π_L ‖ π_e) + w_exit · H(h*_e, h_e), where π_e
    is the output head on the end of the continuation from exit e, h*_e = 1 − tanh(k·KL_e / 2) the
    target hazard, without gradient, and H the binary cross-entropy. With `lens_exits="one"` each
    token counts with one exit that is drawn for it, which has the same mean. `optimizer` has to
    leave the parameters of the trunk alone.
    """
    model = split.student(split.trainable)
    exits = len(model.exit_layers)

    def step(
        state: TrainState, fixed: Fixed, batch: Completions, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        teacher = split.teacher(state.trainable, fixed)
        actions = jnp.maximum(jnp.sum(batch.action_BC), 1)

        def prepared(index: Array) -> tuple[Completions, HiddenBTD, Array]:
            rows = micro_batch(batch, index, micro_batches)
            taught = run(
                teacher, rows.tokens_BT, policy=Full(), valid_BT=rows.valid_BT, adapters=False,
                exit_residual=True,
            )  # fmt: skip
            residual_EBCD = jax.vmap(rows.window)(taught.exit_residual_EBTD)
            final_BCD = rows.window(taught.hidden_BTD)
            return jax.lax.stop_gradient((rows, final_BCD, residual_EBCD))

        def loss_fn(params: Params, item: tuple, key: PRNGKey) -> tuple[Array, Metrics]:
            rows, final_BCD, residual_EBCD = item
            student = split.student(params, fixed)
            hidden_EBCD = exit_hidden_states(teacher, residual_EBCD, student.blocks.continuation)
            z_EBC = jnp.stack([student.exits(residual_EBCD[e], jnp.int32(e)) for e in range(exits)])
            counts_EBC = jnp.broadcast_to(rows.action_BC, z_EBC.shape)
            if config.lens_exits == "one":
                drawn_BC = jax.random.randint(key, rows.action_BC.shape, 0, exits)
                counts_EBC &= drawn_BC == jnp.arange(exits)[:, None, None]
                hidden_EBCD = _pick(hidden_EBCD, drawn_BC)
            kl_EBC = linear_kl(
                hidden_EBCD.reshape(-1, hidden_EBCD.shape[-1]),
                jnp.broadcast_to(final_BCD, hidden_EBCD.shape).reshape(-1, final_BCD.shape[-1]),
                teacher.head_VD,
                direction="teacher_student",
            ).reshape(hidden_EBCD.shape[:-1])
            kl_EBC = jnp.broadcast_to(kl_EBC, z_EBC.shape)
            target_EBC = jnp.exp(
                target_log_hazards(jax.lax.stop_gradient(kl_EBC), config.sharpness)[0]
            )
            leave_EBC, stay_EBC = log_hazards(z_EBC)
            entropy_EBC = -(target_EBC * leave_EBC + (1.0 - target_EBC) * stay_EBC)
            # Of all exits, or as many times less of the one that was drawn.
            share = 1.0 / (actions * (1 if config.lens_exits == "one" else exits))
            kl = masked_sum(kl_EBC, counts_EBC) * share
            exit_loss = masked_sum(entropy_EBC, counts_EBC) * share
            metrics = {"loss": kl + config.exit_coef * exit_loss, "kl/exits": kl}
            metrics["loss/exit"] = exit_loss
            for index, layer in enumerate(model.exit_layers):
                of_exit = masked_sum(kl_EBC[index], counts_EBC[index]) * share * exits
                metrics[f"kl/exit_{layer}"] = of_exit
            return metrics["loss"], metrics

        loss, metrics, gradients = accumulated_gradients(
            loss_fn, state.trainable, prepared, micro_batches, key
        )
        state, update_metrics = apply_gradients(state, optimizer, gradients, loss)
        metrics["tokens"] = jnp.sum(batch.token_BC).astype(jnp.float32)
        return state, metrics | update_metrics

    return jax.jit(step, donate_argnums=0)


def _pick(hidden_EBCD: Array, drawn_BC: Array) -> Array:
    """Each position's hidden state at its own exit, as one exit [1, B, C, D]."""
    return jnp.take_along_axis(hidden_EBCD, drawn_BC[None, ..., None], axis=0)
