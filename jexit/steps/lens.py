"""One step of the last phase of calibration: the hazard heads learn, the trunk stays.

The model runs once at full depth, without a backward pass; its residuals at the exits are all that
the heads read. Nothing that a token at full depth runs can change. The continuation stays as it was
fitted: trained by the KL of its end alone, its middle drifts from the residuals that the keys and
values of skipped layers need.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, PRNGKey
from jexit.config import SFTConfig
from jexit.kernels import exit_kl
from jexit.losses.masked import masked_sum
from jexit.losses.sft import hazard_cross_entropy, target_log_hazards
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

    loss = w_exit · mean over action positions and exits of H(h*_e, h_e), `hazard_cross_entropy`
    with the target h*_e = 1 − tanh(k·KL_e / 2), where KL_e = KL(π_L ‖ π_e) and π_e is the output
    head on the end of the continuation from exit e. With `lens_exits="one"` each token
    counts with one exit that is drawn for it, which has the same mean. `optimizer` has to leave all
    but the heads alone.
    """
    exit_layers = split.student(split.trainable).exit_layers
    exits, one = len(exit_layers), config.lens_exits == "one"

    def step(
        state: TrainState, fixed: Fixed, batch: Completions, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        model = split.student(state.trainable, fixed)
        actions = jnp.maximum(jnp.sum(batch.action_BC), 1)

        def prepared(index: Array) -> tuple[Array, Array, Array]:
            """Residuals [E, B, C, D], KL in nats and what counts [E, B, C]; no gradient."""
            rows = micro_batch(batch, index, micro_batches)
            full = run(
                model, rows.tokens_BT, policy=Full(), valid_BT=rows.valid_BT, exit_residual=True
            )
            residual_EBCD = jax.vmap(rows.window)(full.exit_residual_EBTD)
            hidden_EBCD = exit_hidden_states(model, residual_EBCD, model.blocks.continuation)
            counts_EBC = jnp.broadcast_to(rows.action_BC, hidden_EBCD.shape[:-1])
            if one:
                draw_key = jax.random.fold_in(key, index)
                drawn_BC = jax.random.randint(draw_key, rows.action_BC.shape, 0, exits)
                counts_EBC &= drawn_BC == jnp.arange(exits)[:, None, None]
                hidden_EBCD = jnp.take_along_axis(hidden_EBCD, drawn_BC[None, ..., None], axis=0)
            kl_EN = exit_kl(
                rows.window(full.hidden_BTD).reshape(-1, hidden_EBCD.shape[-1]),
                hidden_EBCD.reshape(hidden_EBCD.shape[0], -1, hidden_EBCD.shape[-1]),
                model.head_VD,
            ).kl_EN
            kl_EBC = kl_EN.reshape(hidden_EBCD.shape[:-1])
            kl_EBC = jnp.broadcast_to(kl_EBC, counts_EBC.shape)
            return jax.lax.stop_gradient((residual_EBCD, kl_EBC, counts_EBC))

        def loss_fn(params: Params, item: tuple, _: PRNGKey) -> tuple[Array, Metrics]:
            residual_EBCD, kl_EBC, counts_EBC = item
            heads = split.student(params, fixed).exits
            z_EBC = jnp.stack([heads(residual_EBCD[e], jnp.int32(e)) for e in range(exits)])
            target_EBC, _ = target_log_hazards(kl_EBC, config.sharpness)
            entropy_EBC = hazard_cross_entropy(
                *log_hazards(z_EBC), target_EBC, stay_weight=config.stay_weight
            )
            # Of all exits, or as many times less of the one that was drawn.
            share = 1.0 / (actions * (1 if one else exits))
            exit_loss = masked_sum(entropy_EBC, counts_EBC) * share
            metrics = {"loss": config.exit_coef * exit_loss, "loss/exit": exit_loss}
            metrics["kl/exits"] = masked_sum(kl_EBC, counts_EBC) * share
            for index, layer in enumerate(exit_layers):
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
