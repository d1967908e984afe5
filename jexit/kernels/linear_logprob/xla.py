"""Tiles of the vocabulary with online soft-max statistics and gradient, in plain XLA.

With p = softmax(z), H its entropy and t the target, the gradients to a logit are
`[v = t] − p` (log-probability), `p` (log-sum-exp) and `−p (log p + H)` (entropy).

As in `linear_kl`: when only the hidden states are differentiated, the derivatives of each token's
outputs are summed online while the logits are at hand, and the head's gradient costs nothing (those
of outputs that the loss does not use are dead code, which XLA removes with their matrix product).
When the head is differentiated too, the backward pass recomputes the logits tile by tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jexit.kernels import tiles
from jexit.kernels.linear_logprob import reference
from jexit.kernels.linear_logprob.reference import LinearLogprob


class _Static(NamedTuple):
    chunk_tokens: int | None
    chunk_vocab: int | None

    def override(self, chunks: tiles.Chunks) -> tiles.Chunks:
        return tiles.override(chunks, self.chunk_tokens, self.chunk_vocab)


class _Statistics(NamedTuple):
    """With z a logit, x = z − maximum."""

    max_N: jax.Array
    sum_N: jax.Array  # Σ exp(x)
    spread_N: jax.Array  # Σ exp(x) x
    target_N: jax.Array  # z of the target, −∞ until its tile has come
    row_ND: jax.Array | None  # Σ exp(x) row of the head, with gradient only
    row_spread_ND: jax.Array | None  # Σ exp(x) x row of the head, likewise


class _Finished(NamedTuple):
    out: LinearLogprob
    max_N: jax.Array
    log_sum_N: jax.Array
    mean_N: jax.Array  # Σ p x


class _Units(NamedTuple):
    """∂(output)/∂h for each output and token."""

    logprob_ND: jax.Array
    entropy_ND: jax.Array
    logsumexp_ND: jax.Array


def linear_logprob(
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    *,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> LinearLogprob:
    """See `jexit.kernels.linear_logprob.api.linear_logprob`; chunk sizes override the choice."""
    if h_ND.shape[0] == 0:
        return reference.linear_logprob(h_ND, head_VD, targets_N)
    return _linear_logprob(_Static(chunk_tokens, chunk_vocab), h_ND, head_VD, targets_N)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprob(
    static: _Static, h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array
) -> LinearLogprob:
    chunks = static.override(tiles.choose_chunks(h_ND.shape[0], head_VD.shape[0], 1))
    return tiles.over_tokens(
        lambda *part: _finish(_statistics(*part, head_VD, chunks.vocab)).out,
        (h_ND, targets_N),
        chunks.tokens,
    )


def _forward(
    static: _Static, h_ND: Any, head_VD: Any, targets_N: Any
) -> tuple[LinearLogprob, tuple[Any, ...]]:
    """Arguments are pairs of value and `perturbed`: whether that argument is differentiated."""
    head_trains = head_VD.perturbed
    h_ND, head_VD, targets_N = h_ND.value, head_VD.value, targets_N.value
    tokens, vocab = h_ND.shape[0], head_VD.shape[0]

    chunks = static.override(tiles.choose_chunks(tokens, vocab, 1))
    if head_trains:
        finished = tiles.over_tokens(
            lambda *part: _finish(_statistics(*part, head_VD, chunks.vocab)),
            (h_ND, targets_N),
            chunks.tokens,
        )
        return finished.out, (None, (h_ND, head_VD, targets_N), finished)

    def of_chunk(h_ND: jax.Array, targets_N: jax.Array) -> tuple[LinearLogprob, _Units]:
        total = _statistics(h_ND, targets_N, head_VD, chunks.vocab, with_gradient=True)
        units = _units(targets_N, head_VD, total)
        return _finish(total).out, _Units(*(unit_ND.astype(h_ND.dtype) for unit_ND in units))

    out, units = tiles.over_tokens(of_chunk, (h_ND, targets_N), chunks.tokens)
    return out, (units, None, None)


def _backward(
    static: _Static, residuals: tuple[Any, ...], g: LinearLogprob
) -> tuple[jax.Array, jax.Array | None, None]:
    units, arguments, finished = residuals
    # None where the loss does not use an output: nothing of it is computed below.
    g = LinearLogprob(*(None if isinstance(g_N, SymbolicZero) else g_N for g_N in g))
    live_N = False
    for g_N in g:
        live_N = live_N if g_N is None else live_N | (g_N != 0)

    if units is not None:
        dtype = units.logprob_ND.dtype
        dh_ND = sum(
            g_N[:, None] * unit_ND for g_N, unit_ND in zip(g, units, strict=True) if g_N is not None
        )
        # A row that the loss masks out must not bring in its NaN.
        return jnp.where(live_N[:, None], dh_ND, 0).astype(dtype), None, None

    def of_tile(
        start: jax.Array | int,
        size: int,
        h_ND: jax.Array,
        targets_N: jax.Array,
        live_N: jax.Array,
        g: LinearLogprob,
        finished: _Finished,
    ) -> tuple[jax.Array, jax.Array]:
        h_ND = jnp.where(live_N[:, None], h_ND, 0)
        head_CD = tiles.slice_head(head_VD, start, size)
        dz_NC = _dlogits(tiles.logits(h_ND, head_CD), targets_N - start, g, finished)
        dz_NC = jnp.where(live_N[:, None], dz_NC, 0)
        return tiles.product(dz_NC, head_CD, (1, 0)), tiles.product(dz_NC, h_ND, (0, 0))

    h_ND, head_VD, targets_N = arguments
    chunks = static.override(tiles.choose_head_chunks(h_ND.shape[0], head_VD.shape[0], 1))
    dh_ND, dhead_VD = tiles.head_gradient(
        of_tile, (h_ND, targets_N, live_N, g, finished), head_VD, chunks
    )
    return dh_ND.astype(h_ND.dtype), dhead_VD, None


_linear_logprob.defvjp(_forward, _backward, symbolic_zeros=True)


def _statistics(
    h_ND: jax.Array,
    targets_N: jax.Array,
    head_VD: jax.Array,
    chunk_vocab: int,
    *,
    with_gradient: bool = False,
) -> _Statistics:
    def tile(start: jax.Array | int, size: int) -> _Statistics:
        head_CD = tiles.slice_head(head_VD, start, size)
        z_NC = tiles.logits(h_ND, head_CD)
        max_N = z_NC.max(-1)
        x_NC = z_NC - max_N[:, None]
        exp_NC = jnp.exp(x_NC)
        row_ND = row_spread_ND = None
        if with_gradient:
            row_ND = tiles.product(exp_NC, head_CD, (1, 0))
            row_spread_ND = tiles.product(exp_NC * x_NC, head_CD, (1, 0))
        return _Statistics(
            max_N=max_N,
            sum_N=exp_NC.sum(-1),
            spread_N=(exp_NC * x_NC).sum(-1),
            target_N=jnp.where(_hits(targets_N - start, size), z_NC, -jnp.inf).max(-1),
            row_ND=row_ND,
            row_spread_ND=row_spread_ND,
        )

    return tiles.over_vocab(tile, _merge, head_VD.shape[0], chunk_vocab)


def _merge(left: _Statistics, right: _Statistics) -> _Statistics:
    max_N = jnp.maximum(left.max_N, right.max_N)
    target_N = jnp.maximum(left.target_N, right.target_N)

    def rescaled(part: _Statistics) -> _Statistics:
        shift_N = part.max_N - max_N
        scale_N = jnp.exp(shift_N)
        row_ND = row_spread_ND = None
        if part.row_ND is not None:
            row_ND = scale_N[:, None] * part.row_ND
            row_spread_ND = scale_N[:, None] * (part.row_spread_ND + part.row_ND * shift_N[:, None])
        return _Statistics(
            max_N=max_N,
            sum_N=scale_N * part.sum_N,
            spread_N=scale_N * (part.spread_N + part.sum_N * shift_N),
            target_N=target_N,
            row_ND=row_ND,
            row_spread_ND=row_spread_ND,
        )

    total = tiles.add(rescaled(left), rescaled(right))
    return total._replace(max_N=max_N, target_N=target_N)


def _finish(total: _Statistics) -> _Finished:
    log_sum_N = jnp.log(total.sum_N)
    mean_N = total.spread_N / total.sum_N
    # Differences to the maximum, not to the log-sum-exp: no digits are lost at large logits.
    out = LinearLogprob(
        logprob_N=(total.target_N - total.max_N) - log_sum_N,
        entropy_N=log_sum_N - mean_N,
        logsumexp_N=total.max_N + log_sum_N,
    )
    return _Finished(out, total.max_N, log_sum_N, mean_N)


def _units(targets_N: jax.Array, head_VD: jax.Array, total: _Statistics) -> _Units:
    """Derivative of every output, float32."""
    sum_N1 = total.sum_N[:, None]
    mean_ND = total.row_ND / sum_N1
    # −p (log p + H) is −p (x − Σ p x): the normaliser cancels.
    entropy_ND = (total.spread_N[:, None] / sum_N1) * mean_ND - total.row_spread_ND / sum_N1
    # An impossible target has no row.
    exists_N1 = ((targets_N >= 0) & (targets_N < head_VD.shape[0]))[:, None]
    row_ND = jnp.where(exists_N1, tiles.take_rows(head_VD, targets_N), 0)
    return _Units(row_ND - mean_ND, entropy_ND, mean_ND)


def _hits(targets_N: jax.Array, size: int) -> jax.Array:
    """Where a tile of `size` columns holds the targets, counted from its start."""
    return targets_N[:, None] == jnp.arange(size, dtype=targets_N.dtype)


def _dlogits(
    z_NC: jax.Array, targets_N: jax.Array, g: LinearLogprob, finished: _Finished
) -> jax.Array:
    """Gradient of the loss to a tile's logits; targets count from the tile's start."""
    x_NC = z_NC - finished.max_N[:, None]
    p_NC = jnp.exp(x_NC - finished.log_sum_N[:, None])
    dz_NC = jnp.zeros_like(p_NC)
    if g.logprob_N is not None:
        hit_NC = _hits(targets_N, z_NC.shape[1])
        dz_NC += g.logprob_N[:, None] * (hit_NC - p_NC)
    if g.entropy_N is not None:
        dz_NC -= g.entropy_N[:, None] * p_NC * (x_NC - finished.mean_N[:, None])
    if g.logsumexp_N is not None:
        dz_NC += g.logsumexp_N[:, None] * p_NC
    return dz_NC
