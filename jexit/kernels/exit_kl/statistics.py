"""Online statistics of the final distribution and the exits', for every implementation by tiles.

With m the largest logit, x = z − m and S = Σ exp(x), the KL needs
`C = Σ exp(x_final) (x_final − x_exit)`: KL = C / S_final − log S_final + log S_exit. Written in x
and not in z it is exact to rounding at any scale of the logits, and 0 for equal hidden states.

Everything here is elementwise over tokens and exits, whatever their axes, as long as those of the
final distribution broadcast against those of the exits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Final(NamedTuple):
    """Of the final distribution over a part of the vocabulary."""

    max: jax.Array
    sum: jax.Array  # Σ exp(x)
    spread: jax.Array  # Σ exp(x) x
    argmax: jax.Array  # the first of equals


class Exit(NamedTuple):
    """Of an exit's distribution over a part of the vocabulary."""

    max: jax.Array
    sum: jax.Array
    cross: jax.Array  # Σ exp(x_final) (x_final − x_exit)
    argmax: jax.Array


class FinalTile(NamedTuple):
    """The final distribution's x and exp(x), which every exit of the tile needs."""

    x: jax.Array
    exp: jax.Array


def of_final(z: jax.Array, index: jax.Array, axis: int) -> tuple[Final, FinalTile]:
    """Of logits with the vocabulary along `axis`, which the statistics keep with length 1.

    `index` int32 numbers the vocabulary along that axis.
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
    """The same of an exit's logits."""
    top = z.max(axis, keepdims=True)
    x = z - top
    return Exit(
        top,
        jnp.exp(x).sum(axis, keepdims=True),
        (final.exp * (final.x - x)).sum(axis, keepdims=True),
        first_index(z, top, index, axis),
    )


def first_index(z: jax.Array, top: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """Smallest index whose logit is the largest (vectorises, which arg-max does not)."""
    return jnp.where(z == top, index, jnp.iinfo(jnp.int32).max).min(axis, keepdims=True)


def merge_final(left: Final, right: Final) -> Final:
    """Of both parts, the left one first in the vocabulary."""
    top = jnp.maximum(left.max, right.max)

    def rescaled(part: Final) -> tuple[jax.Array, jax.Array]:
        shift = part.max - top
        scale = jnp.exp(shift)
        return scale * part.sum, scale * (part.spread + part.sum * shift)

    (sum_left, spread_left), (sum_right, spread_right) = rescaled(left), rescaled(right)
    argmax = jnp.where(right.max > left.max, right.argmax, left.argmax)
    return Final(top, sum_left + sum_right, spread_left + spread_right, argmax)


def merge_exit(left: Exit, right: Exit, final_left: Final, final_right: Final) -> Exit:
    """Of both parts. When the maxima rise, the difference x_final − x_exit moves."""
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
    """KL, entropy, log-sum-exp and agreement of the whole vocabulary."""
    log_sum = jnp.log(final.sum)
    kl = exits.cross / final.sum - log_sum + jnp.log(exits.sum)
    return (
        jnp.maximum(kl, 0.0),
        log_sum - final.spread / final.sum,
        final.max + log_sum,
        exits.argmax == final.argmax,
    )
