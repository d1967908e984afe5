"""Online statistics of the final and the exits' distributions, for tile-by-tile implementations.

Let z be a logit, m the largest logit of its distribution, x = z − m and S = Σ exp(x). The KL is
computed from `C = Σ exp(x_final) (x_final − x_exit)` as KL = C / S_final − log S_final + log
S_exit. Because this formula uses x instead of z, the KL is exact to rounding at any scale of the
logits, and 0 for equal hidden states.

All operations are elementwise over tokens and exits. These two axes may have any positions, as long
as arrays of the final distribution broadcast against those of the exits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Final(NamedTuple):
    """Statistics of the final distribution over a vocabulary part; x is a logit minus `max`."""

    max: jax.Array
    sum: jax.Array  # Σ exp(x)
    spread: jax.Array  # Σ exp(x) x
    argmax: jax.Array  # the first of equals


class Exit(NamedTuple):
    """Statistics of an exit's distribution over a vocabulary part; x is a logit minus `max`."""

    max: jax.Array
    sum: jax.Array
    cross: jax.Array  # Σ exp(x_final) (x_final − x_exit)
    argmax: jax.Array


class FinalTile(NamedTuple):
    """x and exp(x) of the final distribution in a tile; x is a logit minus the largest in the tile.

    The statistics of every exit in this tile are computed from both arrays.
    """

    x: jax.Array
    exp: jax.Array


def of_final(z: jax.Array, index: jax.Array, axis: int) -> tuple[Final, FinalTile]:
    """Returns the final distribution's statistics, and the `FinalTile`, for a tile of logits `z`.

    The vocabulary lies along `axis`, which has length 1 in the statistics. `index` contains the
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
    """Returns an exit's statistics for a tile of its logits `z`.

    `final` is the final distribution in this tile. `axis` and `index` are as in `of_final`: the
    vocabulary axis, and its int32 indices.
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

    Unlike arg-max, the computation consists of vector operations only.
    """
    return jnp.where(z == top, index, jnp.iinfo(jnp.int32).max).min(axis, keepdims=True)


def merge_final(left: Final, right: Final) -> Final:
    """Merges the final distribution's statistics of two vocabulary parts; `left` comes first."""
    top = jnp.maximum(left.max, right.max)

    def rescaled(part: Final) -> tuple[jax.Array, jax.Array]:
        shift = part.max - top
        scale = jnp.exp(shift)
        return scale * part.sum, scale * (part.spread + part.sum * shift)

    (sum_left, spread_left), (sum_right, spread_right) = rescaled(left), rescaled(right)
    argmax = jnp.where(right.max > left.max, right.argmax, left.argmax)
    return Final(top, sum_left + sum_right, spread_left + spread_right, argmax)


def merge_exit(left: Exit, right: Exit, final_left: Final, final_right: Final) -> Exit:
    """Merges an exit's statistics of two parts of the vocabulary; the part `left` comes first.

    `final_left` and `final_right` are the final distribution's statistics of the same parts. When a
    maximum rises, the difference x_final − x_exit shifts.
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
    """Returns KL, entropy, log-sum-exp and arg-max agreement from whole-vocabulary statistics."""
    log_sum = jnp.log(final.sum)
    kl = exits.cross / final.sum - log_sum + jnp.log(exits.sum)
    return (
        jnp.maximum(kl, 0.0),
        log_sum - final.spread / final.sum,
        final.max + log_sum,
        exits.argmax == final.argmax,
    )
