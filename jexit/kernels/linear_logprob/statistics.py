"""Online statistics for `linear_logprob`, which are merged tile by tile over the vocabulary.

Let z be the logits, p = softmax(z), H the entropy of p, and t the target. The gradients with
respect to the logit of entry v are `[v = t] − p` for the log-probability, `p` for the log-sum-exp
and `−p (log p + H)` for the entropy. x is a logit minus the largest logit.

All operations are elementwise over the tokens, so the tokens may form a vector or a row of lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels.linear_logprob.reference import LinearLogprob


class LogprobStatistics(NamedTuple):
    """Softmax statistics of each token over part of the vocabulary, float32.

    z is a logit, and x is z minus `max`, the largest logit of this part.
    """

    max: jax.Array
    sum: jax.Array  # Σ exp(x)
    spread: jax.Array  # Σ exp(x) x
    target: jax.Array  # z of the target, −∞ where it is not in this part


class LogprobWeights(NamedTuple):
    """The weights of the head's rows for each token; the weighted sums of rows give the gradient.

    x is a logit minus the largest logit.
    """

    weight: jax.Array  # exp(x)
    spread: jax.Array  # exp(x) x


class LogprobRescale(NamedTuple):
    """The rescaling of sums over one part of the vocabulary when the part is merged with another.

    `scale` multiplies exp(x), where x is a logit minus the largest logit; `shift` is added to x.
    """

    scale: jax.Array
    shift: jax.Array  # of x


class FinishedLogprob(NamedTuple):
    """The outputs of the op, and the whole-vocabulary statistics that their gradients need."""

    out: LinearLogprob
    max: jax.Array
    log_sum: jax.Array
    mean: jax.Array  # Σ p x


def of_tile(z: jax.Array, hit: jax.Array, axis: int) -> tuple[LogprobStatistics, LogprobWeights]:
    """Returns (statistics, weights) for the logits `z` of a tile.

    `hit` is a mask that is true at the target. `axis` is the vocabulary axis of `z`, which has
    length 1 in the statistics.
    """
    top = z.max(axis, keepdims=True)
    x = z - top
    weight = jnp.exp(x)
    spread = weight * x
    statistics = LogprobStatistics(
        top,
        weight.sum(axis, keepdims=True),
        spread.sum(axis, keepdims=True),
        jnp.where(hit, z, -jnp.inf).max(axis, keepdims=True),
    )
    return statistics, LogprobWeights(weight, spread)


def merge(
    left: LogprobStatistics, right: LogprobStatistics
) -> tuple[LogprobStatistics, LogprobRescale, LogprobRescale]:
    """Merges the statistics of two parts of the vocabulary.

    Returns the merged statistics, the `LogprobRescale` of sums over the left part, and that of sums
    over the right part.
    """
    top = jnp.maximum(left.max, right.max)

    def rescale(part: LogprobStatistics) -> LogprobRescale:
        return LogprobRescale(jnp.exp(part.max - top), part.max - top)

    one, two = rescale(left), rescale(right)
    total = LogprobStatistics(
        top,
        one.scale * left.sum + two.scale * right.sum,
        one.scale * (left.spread + left.sum * one.shift)
        + two.scale * (right.spread + right.sum * two.shift),
        jnp.maximum(left.target, right.target),
    )
    return total, one, two


def finish(total: LogprobStatistics) -> FinishedLogprob:
    """Returns the outputs, and the values for their gradients, from whole-vocabulary statistics."""
    log_sum, mean = jnp.log(total.sum), total.spread / total.sum
    # Differences to the maximum, not to the log-sum-exp: no digits are lost at large logits.
    out = LinearLogprob(
        logprob_N=(total.target - total.max) - log_sum,
        entropy_N=log_sum - mean,
        logsumexp_N=total.max + log_sum,
    )
    return FinishedLogprob(out, total.max, log_sum, mean)


def dlogits(z: jax.Array, hit: jax.Array, g: LinearLogprob, finished: FinishedLogprob) -> jax.Array:
    """Returns the gradient of the loss with respect to the logits `z`.

    `hit` is a mask that is true at the target. `g` contains the derivative of the loss with respect
    to each output, or None for an output that the loss does not use. All other arrays must
    broadcast against `z`.
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
