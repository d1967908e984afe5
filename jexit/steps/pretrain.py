"""Next-token training of the whole trunk, optionally with a loss at every exit's logit lens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, Float, Int, PRNGKey
from jexit.kernels import linear_logprob
from jexit.losses.masked import masked_sum
from jexit.model.transformer import run
from jexit.steps.optim import Metrics, accumulated_gradients, apply_gradients, micro_batch
from jexit.steps.state import Params, SplitModel, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PretrainBatch:
    """Right-padded text; weights and groups belong to the token as a target.

    `group_BT` numbers classes of targets (0: none) whose probability is reported one by one.
    """

    tokens_BT: Int[Array, "B T"]
    weight_BT: Float[Array, "B T"]
    group_BT: Int[Array, "B T"]


def make_pretrain_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    *,
    exit_loss: float,
    groups: tuple[str, ...],
    micro_batches: int = 1,
) -> Callable[[TrainState, tuple[PretrainBatch, ...], PRNGKey], tuple[TrainState, Metrics]]:
    """The jitted step, on a batch in parts of different lengths.

    loss = Σ w_t · −log p(x_t) / Σ w_t  +  exit_loss / E · Σ_e (the same at exit e's logit lens).
    Metrics carry, for each named group of targets, the mean probability given to the right token.
    """
    exits = len(split.student(split.trainable).exit_layers)

    def step(
        state: TrainState, parts: tuple[PretrainBatch, ...], key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        weight_total = jnp.maximum(sum(jnp.sum(part.weight_BT[:, 1:]) for part in parts), 1e-9)

        def loss_fn(params: Params, rows: PretrainBatch, _: PRNGKey) -> tuple[Array, Metrics]:
            model = split.student(params)
            result = run(model, rows.tokens_BT[:, :-1], exit_hidden=exit_loss > 0)
            weight_BT, group_BT = rows.weight_BT[:, 1:], rows.group_BT[:, 1:]
            targets_N = rows.tokens_BT[:, 1:].reshape(-1)

            def log_prob_BT(hidden_BTD: Array) -> Array:
                hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
                return linear_logprob(hidden_ND, model.head_VD, targets_N).logprob_N.reshape(
                    weight_BT.shape
                )

            logprob_BT = log_prob_BT(result.hidden_BTD)
            text_loss = -masked_sum(logprob_BT, weight_BT) / weight_total
            loss, metrics = text_loss, {"loss/text": text_loss}
            if exit_loss > 0:
                lens = sum(
                    -masked_sum(log_prob_BT(result.exit_hidden_EBTD[e]), weight_BT)
                    for e in range(exits)
                )
                metrics["loss/exits"] = lens / (weight_total * exits)
                loss += exit_loss * metrics["loss/exits"]
            for number, name in enumerate(groups, start=1):
                found = sum(jnp.sum(part.group_BT[:, 1:] == number) for part in parts)
                members = jnp.maximum(found, 1)
                right = jnp.sum(jnp.where(group_BT == number, jnp.exp(logprob_BT), 0.0))
                metrics[f"p_right/{name}"] = right / members
            metrics["loss"] = loss
            return loss, metrics

        def gradients_of(number: int, part: PretrainBatch) -> tuple[Array, Metrics, Params]:
            return accumulated_gradients(
                loss_fn,
                state.trainable,
                lambda index: micro_batch(part, index, micro_batches),
                micro_batches,
                jax.random.fold_in(key, number),
            )

        shares = [gradients_of(number, part) for number, part in enumerate(parts)]
        loss, metrics, gradients = jax.tree.map(lambda *parts: sum(parts), *shares)
        state, update_metrics = apply_gradients(state, optimizer, gradients, loss)
        targets = sum(part.tokens_BT[:, 1:].size for part in parts)
        metrics["tokens"] = jnp.asarray(targets, jnp.float32)
        return state, metrics | update_metrics

    return jax.jit(step, donate_argnums=0)
