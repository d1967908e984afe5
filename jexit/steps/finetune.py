"""The fine-tuning step: cross-entropy on reference completions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, PRNGKey
from jexit.losses.masked import masked_sum
from jexit.model.policies import Full, Policy
from jexit.model.transformer import run
from jexit.steps.completions import Completions, token_logprobs
from jexit.steps.optim import Metrics, gradient_step
from jexit.steps.state import FixedParams, Params, SplitModel, TrainState


def make_finetune_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    *,
    policy: Policy = Full(),
    micro_batches: int = 1,
) -> Callable[[TrainState, FixedParams, Completions, PRNGKey], tuple[TrainState, Metrics]]:
    """Returns the jitted fine-tuning step (state, fixed, batch, key) → (state, metrics).

    The loss is the mean of −log p(y_t) over the tokens y_t of all completions, including their
    end-of-sequence tokens. Completion tokens leave under `policy`, but the depths are not part of
    the loss, so the exit heads get no gradient. `key` seeds the dropout of the adapters and the
    random depths. Gradients are accumulated over `micro_batches` parts of the batch.
    """

    def step(
        state: TrainState, fixed: FixedParams, batch: Completions, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        tokens = jnp.maximum(jnp.sum(batch.token_BC), 1)

        def loss_fn(params: Params, rows: Completions, key: PRNGKey) -> tuple[Array, Metrics]:
            model = split.student(params, fixed)
            dropout_key, depth_key = jax.random.split(key)
            result = run(
                model,
                rows.tokens_BT,
                policy=policy,
                action_BT=rows.action_BT if policy.leaves_early else None,
                key=depth_key if policy.draws else None,
                dropout_key=dropout_key,
                **rows.layout,
            )
            hidden_BCD = rows.window(result.hidden_BTD)
            logprob_BC, _ = token_logprobs(model.head_VD, hidden_BCD, rows.completion_tokens_BC)
            loss = -masked_sum(logprob_BC, rows.token_BC) / tokens
            return loss, {"loss": loss}

        state, metrics = gradient_step(split, loss_fn, state, optimizer, batch, micro_batches, key)
        metrics["tokens"] = jnp.sum(batch.segment_BT > 0).astype(jnp.float32)
        return state, metrics

    return jax.jit(step, donate_argnums=0)
