"""Flash attention on TPUs: a wrapper around JAX's splash attention kernel (arXiv:2205.14135).

The attention scores stay in the chip's vector memory, in the forward and the backward pass. Blocks
that the causal mask excludes are not computed. The kernel processes one sequence at a time, with
the head axis first, scaled queries and a length that is a multiple of the block size; the wrapper
transposes, scales and pads its inputs accordingly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from jexit.axes import Array, Float, MaskBT, SegmentBT

LANES = 128
# Queries and keys of a block, from the largest: 512 × 512 float32 scores and the backward kernel's
# other buffers stay under the 16 MiB of VMEM that a kernel may take by default.
BLOCKS = (512, 384, 256)


def block_size(length: int) -> int:
    """Returns the positions per block; sequences are padded to a multiple of this number.

    A length of at most 512 is one block, padded to a multiple of 128 (the lanes of a TPU). For a
    longer sequence, the block size is the one in `BLOCKS` with the least padding (under 256
    positions), and the larger of two with equal padding.
    """
    whole_lanes = -(-length // LANES) * LANES
    if whole_lanes <= BLOCKS[0]:
        return whole_lanes
    return min(BLOCKS, key=lambda block: (-length % block, -block))


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_BT: MaskBT | SegmentBT | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q·k / sqrt(H)) · v over the keys at or before each query in its segment.

    `segment_BT` is a mask that is False at padding, on either side, or, if a row packs several
    texts, the number of each position's text, which is 0 at padding. None means no padding. With
    `interpret`, the kernel runs in Pallas's interpret mode, on any platform but very slowly.
    """
    length, heads, width = q_BTNH.shape[1:]
    block = block_size(length)
    padded = length + -length % block

    def by_head(part_BTNH: Array) -> Array:
        room = [(0, 0), (0, padded - length), (0, 0), (0, 0)]
        return jnp.swapaxes(jnp.pad(part_BTNH, room), 1, 2)

    # Made anew in each trace, because it contains arrays, which a cache would leak to other traces.
    kernel = make_splash_mha_single_device(
        mask=MultiHeadMask([CausalMask((padded, padded))] * heads),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    segments = None
    if segment_BT is not None:
        ids_BT = jnp.pad(segment_BT.astype(jnp.int32), [(0, 0), (0, padded - length)])
        segments = SegmentIds(ids_BT, ids_BT)
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * width**-0.5).astype(q_BTNH.dtype)
    out_BNTH = jax.vmap(kernel)(by_head(scaled_BTNH), by_head(k_BTKH), by_head(v_BTKH), segments)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :length]
