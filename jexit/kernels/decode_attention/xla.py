"""Portable version: blocks of slots up to the longest row's end, with an online soft-max."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # slots


class _Mix(NamedTuple):
    """Soft-max statistics of the slots so far."""

    mixed_BKGH: jax.Array  # Σ exp(score − top) · value
    top_BKG: jax.Array
    total_BKG: jax.Array  # Σ exp(score − top)


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
    """See `jexit.kernels.decode_attention.api.decode_attention`."""
    batch, heads, width = q_BNH.shape
    kv_heads, _, _, slots, _ = keys_KLPSH.shape
    block = min(block, slots)
    q_BKGH = q_BNH.reshape(batch, kv_heads, heads // kv_heads, width)
    q_BKGH = (q_BKGH.astype(jnp.float32) * width**-0.5).astype(keys_KLPSH.dtype)

    def slots_from(part_KLPSH: jax.Array, start: jax.Array) -> jax.Array:
        """[K, B, block, H]: of all rows a slice, of some a gather."""
        if rows_B is None:
            sizes = (kv_heads, 1, batch, block, width)
            return jax.lax.dynamic_slice(part_KLPSH, (0, layer, 0, start, 0), sizes)[:, 0]
        sizes = (kv_heads, 1, 1, block, width)

        def of_row(row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(part_KLPSH, (0, layer, row, start, 0), sizes)[:, 0, 0]

        return jax.vmap(of_row, out_axes=1)(rows_B)

    def scores(first: jax.Array, start: jax.Array) -> jax.Array:
        """Of the slots `first` … `start` + block − 1 that exist; −∞ elsewhere."""
        scores_BKGS = jnp.einsum(
            "BKGH,KBSH->BKGS",
            q_BKGH,
            slots_from(keys_KLPSH, start),
            preferred_element_type=jnp.float32,
        )
        slot_S = start + jnp.arange(block)
        exists_BS = (slot_S >= first) & (slot_S < lengths_B[:, None])
        return jnp.where(exists_BS[:, None, None], scores_BKGS, -jnp.inf)

    def step(number: jax.Array, so_far: _Mix) -> _Mix:
        first = number * block
        start = jnp.minimum(first, slots - block)  # the last block may overlap the one before
        scores_BKGS = scores(first, start)
        top_BKG = jnp.maximum(so_far.top_BKG, jnp.max(scores_BKGS, axis=-1))
        weights_BKGS = jnp.exp(scores_BKGS - top_BKG[..., None])
        shrink_BKG = jnp.exp(so_far.top_BKG - top_BKG)
        mixed_BKGH = jnp.einsum(
            "BKGS,KBSH->BKGH",
            weights_BKGS.astype(values_KLPSH.dtype),
            slots_from(values_KLPSH, start),
            preferred_element_type=jnp.float32,
        )
        return _Mix(
            so_far.mixed_BKGH * shrink_BKG[..., None] + mixed_BKGH,
            top_BKG,
            so_far.total_BKG * shrink_BKG + jnp.sum(weights_BKGS, axis=-1),
        )

    nothing = _Mix(
        jnp.zeros(q_BKGH.shape, jnp.float32),
        jnp.full(q_BKGH.shape[:-1], -jnp.inf),
        jnp.zeros(q_BKGH.shape[:-1], jnp.float32),
    )
    # The first block holds a key of every row, so that `top` is finite from there on.
    if block == slots:
        mix = step(jnp.zeros((), jnp.int32), nothing)
    else:
        mix = jax.lax.fori_loop(0, -(-jnp.max(lengths_B) // block), step, nothing)
    mixed_BKGH = mix.mixed_BKGH / mix.total_BKG[..., None]
    return mixed_BKGH.reshape(q_BNH.shape).astype(q_BNH.dtype)
