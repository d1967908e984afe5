"""The TPU kernels of `linear_logprob`: loops over tiles of logits with statistics in VMEM."""

from functools import partial

import jax
import jax.numpy as jnp

from jexit.kernels import tpu
from jexit.kernels.linear_logprob import reference, statistics, tiled
from jexit.kernels.linear_logprob.reference import LinearLogprob
from jexit.kernels.linear_logprob.statistics import FinishedLogprob, LogprobStatistics
from jexit.kernels.tiles import tempered
from jexit.kernels.tpu import BY_CHIP, TpuOperands, TpuTile


def linear_logprob(
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    *,
    temperature: float = 1.0,
    tile: TpuTile = BY_CHIP,
) -> LinearLogprob:
    """Implements `jexit.kernels.linear_logprob` on TPUs; sizes in `tile` override the defaults."""
    if h_ND.shape[0] == 0:
        return reference.linear_logprob(h_ND, head_VD, targets_N, temperature=temperature)
    tpu.check_covers(TpuOperands((h_ND,), (head_VD,)))
    kernels = tiled.TiledLogprob(
        partial(_statistics, tile, temperature), partial(_gradients, tile, temperature)
    )
    return tiled.linear_logprob(kernels, h_ND, head_VD, targets_N)


def _logits(
    blocks: TpuOperands, targets_1T: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Returns a tile's logits [C, T], and a mask [C, T] that is true at each token's target."""
    z_CT = tempered(blocks.logits(blocks.hidden[0][...]), temperature)
    # A target beyond the vocabulary must not meet the last block's masked rows.
    targets_1T = jnp.where(targets_1T < blocks.vocab, targets_1T, -1)
    return z_CT, blocks.index(z_CT.shape) == targets_1T


def _statistics(
    tile: TpuTile,
    temperature: float,
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
) -> LogprobStatistics:
    """Returns one device's statistics [N], as `tiled.TiledLogprob` describes."""
    total = tpu.statistics(
        lambda blocks: statistics.of_tile(*_logits(blocks, blocks.rows, temperature), axis=0)[0],
        lambda left, right: statistics.merge(left, right)[0],
        TpuOperands((h_ND,), (head_VD,), targets_N),
        tile,
    )
    return jax.tree.map(lambda array_1N: array_1N[0], total)


def _gradients(
    tile: TpuTile,
    temperature: float,
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    finished: FinishedLogprob,
    g: LinearLogprob,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns one device's gradients for states and head, as `tiled.TiledLogprob` describes."""

    def dlogits(blocks: TpuOperands) -> jax.Array:
        targets_1T, finished, g = blocks.rows
        dz_CT = statistics.dlogits(*_logits(blocks, targets_1T, temperature), g, finished)
        return jnp.where(tiled.live(g), tempered(dz_CT, temperature), 0)

    operands = TpuOperands((h_ND,), (head_VD,), (targets_N, finished, g))
    return tpu.gradients(dlogits, operands, tile, head_dtype)
