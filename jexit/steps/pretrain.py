"""The pretraining step: next-token prediction, optionally also at the logit lens of each exit."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jexit.axes import Array, Float, Int, PRNGKey
from jexit.losses.masked import masked_sum
from jexit.model.transformer import exit_hidden_states, run
from jexit.steps.completions import token_logprobs
from jexit.steps.optim import Metrics, gradient_step
from jexit.steps.state import Params, SplitModel, TrainState


@struct.dataclass
class PretrainBatch:
    """Rows of token ids, each of which packs several texts that do not attend to each other.

    `weight_BT` is the weight of a token as a target of the loss, 0 for the first token of a text.
    `segment_BT` numbers the texts of a row (0: padding), and `position_BT` the tokens of each text.
    `group_BT` assigns target tokens to numbered groups for metrics (0: no group).
    """

    tokens_BT: Int[Array, "B T"]
    weight_BT: Float[Array, "B T"]
    segment_BT: Int[Array, "B T"]
    position_BT: Int[Array, "B T"]
    group_BT: Int[Array, "B T"]


def make_pretrain_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    *,
    exit_loss: float,
    groups: tuple[str, ...],
    micro_batches: int = 1,
) -> Callable[[TrainState, PretrainBatch, PRNGKey], tuple[TrainState, Metrics]]:
    """Returns the jitted pretraining step (state, batch, key) → (state, metrics).

    The loss is C + `exit_loss` / E · Σ_e C_e over the E exits. C = Σ w_t · −log p(x_t) / Σ w_t is
    the cross-entropy of the tokens x_t with weights w_t, and C_e is C with the probabilities of the
    logit lens at exit e. `groups` are the names of the groups 1, 2, … in the batch; the metric
    `p_correct/NAME` is the mean of p(x_t) over a group.
    """
    exits = len(split.student(split.trainable).exit_layers)

    def step(state: TrainState, batch: PretrainBatch, key: PRNGKey) -> tuple[TrainState, Metrics]:
        weight_total = jnp.maximum(jnp.sum(batch.weight_BT[:, 1:]), 1e-9)

        def loss_fn(params: Params, rows: PretrainBatch, _: PRNGKey) -> tuple[Array, Metrics]:
            model = split.student(params)
            result = run(
                model,
                rows.tokens_BT[:, :-1],
                positions_BT=rows.position_BT[:, :-1],
                segment_BT=rows.segment_BT[:, :-1],
                residual_layers=model.exit_layers if exit_loss > 0 else (),
            )
            weight_BT, group_BT = rows.weight_BT[:, 1:], rows.group_BT[:, 1:]

            def log_prob_BT(hidden_BTD: Array) -> Array:
                return token_logprobs(model.head_VD, hidden_BTD, rows.tokens_BT[:, 1:])[0]

            logprob_BT = log_prob_BT(result.hidden_BTD)
            text_loss = -masked_sum(logprob_BT, weight_BT) / weight_total
            loss, metrics = text_loss, {"loss/text": text_loss}
            if exit_loss > 0:
                lens_EBTD = exit_hidden_states(model, result.residual_RBTD, None)
                lens = sum(-masked_sum(log_prob_BT(lens_EBTD[e]), weight_BT) for e in range(exits))
                metrics["loss/exits"] = lens / (weight_total * exits)
                loss += exit_loss * metrics["loss/exits"]
            for number, name in enumerate(groups, start=1):
                members = jnp.maximum(jnp.sum(batch.group_BT[:, 1:] == number), 1)
                correct = jnp.sum(jnp.where(group_BT == number, jnp.exp(logprob_BT), 0.0))
                metrics[f"p_correct/{name}"] = correct / members
            metrics["loss"] = loss
            return loss, metrics

        state, metrics = gradient_step(split, loss_fn, state, optimizer, batch, micro_batches, key)
        metrics["tokens"] = jnp.sum(batch.segment_BT[:, 1:] > 0).astype(jnp.float32)
        return state, metrics

    return jax.jit(step, donate_argnums=0)
