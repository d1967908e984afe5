"""Tiles of the vocabulary with online soft-max statistics, in plain XLA.

For a tile, with m the maximum, x = z − m and S = Σ exp(x) per hidden state, the KL needs
`C = Σ exp(x_final) (x_final − x_exit)`: KL = C / S_final − log S_final + log S_exit. Written in x
and not in z it is exact to rounding at any scale of the logits, and 0 for equal hidden states. When
a later tile raises a maximum by δ, exp(x) shrinks by exp(−δ) and the difference moves by
δ_exit − δ_final.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels import tiles
from jexit.kernels.exit_kl import reference
from jexit.kernels.exit_kl.reference import ExitKL


class _Statistics(NamedTuple):
    """Axis S is the final hidden state followed by the E exits."""

    max_NS: jax.Array
    sum_NS: jax.Array  # Σ exp(x)
    cross_NE: jax.Array  # Σ exp(x_final) (x_final − x_exit)
    spread_N: jax.Array  # Σ exp(x_final) x_final
    argmax_NS: jax.Array


def exit_kl(
    h_final_ND: jax.Array,
    h_exits_END: jax.Array,
    head_VD: jax.Array,
    *,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> ExitKL:
    """See `jexit.kernels.exit_kl.api.exit_kl`; the chunk sizes override the choice by shape."""
    tokens, vocab = h_final_ND.shape[0], head_VD.shape[0]
    if tokens == 0:
        return reference.exit_kl(h_final_ND, h_exits_END, head_VD)
    h_NSD = jnp.concatenate([h_final_ND[:, None], jnp.moveaxis(h_exits_END, 0, 1)], axis=1)
    chunks = tiles.override(
        tiles.choose_chunks(tokens, vocab, h_NSD.shape[1]), chunk_tokens, chunk_vocab
    )

    def of_chunk(h_NSD: jax.Array) -> tuple[jax.Array, ...]:
        def tile(start: jax.Array | int, size: int) -> _Statistics:
            head_CD = tiles.slice_head(head_VD, start, size)
            return _of_tile(tiles.logits(h_NSD, head_CD), start)

        return _finish(tiles.over_vocab(tile, _merge, vocab, chunks.vocab))

    kl_NE, entropy_N, logsumexp_N, agree_NE = tiles.over_tokens(of_chunk, (h_NSD,), chunks.tokens)
    return ExitKL(kl_NE.T, entropy_N, logsumexp_N, agree_NE.T)


def _of_tile(z_NSC: jax.Array, start: jax.Array | int) -> _Statistics:
    max_NS = z_NSC.max(-1)
    x_NSC = z_NSC - max_NS[..., None]
    exp_NSC = jnp.exp(x_NSC)
    x_final_N1C = x_NSC[:, :1]
    exp_final_N1C = exp_NSC[:, :1]
    return _Statistics(
        max_NS=max_NS,
        sum_NS=exp_NSC.sum(-1),
        cross_NE=(exp_final_N1C * (x_final_N1C - x_NSC[:, 1:])).sum(-1),
        spread_N=(exp_final_N1C * x_final_N1C).sum((-2, -1)),
        argmax_NS=tiles.first_index_of(max_NS[..., None], z_NSC, start),
    )


def _merge(left: _Statistics, right: _Statistics) -> _Statistics:
    max_NS = jnp.maximum(left.max_NS, right.max_NS)

    def rescaled(part: _Statistics) -> tuple[jax.Array, jax.Array, jax.Array]:
        shift_NS = part.max_NS - max_NS
        scale_NS = jnp.exp(shift_NS)
        sum_final_N1 = part.sum_NS[:, :1]
        cross_NE = part.cross_NE + sum_final_N1 * (shift_NS[:, :1] - shift_NS[:, 1:])
        spread_N = part.spread_N + part.sum_NS[:, 0] * shift_NS[:, 0]
        return scale_NS * part.sum_NS, scale_NS[:, :1] * cross_NE, scale_NS[:, 0] * spread_N

    sums, crosses, spreads = zip(rescaled(left), rescaled(right), strict=True)
    return _Statistics(
        max_NS=max_NS,
        sum_NS=sums[0] + sums[1],
        cross_NE=crosses[0] + crosses[1],
        spread_N=spreads[0] + spreads[1],
        argmax_NS=jnp.where(right.max_NS > left.max_NS, right.argmax_NS, left.argmax_NS),
    )


def _finish(total: _Statistics) -> tuple[jax.Array, ...]:
    log_sum_NS = jnp.log(total.sum_NS)
    sum_final_N = total.sum_NS[:, 0]
    kl_NE = total.cross_NE / sum_final_N[:, None] - log_sum_NS[:, :1] + log_sum_NS[:, 1:]
    return (
        jnp.maximum(kl_NE, 0.0),
        log_sum_NS[:, 0] - total.spread_N / sum_final_N,
        total.max_NS[:, 0] + log_sum_NS[:, 0],
        total.argmax_NS[:, 1:] == total.argmax_NS[:, :1],
    )
