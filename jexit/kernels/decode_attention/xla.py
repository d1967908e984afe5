"""The portable implementation of `decode_attention`: an online softmax over blocks of slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # slots


class _Mix(NamedTuple):
    """The running state of the online softmax; G query heads share each key/value head K."""

    mixed_KBGH: jax.Array  # Σ exp(score − top) · value
    top_KBG: jax.Array  # the largest score so far
    total_KBG: jax.Array  # Σ exp(score − top)


def decode_attention(
    q_BNH: jax.Array,
    keys_KLPSH: jax.Array,
    values_KLPSH: jax.Array,
    layer: jax.Array,
    rows_B: jax.Array | None,
    lengths_B: jax.Array,
    *,
    block: int = BLOCK,
) -> jax.Array:
    """Implements `jexit.kernels.decode_attention` in plain XLA, with `block` slots per step."""
    batch, heads, width = q_BNH.shape
    kv_heads, _, _, slots, _ = keys_KLPSH.shape
    block = min(block, slots)
    q_KBGH = jnp.moveaxis(q_BNH.reshape(batch, kv_heads, heads // kv_heads, width), 1, 0)
    q_KBGH = (q_KBGH.astype(jnp.float32) * width**-0.5).astype(keys_KLPSH.dtype)

    def slots_from(part_KLPSH: jax.Array, start: jax.Array) -> jax.Array:
        """Returns the slots `start` … `start` + block − 1 of each query's row, [K, B, block, H]."""
        if rows_B is None:
            sizes = (kv_heads, 1, batch, block, width)
            return jax.lax.dynamic_slice(part_KLPSH, (0, layer, 0, start, 0), sizes)[:, 0]
        sizes = (kv_heads, 1, 1, block, width)

        def of_row(row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(part_KLPSH, (0, layer, row, start, 0), sizes)[:, 0, 0]

        return jax.vmap(of_row, out_axes=1)(rows_B)

    def scores(first: jax.Array, start: jax.Array) -> jax.Array:
        """Returns the attention scores [K, B, G, block] of slots `start` … `start` + block − 1.

        Slots before `first`, and slots that a row has not filled, have the score −∞.
        """
        scores_KBGS = jnp.einsum(
            "KBGH,KBSH->KBGS",
            q_KBGH,
            slots_from(keys_KLPSH, start),
            preferred_element_type=jnp.float32,
        )
        slot_S = start + jnp.arange(block)
        exists_BS = (slot_S >= first) & (slot_S < lengths_B[:, None])
        return jnp.where(exists_BS[:, None], scores_KBGS, -jnp.inf)

    def step(number: jax.Array, so_far: _Mix) -> _Mix:
        first = number * block
        start = jnp.minimum(first, slots - block)  # the last block may overlap the one before
        scores_KBGS = scores(first, start)
        top_KBG = jnp.maximum(so_far.top_KBG, jnp.max(scores_KBGS, axis=-1))
        weights_KBGS = jnp.exp(scores_KBGS - top_KBG[..., None])
        shrink_KBG = jnp.exp(so_far.top_KBG - top_KBG)
        mixed_KBGH = jnp.einsum(
            "KBGS,KBSH->KBGH",
            weights_KBGS.astype(values_KLPSH.dtype),
            slots_from(values_KLPSH, start),
            preferred_element_type=jnp.float32,
        )
        return _Mix(
            so_far.mixed_KBGH * shrink_KBG[..., None] + mixed_KBGH,
            top_KBG,
            so_far.total_KBG * shrink_KBG + jnp.sum(weights_KBGS, axis=-1),
        )

    nothing = _Mix(
        jnp.zeros(q_KBGH.shape, jnp.float32),
        jnp.full(q_KBGH.shape[:-1], -jnp.inf),
        jnp.zeros(q_KBGH.shape[:-1], jnp.float32),
    )
    # The first block contains a key of every row, so that `top` is finite from there on.
    if block == slots:
        mix = step(jnp.zeros((), jnp.int32), nothing)
    else:
        mix = jax.lax.fori_loop(0, -(-jnp.max(lengths_B) // block), step, nothing)
    mixed_KBGH = mix.mixed_KBGH / mix.total_KBG[..., None]
    return jnp.moveaxis(mixed_KBGH, 0, 1).reshape(q_BNH.shape).astype(q_BNH.dtype)
