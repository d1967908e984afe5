"""The last phase of calibration, in which only the exit heads train.

They learn what leaving costs: the KL of each exit to the last layer of the same model, since that
is what a token that stays will get. Both come from passes in which about half of the earlier tokens
have left: on residuals of full depth alone, heads do not learn which exits to distrust after
shallow tokens. Nothing but the heads changes, so these passes are made once, without a backward
pass. `ExitStates` stores the heads' inputs and the KLs. The heads can then train for many steps,
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

from jexit.axes import Array, Bool, Float, Int, PRNGKey
from jexit.config import SFTConfig
from jexit.dist import constrain, data_shards
from jexit.losses.sft import draw_exit_indices, leaving_cost, target_log_hazards
from jexit.model.exits import depth_of_exit_index, log_hazards
from jexit.model.policies import Prescribed
from jexit.model.transformer import exit_hidden_states, run
from jexit.steps.completions import Completions, flat
from jexit.steps.optim import Metrics, apply_gradients
from jexit.steps.state import FixedParams, Params, SplitModel, TrainState
from jexit.steps.targets import exits_against_last_layer, kl_and_agreement


@struct.dataclass
class ExitStates:
    """The training data of the exit heads: N completion positions, at each of the E exits."""

    residual_NED: Array  # the heads' inputs
    kl_NE: Float[Array, "N E"]  # KL(π_L ‖ π_e) in nats, of one model; π_e with the continuation

    @classmethod
    def empty(cls, split: SplitModel, positions: int) -> ExitStates:
        """Returns room for `positions` positions, rounded up to equal parts for all devices."""
        model = split.student(split.trainable)
        shape = (-(-positions // data_shards()) * data_shards(), len(model.exit_layers))
        residual_NED = jnp.zeros((*shape, model.arch.width), model.dtype)
        return cls(constrain(residual_NED, "B.."), constrain(jnp.zeros(shape), "B."))


def make_exit_states(
    split: SplitModel, sharpness: float
) -> Callable[[ExitStates, Params, FixedParams, Completions, Int[Array, "M"], PRNGKey], ExitStates]:
    """Returns the jitted step (states, trainable, fixed, batch, place_M, key) → states.

    The step stores the states of the M = B·C completion positions of the batch, padding included,
    row by row: those of position i as number place_M[i] of `states`, or not at all if there is no
    such number. The model runs twice over the batch: once half of the positions, which are drawn,
    run all layers and the others leave at depths drawn from their target hazards, once the reverse.
    A position's states are those of the pass in which it ran all layers. The target hazards of
    these draws come from a pass at full depth; `sharpness` is theirs.
    """

    def step(
        states: ExitStates,
        trainable: Params,
        fixed: FixedParams,
        batch: Completions,
        place_M: Int[Array, "M"],
        key: PRNGKey,
    ) -> ExitStates:
        model = split.student(trainable, fixed)
        half_key, depth_key = jax.random.split(key)
        layers, continuation = model.arch.layers, model.blocks.continuation
        full = exits_against_last_layer(model, batch, continuation)
        hazards = target_log_hazards(full.kl_BCE, sharpness)
        exits_BC = draw_exit_indices(depth_key, *hazards, samples=1, explore=0.0)[0]
        drawn_BC = depth_of_exit_index(exits_BC, model.exit_layers, layers)

        def with_all_layers(stays_BC: Bool[Array, "B C"]) -> tuple[Array, Array]:
            depth_BT = batch.input_depths(jnp.where(stays_BC, layers, drawn_BC), layers)
            made = run(
                model,
                batch.tokens_BT,
                policy=Prescribed(depth_BT),
                **batch.layout,
                residual_layers=model.exit_layers,
            )
            return batch.window(made.hidden_BTD), jax.vmap(batch.window)(made.residual_RBTD)

        half_BC = jax.random.bernoulli(half_key, 0.5, drawn_BC.shape)
        final_BCD, residual_EBCD = jax.tree.map(
            lambda one, other: jnp.where(half_BC[..., None], one, other),
            with_all_layers(half_BC),
            with_all_layers(~half_BC),
        )
        hidden_EBCD = exit_hidden_states(model, residual_EBCD, continuation)
        kl_BCE, _ = kl_and_agreement(final_BCD, hidden_EBCD, model.head_VD)
        residual_NED = states.residual_NED.at[place_M].set(
            flat(jnp.moveaxis(residual_EBCD, 0, 2)), mode="drop"
        )
        kl_NE = states.kl_NE.at[place_M].set(flat(kl_BCE), mode="drop")
        return ExitStates(constrain(residual_NED, "B.."), constrain(kl_NE, "B."))

    return jax.jit(step, donate_argnums=0)


def make_lens_step(
    split: SplitModel, optimizer: optax.GradientTransformation, config: SFTConfig
) -> Callable[[TrainState, FixedParams, ExitStates, Int[Array, "M"]], tuple[TrainState, Metrics]]:
    """Returns the jitted step (state, fixed, states, position_M) → (state, metrics) for the heads.

    `position_M` are M indices of positions in `states`. The loss is the mean of `leaving_cost` over
    these positions and all exits, with the tolerance `config.kl_tolerance`. `optimizer` must leave
    all other parameters unchanged.
    """
    exit_layers = split.student(split.trainable).exit_layers

    def step(
        state: TrainState, fixed: FixedParams, states: ExitStates, position_M: Int[Array, "M"]
    ) -> tuple[TrainState, Metrics]:
        residual_MED, kl_ME = states.residual_NED[position_M], states.kl_NE[position_M]

        def loss_fn(params: Params) -> tuple[Array, Metrics]:
            heads = split.student(params, fixed).exits
            z_ME = jnp.stack(
                [heads(residual_MED[:, e], jnp.int32(e)) for e in range(len(exit_layers))], axis=1
            )
            exit_loss = jnp.mean(
                leaving_cost(*log_hazards(z_ME), kl_ME, tolerance=config.kl_tolerance)
            )
            return exit_loss, {"loss/exit": exit_loss}

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
