"""The last phase of calibration, in which only the exit heads train.

Their targets compare each exit with the last layer of the same model, since that is what a token
that stays will get (the setting `sft.target=own`). Nothing but the heads changes, so the model runs
over the trajectories once, at full depth and without a backward pass. `ExitStates` stores the
heads' inputs and the KLs that determine their targets. The heads can then train for many steps,
because a step on stored inputs costs a thousandth of a pass of the model. The continuation does not
train either: if it were trained only on the KL after the last layer, the residuals between the
layers would drift away from those that the keys and values of skipped layers need.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jexit.axes import Array, Float, Int
from jexit.config import SFTConfig
from jexit.dist import constrain
from jexit.losses.sft import hazard_cross_entropy, target_log_hazards
from jexit.model.exits import log_hazards
from jexit.steps.completions import Completions, flat
from jexit.steps.optim import Metrics, apply_gradients
from jexit.steps.state import FixedParams, Params, SplitModel, TrainState
from jexit.steps.targets import exits_against_last_layer


@struct.dataclass
class ExitStates:
    """The training data of the exit heads: N completion positions, at each of the E exits."""

    residual_NED: Array  # the heads' inputs
    kl_NE: Float[Array, "N E"]  # KL(π_L ‖ π_e) in nats, of one model; π_e with the continuation


def make_exit_states(split: SplitModel) -> Callable[[Params, FixedParams, Completions], ExitStates]:
    """Returns the jitted function (trainable, fixed, batch) → `ExitStates`.

    The result has N = B·C positions: all completion positions of the batch, row by row and
    including padding.
    """

    def states(trainable: Params, fixed: FixedParams, batch: Completions) -> ExitStates:
        model = split.student(trainable, fixed)
        found = exits_against_last_layer(model, batch, model.blocks.continuation)
        residual_NED = flat(jnp.moveaxis(found.residual_EBCD, 0, 2))
        return ExitStates(constrain(residual_NED, "B.."), constrain(flat(found.kl_BCE), "B."))

    return jax.jit(states)


def make_lens_step(
    split: SplitModel, optimizer: optax.GradientTransformation, config: SFTConfig
) -> Callable[[TrainState, FixedParams, ExitStates, Int[Array, "M"]], tuple[TrainState, Metrics]]:
    """Returns the jitted step (state, fixed, states, position_M) → (state, metrics) for the heads.

    `position_M` are M indices of positions in `states`. The loss is w_exit times the mean of
    H(h*_e, h_e) over these positions and all exits e. H is `hazard_cross_entropy`, w_exit is
    `config.exit_coef`, and the target is h*_e = 1 − tanh(k·KL_e / 2), with k = `config.sharpness`.
    `optimizer` must leave all other parameters unchanged.
    """
    exit_layers = split.student(split.trainable).exit_layers

    def step(
        state: TrainState, fixed: FixedParams, states: ExitStates, position_M: Int[Array, "M"]
    ) -> tuple[TrainState, Metrics]:
        residual_MED, kl_ME = states.residual_NED[position_M], states.kl_NE[position_M]
        target_ME, _ = target_log_hazards(kl_ME, config.sharpness)

        def loss_fn(params: Params) -> tuple[Array, Metrics]:
            heads = split.student(params, fixed).exits
            z_ME = jnp.stack(
                [heads(residual_MED[:, e], jnp.int32(e)) for e in range(len(exit_layers))], axis=1
            )
            exit_loss = jnp.mean(
                hazard_cross_entropy(*log_hazards(z_ME), target_ME, stay_weight=config.stay_weight)
            )
            return config.exit_coef * exit_loss, {"loss/exit": exit_loss}

        (loss, metrics), gradients = split.value_and_grad(loss_fn)(state.trainable)
        state, update_metrics = apply_gradients(state, optimizer, gradients, loss)
        metrics |= {
            "loss": loss,
            "kl/exits": jnp.mean(kl_ME),
            "tokens": jnp.float32(len(position_M)),
        }
        for layer, kl in zip(exit_layers, jnp.mean(kl_ME, axis=0), strict=True):
            metrics[f"kl/exit_{layer}"] = kl
        return state, metrics | update_metrics

    return jax.jit(step, donate_argnums=0)
