"""The reference implementation of `linear_logprob`: the formula, with all logits in memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LinearLogprob(NamedTuple):
    """Statistics of the distribution softmax(head · h) of each token, float32, in nats.

    Attributes:
      logprob_N: log-probability of the target token; −∞ if the target is not in the vocabulary.
      entropy_N: entropy of the distribution.
      logsumexp_N: log-sum-exp of the logits.
    """

    logprob_N: jax.Array
    entropy_N: jax.Array
    logsumexp_N: jax.Array


def linear_logprob(
    h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array, *, temperature: float = 1.0
) -> LinearLogprob:
    """Implements `jexit.kernels.linear_logprob` directly by its formula, for tests."""
    vocab = head_VD.shape[0]
    logits_NV = h_ND.astype(jnp.float32) @ head_VD.astype(jnp.float32).T / temperature
    log_NV = jax.nn.log_softmax(logits_NV)
    logsumexp_N = jax.nn.logsumexp(logits_NV, axis=-1)
    exists_N = (targets_N >= 0) & (targets_N < vocab)
    target_N = jnp.take_along_axis(log_NV, jnp.clip(targets_N, 0, vocab - 1)[:, None], axis=-1)
    # An impossible token still has its normaliser, and the normaliser's gradient.
    impossible_N = -jnp.inf - logsumexp_N
    return LinearLogprob(
        logprob_N=jnp.where(exists_N, target_N[:, 0], impossible_N),
        entropy_N=-jnp.sum(jnp.exp(log_NV) * log_NV, axis=-1),
        logsumexp_N=logsumexp_N,
    )
