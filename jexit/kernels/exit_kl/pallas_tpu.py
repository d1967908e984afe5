"""The TPU kernel of `exit_kl`, which multiplies tiles of the head by all hidden states."""

from functools import partial

import jax
import jax.numpy as jnp

from jexit.kernels import tpu
from jexit.kernels.exit_kl import reference, statistics, tiled
from jexit.kernels.exit_kl.reference import ExitKL
from jexit.kernels.exit_kl.tiled import ExitKLStatistics
from jexit.kernels.tpu import BY_CHIP, TpuOperands, TpuTile


def exit_kl(
    h_final_ND: jax.Array,
    h_exits_END: jax.Array,
    head_VD: jax.Array,
    *,
    tile: TpuTile = BY_CHIP,
) -> ExitKL:
    """Implements `jexit.kernels.exit_kl` on TPUs; sizes set in `tile` override the defaults."""
    if h_final_ND.shape[0] == 0:
        return reference.exit_kl(h_final_ND, h_exits_END, head_VD)
    if h_exits_END.shape[0] == 0:
        raise NotImplementedError("there are 0 exits, but the kernel needs at least one")
    tpu.check_covers(TpuOperands((h_final_ND, h_exits_END), (head_VD,)))
    return tiled.exit_kl(partial(_statistics, tile), h_final_ND, h_exits_END, head_VD)


def _statistics(
    tile: TpuTile, h_final_ND: jax.Array, h_exits_END: jax.Array, head_VD: jax.Array
) -> ExitKLStatistics:
    def of_tile(blocks: TpuOperands) -> ExitKLStatistics:
        h_final, h_exits = blocks.hidden
        z_final_CT = blocks.logits(h_final[...])
        index_CT = blocks.index(z_final_CT.shape)
        final, of_final = statistics.of_final(z_final_CT, index_CT, axis=0)
        exits = [
            statistics.of_exit(blocks.logits(h_exits[e]), of_final, index_CT, axis=0)
            for e in range(h_exits.shape[0])
        ]
        return ExitKLStatistics(final, jax.tree.map(lambda *rows: jnp.concatenate(rows), *exits))

    total = tpu.statistics(
        of_tile, tiled.merge, TpuOperands((h_final_ND, h_exits_END), (head_VD,)), tile
    )
    return ExitKLStatistics(jax.tree.map(lambda array_1N: array_1N[0], total.final), total.exits)
