"""The plain XLA implementation of `exit_kl`: vocabulary tiles with online softmax statistics."""

from functools import partial

import jax
import jax.numpy as jnp

from jexit.kernels import tiles
from jexit.kernels.exit_kl import reference, statistics, tiled
from jexit.kernels.exit_kl.reference import ExitKL
from jexit.kernels.exit_kl.tiled import ExitKLStatistics


def exit_kl(
    h_final_ND: jax.Array,
    h_exits_END: jax.Array,
    head_VD: jax.Array,
    *,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> ExitKL:
    """Implements `jexit.kernels.exit_kl` in plain XLA.

    `chunk_tokens` and `chunk_vocab` are the numbers of tokens and vocabulary entries in a tile;
    None lets shapes and platform determine them.
    """
    if h_final_ND.shape[0] == 0:
        return reference.exit_kl(h_final_ND, h_exits_END, head_VD)
    of_all = partial(_of_all, tiles.Requested(chunk_tokens, chunk_vocab))
    return tiled.exit_kl(of_all, h_final_ND, h_exits_END, head_VD)


def _of_all(
    requested: tiles.Requested,
    h_final_ND: jax.Array,
    h_exits_END: jax.Array,
    head_VD: jax.Array,
) -> ExitKLStatistics:
    (tokens, _), vocab, sets = h_final_ND.shape, head_VD.shape[0], 1 + h_exits_END.shape[0]
    chunks = requested.override(tiles.choose_chunks(tokens, vocab, sets))

    def of_chunk(h_NSD: jax.Array) -> ExitKLStatistics:
        h_SND = jnp.moveaxis(h_NSD, 1, 0)

        def tile(start: jax.Array | int, size: int) -> ExitKLStatistics:
            z_SNC = tiles.logits(h_SND, tiles.slice_head(head_VD, start, size))
            index_C = start + jnp.arange(size, dtype=jnp.int32)
            final, of_final = statistics.of_final(z_SNC[:1], index_C, axis=-1)
            return ExitKLStatistics(
                final, statistics.of_exit(z_SNC[1:], of_final, index_C, axis=-1)
            )

        total = tiles.over_vocab(tile, tiled.merge, vocab, chunks.vocab)
        # From [1 or E, N, 1] to [N, 1 or E]: the tokens go first.
        return jax.tree.map(lambda array: array[..., 0].T, total)

    h_NSD = jnp.concatenate([h_final_ND[:, None], jnp.moveaxis(h_exits_END, 0, 1)], axis=1)
    final, exits = tiles.over_tokens(of_chunk, (h_NSD,), chunks.tokens)
    return ExitKLStatistics(
        jax.tree.map(lambda array_N1: array_N1[:, 0], final),
        jax.tree.map(jnp.transpose, exits),
    )
