"""`decode_attention` on TPUs, with JAX's paged attention kernel (arXiv:2309.06180)."""

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from jexit.kernels import dispatch
from jexit.kernels.decode_attention.paged import largest_divisor, page_size, pages_of

LANES = 128
# Slots that the kernel copies and multiplies at a time; two such blocks of keys and of values are
# in VMEM at once, 1 MiB for heads of 128 in bfloat16.
BLOCK_SLOTS = 512


def decode_attention(
    q_BNH: jax.Array,
    keys_KLPSH: jax.Array,
    values_KLPSH: jax.Array,
    layer: jax.Array,
    rows_B: jax.Array | None,
    lengths_B: jax.Array,
) -> jax.Array:
    """Implements `jexit.kernels.decode_attention` on TPUs with JAX's paged attention kernel.

    Raises NotImplementedError on GPUs, and for head widths, slot counts or dtypes that it does not
    support.
    """
    platform = dispatch.target().platform
    if platform not in ("tpu", "cpu"):
        raise NotImplementedError(dispatch.WRONG_PLATFORM.format("TPUs", platform.upper()))
    width, slots = q_BNH.shape[-1], keys_KLPSH.shape[3]
    if width % LANES:
        raise NotImplementedError(f"heads have width {width}, but it must be a multiple of {LANES}")
    if keys_KLPSH.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the cache is {keys_KLPSH.dtype}, but it must be bfloat16")
    rows_B = jnp.arange(keys_KLPSH.shape[2]) if rows_B is None else rows_B
    pages = pages_of(keys_KLPSH, values_KLPSH, layer, rows_B)
    at_once = largest_divisor(pages.table.shape[1], BLOCK_SLOTS // page_size(slots))
    scaled_BNH = (q_BNH.astype(jnp.float32) * width**-0.5).astype(keys_KLPSH.dtype)
    interpreted = platform == "cpu"
    with pltpu.force_tpu_interpret_mode() if interpreted else contextlib.nullcontext():
        mixed_BNH = paged_attention(
            scaled_BNH,
            pages.keys,
            pages.values,
            lengths_B.astype(jnp.int32),
            pages.table,
            pages_per_compute_block=at_once,
        )
    return mixed_BNH.astype(q_BNH.dtype)
