"""Online statistics of a distribution and a target, for every implementation that goes by tiles.

With p = softmax(z), H its entropy and t the target, the gradients to a logit are `[v = t] − p`
(log-probability), `p` (log-sum-exp) and `−p (log p + H)` (entropy). x is a logit less the largest.

Everything here is elementwise over the tokens, whatever their axis: a vector, a row of lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels.linear_logprob.reference import LinearLogprob


class Statistics(NamedTuple):
    """Of a part of the vocabulary, per token."""

    max: jax.Array
    sum: jax.Array  # Σ exp(x)
    spread: jax.Array  # Σ exp(x) x
    target: jax.Array  # z of the target, −∞ where it is not in this part


class Weights(NamedTuple):
    """What multiplies the head's rows in the gradient, per token and vocabulary entry."""

    weight: jax.Array  # exp(x)
    spread: jax.Array  # exp(x) x


class Rescale(NamedTuple):
    """How a part's sums change when the maximum becomes that of the whole."""

    scale: jax.Array
    shift: jax.Array  # of x


class Finished(NamedTuple):
    """The outputs, and what their gradients need."""

    out: LinearLogprob
    max: jax.Array
    log_sum: jax.Array
    mean: jax.Array  # Σ p x


def of_tile(z: jax.Array, hit: jax.Array, axis: int) -> tuple[Statistics, Weights]:
    """Of logits with the vocabulary along `axis`, which the statistics keep with length 1.

    `hit` is true at the target.
    """
    top = z.max(axis, keepdims=True)
    x = z - top
    weight = jnp.exp(x)
    spread = weight * x
    statistics = Statistics(
        top,
        weight.sum(axis, keepdims=True),
        spread.sum(axis, keepdims=True),
        jnp.where(hit, z, -jnp.inf).max(axis, keepdims=True),
    )
    return statistics, Weights(weight, spread)


def merge(left: Statistics, right: Statistics) -> tuple[Statistics, Rescale, Rescale]:
    """Statistics of both parts, and how sums over the left and the right one rescale."""
    top = jnp.maximum(left.max, right.max)

    def rescale(part: Statistics) -> Rescale:
        return Rescale(jnp.exp(part.max - top), part.max - top)

    one, two = rescale(left), rescale(right)
    total = Statistics(
        top,
        one.scale * left.sum + two.scale * right.sum,
        one.scale * (left.spread + left.sum * one.shift)
        + two.scale * (right.spread + right.sum * two.shift),
        jnp.maximum(left.target, right.target),
    )
    return total, one, two


def finish(total: Statistics) -> Finished:
    """Statistics of the whole vocabulary, finished."""
    log_sum, mean = jnp.log(total.sum), total.spread / total.sum
    # Differences to the maximum, not to the log-sum-exp: no digits are lost at large logits.
    out = LinearLogprob(
        logprob_N=(total.target - total.max) - log_sum,
        entropy_N=log_sum - mean,
        logsumexp_N=total.max + log_sum,
    )
    return Finished(out, total.max, log_sum, mean)


def dlogits(z: jax.Array, hit: jax.Array, g: LinearLogprob, finished: Finished) -> jax.Array:
    """Gradient of the loss to logits; all else must broadcast against them.

    `g` holds the loss's derivative by each output, None where the loss does not use it.
    """
    x = z - finished.max
    p = jnp.exp(x - finished.log_sum)
    dz = jnp.zeros_like(p)
    if g.logprob_N is not None:
        dz += g.logprob_N * (hit.astype(p.dtype) - p)
    if g.entropy_N is not None:
        dz -= g.entropy_N * p * (x - finished.mean)
    if g.logsumexp_N is not None:
        dz += g.logsumexp_N * p
    return dz
