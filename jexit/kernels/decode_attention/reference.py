"""The reference implementation of `decode_attention`: the definition, without any tiling."""

import jax
import jax.numpy as jnp


def decode_attention(
    q_BNH: jax.Array,
    keys_KLPSH: jax.Array,
    values_KLPSH: jax.Array,
    layer: jax.Array,
    rows_B: jax.Array | None,
    lengths_B: jax.Array,
) -> jax.Array:
    """Implements `jexit.kernels.decode_attention` directly by its formula, for tests."""
    batch, heads, width = q_BNH.shape
    kv_heads, _, rows, slots, _ = keys_KLPSH.shape
    rows_B = jnp.arange(rows) if rows_B is None else rows_B
    k_BKSH, v_BKSH = (
        jnp.swapaxes(part[:, layer, rows_B], 0, 1).astype(jnp.float32)
        for part in (keys_KLPSH, values_KLPSH)
    )
    q_BKGH = q_BNH.reshape(batch, kv_heads, heads // kv_heads, width).astype(jnp.float32)
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH * width**-0.5, k_BKSH)
    exists_BS = jnp.arange(slots) < lengths_B[:, None]
    weights_BKGS = jax.nn.softmax(jnp.where(exists_BS[:, None, None], scores_BKGS, -jnp.inf))
    mixed_BKGH = jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS, v_BKSH)
    return mixed_BKGH.reshape(q_BNH.shape).astype(q_BNH.dtype)
