"""The GPU kernel of `exit_kl`, which keeps logits of the last layer and exits in registers."""

from functools import partial

import jax
import jax.numpy as jnp

from jexit.kernels import gpu
from jexit.kernels.exit_kl import reference, statistics, tiled
from jexit.kernels.exit_kl.reference import ExitKL
from jexit.kernels.exit_kl.statistics import Exit, Final
from jexit.kernels.exit_kl.tiled import ExitKLStatistics
from jexit.kernels.gpu import BY_CHIP, MASKED, MAX_SETS, Blocks, GpuOperands, GpuTile, Set

NEUTRAL = Final(MASKED, 0.0, 0.0, 0), Exit(MASKED, 0.0, 0.0, 0)  # for an empty vocabulary


def exit_kl(
    h_final_ND: jax.Array,
    h_exits_END: jax.Array,
    head_VD: jax.Array,
    *,
    tile: GpuTile = BY_CHIP,
) -> ExitKL:
    """Implements `jexit.kernels.exit_kl` on GPUs; sizes set in `tile` override the defaults."""
    if h_final_ND.shape[0] == 0:
        return reference.exit_kl(h_final_ND, h_exits_END, head_VD)
    if h_exits_END.shape[0] == 0:
        raise NotImplementedError("there are 0 exits, but the kernel needs at least one")
    return tiled.exit_kl(partial(_statistics, tile), h_final_ND, h_exits_END, head_VD)


def _statistics(
    tile: GpuTile, h_final_ND: jax.Array, h_exits_END: jax.Array, head_VD: jax.Array
) -> ExitKLStatistics:
    """Computes the statistics of one device's tokens and vocabulary, one group of exits at a time.

    A group contains as many exits as the registers allow. Each group recomputes the logits of the
    final distribution.
    """
    exits = range(h_exits_END.shape[0])
    groups = -(-len(exits) // (MAX_SETS - 1))
    parts = [
        _of_group(exits[group::groups], tile, h_final_ND, h_exits_END, head_VD)
        for group in range(groups)
    ]
    # Group g contains the exits g, g + groups, …
    ordered = [parts[e % groups].exits[e // groups] for e in exits]
    return ExitKLStatistics(parts[0].final, jax.tree.map(lambda *rows: jnp.stack(rows), *ordered))


def _of_group(exits: range, tile: GpuTile, *arrays: jax.Array) -> ExitKLStatistics:
    """Returns the statistics [N] of the final distribution and of each exit in one group.

    `exits` are the indices of the exits; `arrays` are the arguments of `exit_kl`. The exits'
    statistics form a tuple, not a stacked array, as sizes in Triton must be powers of two.
    """
    h_final_ND, h_exits_END, head_VD = arrays

    def of_tile(blocks: Blocks) -> ExitKLStatistics:
        z_final_TC, *z_exits_TC = blocks.logits
        final, of_final = statistics.of_final(z_final_TC, blocks.index, axis=1)
        of_exits = (statistics.of_exit(z_TC, of_final, blocks.index, axis=1) for z_TC in z_exits_TC)
        return ExitKLStatistics(final, tuple(of_exits))

    def merge(left: ExitKLStatistics, right: ExitKLStatistics) -> ExitKLStatistics:
        of_exits = (
            statistics.merge_exit(*pair, left.final, right.final)
            for pair in zip(left.exits, right.exits, strict=True)
        )
        return ExitKLStatistics(statistics.merge_final(left.final, right.final), tuple(of_exits))

    final, one = NEUTRAL
    sets = (Set(0), *(Set(1, at=(e,)) for e in exits))
    operands = GpuOperands((h_final_ND, h_exits_END), (head_VD,), sets)
    return gpu.statistics(
        of_tile, merge, ExitKLStatistics(final, (one,) * len(exits)), operands, tile
    )
