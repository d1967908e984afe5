"""The reference implementation of `exit_kl`: the formula, with all exits' logits in memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ExitKL(NamedTuple):
    """Statistics of the final next-token distribution and of every exit's logit lens.

    Attributes:
      kl_EN: KL(final ‖ exit e) in nats, float32.
      entropy_N: entropy of the final distribution in nats, float32.
      logsumexp_N: log-sum-exp of the final logits, float32.
      agree_EN: whether the exit's distribution and the final distribution have the same arg-max; if
        several logits are equally large, the arg-max is the first index.
    """

    kl_EN: jax.Array
    entropy_N: jax.Array
    logsumexp_N: jax.Array
    agree_EN: jax.Array


def exit_kl(h_final_ND: jax.Array, h_exits_END: jax.Array, head_VD: jax.Array) -> ExitKL:
    """Implements `jexit.kernels.exit_kl` directly by its formula, for tests."""
    head_VD = head_VD.astype(jnp.float32)
    final_NV = h_final_ND.astype(jnp.float32) @ head_VD.T
    exits_ENV = jnp.einsum("end,vd->env", h_exits_END.astype(jnp.float32), head_VD)
    log_final_NV = jax.nn.log_softmax(final_NV)
    log_exits_ENV = jax.nn.log_softmax(exits_ENV)
    final_probability_NV = jnp.exp(log_final_NV)
    kl_EN = jnp.sum(final_probability_NV * (log_final_NV - log_exits_ENV), axis=-1)
    return ExitKL(
        kl_EN=jnp.maximum(kl_EN, 0.0),
        entropy_N=-jnp.sum(final_probability_NV * log_final_NV, axis=-1),
        logsumexp_N=jax.nn.logsumexp(final_NV, axis=-1),
        agree_EN=jnp.argmax(exits_ENV, axis=-1) == jnp.argmax(final_NV, axis=-1),
    )
