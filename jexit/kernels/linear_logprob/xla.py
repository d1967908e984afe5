"""The plain XLA implementation of `linear_logprob`: vocabulary tiles with online statistics.

If only the hidden states are differentiated, and products are float32, the forward pass sums the
derivatives of each token's outputs online, while the logits are in memory. Derivatives of outputs
that the loss does not use are dead code, which XLA removes with their matrix products. Otherwise,
and if a mesh shards the op, the backward pass recomputes the logits tile by tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels import tiles
from jexit.kernels.linear_logprob import reference, statistics, tiled
from jexit.kernels.linear_logprob.reference import LinearLogprob
from jexit.kernels.linear_logprob.statistics import (
    FinishedLogprob,
    LogprobStatistics,
    LogprobWeights,
)
from jexit.kernels.shards import Shards


class _LogprobChoices(NamedTuple):
    requested: tiles.Requested
    temperature: float


class _LogprobTotal(NamedTuple):
    statistics: LogprobStatistics  # [N, 1] each
    rows: LogprobWeights | None  # Σ weight · row of the head [N, D]; None without gradients


class _Units(NamedTuple):
    """The derivatives of entropy and log-sum-exp with respect to the hidden state, for each token.

    The derivative of the log-probability is not stored: it is the target's row of the head minus
    the probability-weighted mean of all rows, which is `logsumexp_ND`.
    """

    entropy_ND: jax.Array
    logsumexp_ND: jax.Array  # the mean row


def linear_logprob(
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> LinearLogprob:
    """Implements `jexit.kernels.linear_logprob` in plain XLA.

    `chunk_tokens` and `chunk_vocab` are the numbers of tokens and vocabulary entries in a tile;
    None lets shapes and platform determine them.
    """
    if h_ND.shape[0] == 0:
        return reference.linear_logprob(h_ND, head_VD, targets_N, temperature=temperature)
    static = _LogprobChoices(tiles.Requested(chunk_tokens, chunk_vocab), temperature)
    if Shards.current(head_VD.shape[0]).divides:
        functions = tiled.TiledLogprob(partial(_of_all, static), partial(_gradients, static))
        return tiled.linear_logprob(functions, h_ND, head_VD, targets_N)
    return _linear_logprob(static, h_ND, head_VD, targets_N)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprob(
    static: _LogprobChoices, h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array
) -> LinearLogprob:
    return statistics.finish(_of_all(static, h_ND, head_VD, targets_N)).out


def _forward(static: _LogprobChoices, *arguments: Any) -> tuple[LinearLogprob, tuple[Any, ...]]:
    """Returns the outputs for N tokens, [N] each, and the residuals for `_backward`.

    This is the forward rule of the custom VJP `_linear_logprob`. Because of `symbolic_zeros`, each
    argument is a pair: `value` is the array, and `perturbed` is True if it is differentiated. The
    residuals are (`_Units`, arrays, None, False) or, where the logits are to be recomputed, (None,
    arrays, statistics, whether the head is differentiated).
    """
    h_ND, head_VD, targets_N = values = tuple(pair.value for pair in arguments)
    head_trains = arguments[1].perturbed
    if not tiles.sums_gradient_online(h_ND, head_VD, head_trains=head_trains):
        finished = statistics.finish(_of_all(static, *values))
        return finished.out, (None, values, finished, head_trains)

    # The sums over rows of the head take memory besides the logits.
    chunks = static.requested.override(tiles.choose_chunks(h_ND.shape[0], head_VD.shape[0], 2))

    def of_chunk(h_ND: jax.Array, targets_N: jax.Array) -> tuple[LinearLogprob, _Units]:
        total = _of_chunk(
            static.temperature, h_ND, targets_N, head_VD, chunks.vocab, with_gradient=True
        )
        out = jax.tree.map(lambda a: a[:, 0], statistics.finish(total.statistics).out)
        return out, _Units(*(unit_ND.astype(h_ND.dtype) for unit_ND in _units(total)))

    out, units = tiles.over_tokens(of_chunk, (h_ND, targets_N), chunks.tokens)
    return out, (units, (None, head_VD, targets_N), None, False)


def _backward(
    static: _LogprobChoices, residuals: tuple[Any, ...], g: LinearLogprob
) -> tuple[jax.Array, jax.Array | None, None]:
    units, (h_ND, head_VD, targets_N), finished, head_trains = residuals
    g, live_N = tiled.used(g)
    if units is not None:
        dtype = units.logsumexp_ND.dtype
        dh_ND = jnp.zeros(units.logsumexp_ND.shape, jnp.float32)
        if g.logprob_N is not None:
            # An impossible target has no row.
            exists_N = (targets_N >= 0) & (targets_N < head_VD.shape[0])
            row_ND = jnp.where(exists_N[:, None], tiles.take_rows(head_VD, targets_N), 0)
            dh_ND += g.logprob_N[:, None] * (row_ND - units.logsumexp_ND)
        if g.entropy_N is not None:
            dh_ND += g.entropy_N[:, None] * units.entropy_ND
        if g.logsumexp_N is not None:
            dh_ND += g.logsumexp_N[:, None] * units.logsumexp_ND
        dh_ND = tiles.tempered(dh_ND, static.temperature)
        # A row that the loss masks out must not bring in its NaN.
        return jnp.where(live_N[:, None], dh_ND, 0).astype(dtype), None, None
    h_ND = jnp.where(live_N[:, None], h_ND, 0)
    head_dtype = head_VD.dtype if head_trains else None
    dh_ND, dhead_VD = _gradients(static, h_ND, head_VD, targets_N, finished, g, head_dtype)
    return dh_ND.astype(h_ND.dtype), dhead_VD, None


_linear_logprob.defvjp(_forward, _backward, symbolic_zeros=True)


def _of_all(
    static: _LogprobChoices, h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array
) -> LogprobStatistics:
    """Returns the statistics [N] of all tokens over the whole vocabulary of the head."""
    chunks = static.requested.override(tiles.choose_chunks(h_ND.shape[0], head_VD.shape[0], 1))

    def of_chunk(h_ND: jax.Array, targets_N: jax.Array) -> LogprobStatistics:
        total = _of_chunk(static.temperature, h_ND, targets_N, head_VD, chunks.vocab)
        return jax.tree.map(lambda array_N1: array_N1[:, 0], total.statistics)

    return tiles.over_tokens(of_chunk, (h_ND, targets_N), chunks.tokens)


def _gradients(
    static: _LogprobChoices,
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    finished: FinishedLogprob,
    g: LinearLogprob,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns gradients for the hidden states and the head, as `tiled.TiledLogprob` describes."""

    def dlogits(
        start: jax.Array | int,
        size: int,
        h_ND: jax.Array,
        targets_N: jax.Array,
        finished: FinishedLogprob,
        g: LinearLogprob,
    ) -> tuple[jax.Array, jax.Array]:
        head_CD = tiles.slice_head(head_VD, start, size)
        finished, g = jax.tree.map(lambda array_N: array_N[:, None], (finished, g))
        hit_NC = _hits(targets_N - start, size)
        z_NC = tiles.tempered(tiles.logits(h_ND, head_CD), static.temperature)
        dz_NC = tiles.tempered(statistics.dlogits(z_NC, hit_NC, g, finished), static.temperature)
        return jnp.where(tiled.live(g), dz_NC, 0), head_CD

    chunks = static.requested.override(tiles.choose_chunks(h_ND.shape[0], head_VD.shape[0], 2))
    return tiles.gradients(dlogits, (h_ND, targets_N, finished, g), head_VD, chunks, head_dtype)


