"""The GPU kernels of `linear_logprob`: loops over tiles of logits with statistics in registers."""

from functools import partial

import jax
import jax.numpy as jnp

from jexit.kernels import gpu
from jexit.kernels.gpu import BY_CHIP, MASKED, Blocks, GpuOperands, GpuTile, Set
from jexit.kernels.linear_logprob import reference, statistics, tiled
from jexit.kernels.linear_logprob.reference import LinearLogprob
from jexit.kernels.linear_logprob.statistics import FinishedLogprob, LogprobStatistics
from jexit.kernels.tiles import tempered

NEUTRAL = LogprobStatistics(MASKED, 0.0, 0.0, float("-inf"))  # for an empty vocabulary


def linear_logprob(
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    *,
    temperature: float = 1.0,
    tile: GpuTile = BY_CHIP,
) -> LinearLogprob:
    """Implements `jexit.kernels.linear_logprob` on GPUs; sizes in `tile` override the defaults."""
    if h_ND.shape[0] == 0:
        return reference.linear_logprob(h_ND, head_VD, targets_N, temperature=temperature)
    kernels = tiled.TiledLogprob(
        partial(_statistics, tile, temperature), partial(_gradients, tile, temperature)
    )
    return tiled.linear_logprob(kernels, h_ND, head_VD, targets_N)


def _statistics(
    tile: GpuTile,
    temperature: float,
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
) -> LogprobStatistics:
    """Returns one device's statistics [N], as `tiled.TiledLogprob` describes."""

    def of_tile(blocks: Blocks) -> LogprobStatistics:
        (z_TC,) = blocks.logits
        hit_TC = blocks.index == blocks.rows
        return statistics.of_tile(tempered(z_TC, temperature), hit_TC, axis=1)[0]

    # A target beyond the vocabulary must not hit a masked column of the last tile.
    targets_N = jnp.where(targets_N < head_VD.shape[0], targets_N, -1)
    return gpu.statistics(
        of_tile,
        lambda left, right: statistics.merge(left, right)[0],
        NEUTRAL,
        GpuOperands((h_ND,), (head_VD,), (Set(0),), targets_N),
        tile,
    )


def _gradients(
    tile: GpuTile,
    temperature: float,
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    finished: FinishedLogprob,
    g: LinearLogprob,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns one device's gradients for states and head, as `tiled.TiledLogprob` describes."""

    def dlogits(blocks: Blocks) -> jax.Array:
        targets_T1, finished, g = blocks.rows
        (z_TC,), hit_TC = blocks.logits, blocks.index == targets_T1
        dz_TC = statistics.dlogits(tempered(z_TC, temperature), hit_TC, g, finished)
        return jnp.where(tiled.live(g), tempered(dz_TC, temperature), 0)

    operands = GpuOperands((h_ND,), (head_VD,), (Set(0),), (targets_N, finished, g))
    return gpu.gradients(dlogits, operands, tile, head_dtype)
