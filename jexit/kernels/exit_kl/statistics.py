"""Online statistics for `exit_kl`, which are merged tile by tile over the vocabulary.

Let z be a logit, m the largest logit of its distribution, x = z − m and S = Σ exp(x). The KL is
computed from `C = Σ exp(x_final) (x_final − x_exit)` as KL = C / S_final − log S_final + log
S_exit. Because this formula uses x instead of z, the KL is exact to rounding at any scale of the
logits, and 0 for equal hidden states.

All operations are elementwise over tokens and exits. These axes may have any positions, as long as
arrays of the final distribution broadcast against those of the exits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Final(NamedTuple):
    """Statistics of the final distribution over part of the vocabulary; x is logit − `max`."""

    max: jax.Array
    sum: jax.Array  # Σ exp(x)
    spread: jax.Array  # Σ exp(x) x
    argmax: jax.Array  # the first of equals


class Exit(NamedTuple):
    """Statistics of an exit's distribution over part of the vocabulary; x is logit − `max`."""

    max: jax.Array
    sum: jax.Array
    cross: jax.Array  # Σ exp(x_final) (x_final − x_exit)
    argmax: jax.Array


class FinalTile(NamedTuple):
    """x and exp(x) of the final distribution, where x is a logit minus the tile's largest logit.

    The statistics of every exit in this tile are computed from these two arrays.
    """

    x: jax.Array
    exp: jax.Array


def of_final(z: jax.Array, index: jax.Array, axis: int) -> tuple[Final, FinalTile]:
    """Returns (statistics, `FinalTile`) of the final distribution, for a tile of its logits `z`.

    `axis` is the vocabulary axis of `z`, which has length 1 in the statistics. `index` contains the
    int32 vocabulary indices along `axis`.
    """
    top = z.max(axis, keepdims=True)
    x = z - top
    exp = jnp.exp(x)
    statistics = Final(
        top,
        exp.sum(axis, keepdims=True),
        (exp * x).sum(axis, keepdims=True),
        first_index(z, top, index, axis),
    )
    return statistics, FinalTile(x, exp)


def of_exit(z: jax.Array, final: FinalTile, index: jax.Array, axis: int) -> Exit:
    """Returns the statistics of an exit's distribution for a tile of its logits `z`.

    `final` is the final distribution in the same tile. As in `of_final`, `axis` is the vocabulary
    axis and `index` contains its int32 vocabulary indices.
    """
    top = z.max(axis, keepdims=True)
    x = z - top
    return Exit(
        top,
        jnp.exp(x).sum(axis, keepdims=True),
        (final.exp * (final.x - x)).sum(axis, keepdims=True),
        first_index(z, top, index, axis),
    )


def first_index(z: jax.Array, top: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """Returns the smallest entry of `index` at which `z` equals its maximum `top`.

    Unlike `argmax`, this uses only elementwise operations and a minimum.
    """
    return jnp.where(z == top, index, jnp.iinfo(jnp.int32).max).min(axis, keepdims=True)


def merge_final(left: Final, right: Final) -> Final:
    """Merges the final distribution's statistics from two parts of the vocabulary, `left` first."""
    top = jnp.maximum(left.max, right.max)

    def rescaled(part: Final) -> tuple[jax.Array, jax.Array]:
        shift = part.max - top
        scale = jnp.exp(shift)
        return scale * part.sum, scale * (part.spread + part.sum * shift)

    (sum_left, spread_left), (sum_right, spread_right) = rescaled(left), rescaled(right)
    argmax = jnp.where(right.max > left.max, right.argmax, left.argmax)
    return Final(top, sum_left + sum_right, spread_left + spread_right, argmax)


def merge_exit(left: Exit, right: Exit, final_left: Final, final_right: Final) -> Exit:
    """Merges an exit's statistics from two parts of the vocabulary, `left` first.

    `final_left` and `final_right` are the statistics of the final distribution over the same parts.
    They are needed because x_final − x_exit shifts when a maximum rises.
    """
    top = jnp.maximum(left.max, right.max)
    final_top = jnp.maximum(final_left.max, final_right.max)

    def rescaled(part: Exit, final: Final) -> tuple[jax.Array, jax.Array]:
        shift, final_shift = part.max - top, final.max - final_top
        cross = jnp.exp(final_shift) * (part.cross + final.sum * (final_shift - shift))
        return jnp.exp(shift) * part.sum, cross

    (sum_left, cross_left), (sum_right, cross_right) = (
        rescaled(left, final_left),
        rescaled(right, final_right),
    )
    argmax = jnp.where(right.max > left.max, right.argmax, left.argmax)
    return Exit(top, sum_left + sum_right, cross_left + cross_right, argmax)


def finish(final: Final, exits: Exit) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the fields of `ExitKL`, in order, from the statistics of the whole vocabulary.

    They are KL(final ‖ exit), the final distribution's entropy and log-sum-exp (all in nats), and
    whether the arg-max of exit and final distribution agree.
    """
    log_sum = jnp.log(final.sum)
    kl = exits.cross / final.sum - log_sum + jnp.log(exits.sum)
    return (
        jnp.maximum(kl, 0.0),
        log_sum - final.spread / final.sum,
        final.max + log_sum,
        exits.argmax == final.argmax,
    )