def _of_chunk(
    temperature: float,
    h_ND: jax.Array,
    targets_N: jax.Array,
    head_VD: jax.Array,
    chunk_vocab: int,
    *,
    with_gradient: bool = False,
) -> _LogprobTotal:
    def tile(start: jax.Array | int, size: int) -> _LogprobTotal:
        head_CD = tiles.slice_head(head_VD, start, size)
        z_NC = tiles.tempered(tiles.logits(h_ND, head_CD), temperature)
        part, weights = statistics.of_tile(z_NC, _hits(targets_N - start, size), axis=-1)
        if not with_gradient:
            return _LogprobTotal(part, None)
        rows = LogprobWeights(*(tiles.product(weight, head_CD, (1, 0)) for weight in weights))
        return _LogprobTotal(part, rows)

    return tiles.over_vocab(tile, _merge, head_VD.shape[0], chunk_vocab)


def _merge(left: _LogprobTotal, right: _LogprobTotal) -> _LogprobTotal:
    total, *scales = statistics.merge(left.statistics, right.statistics)
    if left.rows is None:
        return _LogprobTotal(total, None)

    def rescaled(rows: LogprobWeights, by: statistics.LogprobRescale) -> LogprobWeights:
        return LogprobWeights(
            by.scale * rows.weight, by.scale * (rows.spread + rows.weight * by.shift)
        )

    return _LogprobTotal(total, tiles.add(*map(rescaled, (left.rows, right.rows), scales)))


def _units(total: _LogprobTotal) -> _Units:
    """Returns the float32 derivatives [N, D] of entropy and log-sum-exp by the hidden states.

    `total` covers the whole vocabulary.
    """
    sums, rows = total.statistics, total.rows
    mean_ND = rows.weight / sums.sum
    # −p (log p + H) is −p (x − Σ p x): the normaliser cancels.
    return _Units((sums.spread / sums.sum) * mean_ND - rows.spread / sums.sum, mean_ND)


def _hits(targets_N: jax.Array, size: int) -> jax.Array:
    """Returns a mask [N, size] that is true at each token's target in a tile of `size` entries.

    Target 0 is the first entry of the tile; targets may lie outside of the tile.
    """
    return targets_N[:, None] == jnp.arange(size, dtype=targets_N.dtype)
