"""`decode_attention` on GPUs, with JAX's paged attention kernel in Triton (arXiv:2309.06180)."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

from jexit.kernels import dispatch
from jexit.kernels.decode_attention.paged import largest_divisor, page_size, pages_of

BLOCK_SLOTS = 128  # slots that a program multiplies at a time
SPLITS = 16  # programs per row, whose results are merged, so that few rows fill the chip


def decode_attention(
    q_BNH: jax.Array,
    keys_KLPSH: jax.Array,
    values_KLPSH: jax.Array,
    layer: jax.Array,
    rows_B: jax.Array | None,
    lengths_B: jax.Array,
) -> jax.Array:
    """Implements `jexit.kernels.decode_attention` on GPUs with JAX's paged attention kernel.

    Raises NotImplementedError on TPUs, and for head widths or slot counts that it does not support.
    """
    platform = dispatch.target().platform
    if platform not in ("gpu", "cpu"):
        raise NotImplementedError(dispatch.WRONG_PLATFORM.format("GPUs", platform.upper()))
    width, slots = q_BNH.shape[-1], keys_KLPSH.shape[3]
    if width < 16 or width & (width - 1):
        raise NotImplementedError(
            f"heads have width {width}, but it must be a power of two from 16"
        )
    rows_B = jnp.arange(keys_KLPSH.shape[2]) if rows_B is None else rows_B
    pages = pages_of(keys_KLPSH, values_KLPSH, layer, rows_B)
    of_row = pages.table.shape[1]
    splits = largest_divisor(of_row, SPLITS)
    at_once = largest_divisor(of_row // splits, max(1, BLOCK_SLOTS // page_size(slots)))
    scaled_BNH = (q_BNH.astype(jnp.float32) * width**-0.5).astype(keys_KLPSH.dtype)
    mixed_BNH = paged_attention(
        scaled_BNH,
        pages.keys,
        pages.values,
        pages.table,
        lengths_B.astype(jnp.int32),
        pages_per_compute_block=at_once,
        k_splits=splits,
        interpret=platform == "cpu",
    )
    return mixed_BNH.astype(q_BNH.dtype)
