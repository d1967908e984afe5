"""`exit_kl` on one device or a mesh: merges statistics of each device's part of the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels.exit_kl import statistics
from jexit.kernels.exit_kl.reference import ExitKL
from jexit.kernels.exit_kl.statistics import Exit, Final
from jexit.kernels.shards import Shards


class ExitKLStatistics(NamedTuple):
    """Statistics over part of the vocabulary: [N] for the final distribution, [E, N] for exits."""

    final: Final
    exits: Exit


# (h_final_ND, h_exits_END, head_VD) → ExitKLStatistics of one device's tokens and vocabulary
TiledExitKL = Callable[[jax.Array, jax.Array, jax.Array], ExitKLStatistics]


def exit_kl(
    tiled: TiledExitKL, h_final_ND: jax.Array, h_exits_END: jax.Array, head_VD: jax.Array
) -> ExitKL:
    """Implements `jexit.kernels.exit_kl` on one device or a mesh.

    `tiled` computes the statistics of one device's tokens over its part of the vocabulary.
    """
    shards, tokens = Shards.current(head_VD.shape[0]), h_final_ND.shape[0]

    def local(h_final_ND: jax.Array, h_NED: jax.Array, head_VD: jax.Array) -> ExitKL:
        part = tiled(h_final_ND, jnp.moveaxis(h_NED, 1, 0), head_VD)
        start = shards.vocab_start(head_VD.shape[0])
        part = ExitKLStatistics(
            part.final._replace(argmax=part.final.argmax + start),
            part.exits._replace(argmax=part.exits.argmax + start),
        )
        kl_EN, entropy_N, logsumexp_N, agree_EN = statistics.finish(*shards.merged(part, merge))
        return ExitKL(kl_EN.T, entropy_N, logsumexp_N, agree_EN.T)

    out = shards.run(
        local,
        (
            shards.pad_tokens(h_final_ND),
            shards.pad_tokens(jnp.moveaxis(h_exits_END, 0, 1)),
            head_VD,
        ),
        (shards.tokens, shards.tokens, shards.vocab),
        shards.tokens,
    )
    kl_NE, entropy_N, logsumexp_N, agree_NE = jax.tree.map(lambda array: array[:tokens], out)
    return ExitKL(kl_NE.T, entropy_N, logsumexp_N, agree_NE.T)


def merge(left: ExitKLStatistics, right: ExitKLStatistics) -> ExitKLStatistics:
    """Merges statistics from two parts of the vocabulary, `left` first."""
    return ExitKLStatistics(
        statistics.merge_final(left.final, right.final),
        statistics.merge_exit(left.exits, right.exits, left.final, right.final),
    )
