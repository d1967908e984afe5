"""Tiles of the vocabulary with online soft-max statistics and gradient, in plain XLA.

With p the student's and q the teacher's distribution and gap = log p − log q, the gradient to a
student logit is `p (gap − Σ p gap)` for KL(p‖q), `p − q` for KL(q‖p), and their sum for Jeffreys.

Each token's KL depends on its own hidden state alone, so the derivative `u_ND = ∂kl_N/∂h_ND` can be
taken while the logits are at hand: the rows of the head, weighted by exp(x), by exp(x) · gap and by
the teacher's exp(x), are summed online like the normalisers, and the backward pass is `g_N · u_ND`.
This happens when only the hidden states are differentiated (`symbolic_zeros` tells) and then the
head's gradient costs nothing. When the head is differentiated too, the forward pass keeps its
statistics, and the backward pass recomputes the logits tile by tile for both gradients.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels import tiles
from jexit.kernels.linear_kl import reference
from jexit.kernels.linear_kl.reference import JEFFREYS, STUDENT_TEACHER, TEACHER_STUDENT


class _Static(NamedTuple):
    direction: str
    chunk_tokens: int | None
    chunk_vocab: int | None

    def override(self, chunks: tiles.Chunks) -> tiles.Chunks:
        return tiles.override(chunks, self.chunk_tokens, self.chunk_vocab)


class _Statistics(NamedTuple):
    """Axis 2 is (student, teacher); with z a logit, x = z − maximum, gap = x_student − x_teacher.

    Under the student's weights the gap is centred: it counts from the student's arg-max, where most
    of the weight is. The gradient is a difference to the mean gap, and a distance between the two
    maxima of hundreds of nats would drown it. What the direction does not ask for is None, and so
    are the sums over rows of the head where no gradient is.
    """

    max_N2: jax.Array
    sum_N2: jax.Array  # Σ exp(x)
    pivot_N: jax.Array | None  # teacher's logit at the student's arg-max (the largest of equals)
    gap_student_N: jax.Array | None  # Σ exp(x_student) centred gap
    gap_teacher_N: jax.Array | None  # Σ exp(x_teacher) gap
    row_ND: jax.Array | None  # Σ exp(x_student) row
    row_gap_ND: jax.Array | None  # Σ exp(x_student) centred gap row
    row_teacher_ND: jax.Array | None  # Σ exp(x_teacher) row


class _Finished(NamedTuple):
    kl_N: jax.Array
    pivot_N: jax.Array | None
    mean_gap_N: jax.Array | None  # Σ p centred gap
    max_N2: jax.Array
    log_sum_N2: jax.Array


def linear_kl(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None = None,
    *,
    direction: str = STUDENT_TEACHER,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> jax.Array:
    """See `jexit.kernels.linear_kl.api.linear_kl`; the chunk sizes override the choice by shape."""
    if h_student_ND.shape[0] == 0:
        return reference.linear_kl(
            h_student_ND, h_teacher_ND, head_VD, head_teacher_VD, direction=direction
        )
    static = _Static(direction, chunk_tokens, chunk_vocab)
    return _linear_kl(static, h_student_ND, h_teacher_ND, head_VD, head_teacher_VD)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_kl(
    static: _Static,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None,
) -> jax.Array:
    chunks = static.override(tiles.choose_chunks(h_student_ND.shape[0], head_VD.shape[0], 2))

    def of_chunk(h_student_ND: jax.Array, h_teacher_ND: jax.Array) -> jax.Array:
        heads = (head_VD, head_teacher_VD)
        total = _statistics(static, h_student_ND, h_teacher_ND, heads, chunks.vocab)
        return _finish(total).kl_N

    return tiles.over_tokens(of_chunk, (h_student_ND, h_teacher_ND), chunks.tokens)


def _forward(
    static: _Static, h_student_ND: Any, h_teacher_ND: Any, head_VD: Any, head_teacher_VD: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Arguments are pairs of value and `perturbed`: whether that argument is differentiated."""
    heads = (head_VD.value, None if head_teacher_VD is None else head_teacher_VD.value)
    hidden = (h_student_ND.value, h_teacher_ND.value)
    tokens, vocab = hidden[0].shape[0], heads[0].shape[0]

    if head_VD.perturbed:
        chunks = static.override(tiles.choose_chunks(tokens, vocab, 2))
        finished = tiles.over_tokens(
            lambda *h: _finish(_statistics(static, *h, heads, chunks.vocab)), hidden, chunks.tokens
        )
        return finished.kl_N, (None, hidden, heads, finished)

    # Weights of the head's rows lie beside the logits: a third tile as large as each of the two.
    chunks = static.override(tiles.choose_chunks(tokens, vocab, 3))

    def of_chunk(h_student_ND: jax.Array, h_teacher_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = _statistics(
            static, h_student_ND, h_teacher_ND, heads, chunks.vocab, with_gradient=True
        )
        return _finish(total).kl_N, _unit(total).astype(h_student_ND.dtype)

    kl_N, unit_ND = tiles.over_tokens(of_chunk, hidden, chunks.tokens)
    return kl_N, (unit_ND, None, None, None)


def _backward(static: _Static, residuals: tuple[Any, ...], g_N: jax.Array) -> tuple[Any, ...]:
    unit_ND, hidden, heads, finished = residuals
    live_N = g_N != 0  # a row that the loss masks out must not bring in its NaN
    if unit_ND is not None:
        dh_ND = jnp.where(live_N[:, None], g_N[:, None] * unit_ND, 0).astype(unit_ND.dtype)
        return dh_ND, None, None, None

    def of_tile(
        start: jax.Array | int,
        size: int,
        h_student_ND: jax.Array,
        h_teacher_ND: jax.Array,
        g_N: jax.Array,
        finished: _Finished,
    ) -> tuple[jax.Array, jax.Array]:
        live_N1 = g_N[:, None] != 0
        h_student_ND = jnp.where(live_N1, h_student_ND, 0)
        z_N2C, head_CD = _logits(h_student_ND, h_teacher_ND, heads, start, size)
        dz_NC = jnp.where(live_N1, g_N[:, None] * _dlogits(static, z_N2C, finished), 0)
        return tiles.product(dz_NC, head_CD, (1, 0)), tiles.product(dz_NC, h_student_ND, (0, 0))

    head_VD = heads[0]
    chunks = static.override(tiles.choose_head_chunks(hidden[0].shape[0], head_VD.shape[0], 2))
    dh_ND, dhead_VD = tiles.head_gradient(of_tile, (*hidden, g_N, finished), head_VD, chunks)
    return dh_ND.astype(hidden[0].dtype), None, dhead_VD, None


_linear_kl.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    heads: tuple[jax.Array, jax.Array | None],
    start: jax.Array | int,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """Logits of both [N, 2, C], and the student's tile of the head."""
    head_CD = tiles.slice_head(heads[0], start, size)
    if heads[1] is None:  # one product for both: the tile is read once
        return tiles.logits(jnp.stack([h_student_ND, h_teacher_ND], axis=1), head_CD), head_CD
    teacher_NC = tiles.logits(h_teacher_ND, tiles.slice_head(heads[1], start, size))
    return jnp.stack([tiles.logits(h_student_ND, head_CD), teacher_NC], axis=1), head_CD


def _statistics(
    static: _Static,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    heads: tuple[jax.Array, jax.Array | None],
    chunk_vocab: int,
    *,
    with_gradient: bool = False,
) -> _Statistics:
    of_student = static.direction in (STUDENT_TEACHER, JEFFREYS)
    of_teacher = static.direction in (TEACHER_STUDENT, JEFFREYS)

    def tile(start: jax.Array | int, size: int) -> _Statistics:
        z_N2C, head_CD = _logits(h_student_ND, h_teacher_ND, heads, start, size)
        max_N2 = z_N2C.max(-1)
        x_N2C = z_N2C - max_N2[..., None]
        exp_N2C = jnp.exp(x_N2C)
        pivot_N = gap_student_N = gap_teacher_N = None
        if of_student:
            pivot_N = jnp.where(x_N2C[:, 0] == 0, z_N2C[:, 1], -jnp.inf).max(-1)
            weighted_gap_NC = exp_N2C[:, 0] * _centred_gap(x_N2C[:, 0], z_N2C[:, 1], pivot_N)
            gap_student_N = weighted_gap_NC.sum(-1)
        if of_teacher:
            gap_teacher_N = (exp_N2C[:, 1] * (x_N2C[:, 0] - x_N2C[:, 1])).sum(-1)
        row_ND = row_gap_ND = row_teacher_ND = None
        if with_gradient:
            row_ND = tiles.product(exp_N2C[:, 0], head_CD, (1, 0))
            if of_student:
                row_gap_ND = tiles.product(weighted_gap_NC, head_CD, (1, 0))
            if of_teacher:
                row_teacher_ND = tiles.product(exp_N2C[:, 1], head_CD, (1, 0))
        return _Statistics(
            max_N2=max_N2,
            sum_N2=exp_N2C.sum(-1),
            pivot_N=pivot_N,
            gap_student_N=gap_student_N,
            gap_teacher_N=gap_teacher_N,
            row_ND=row_ND,
            row_gap_ND=row_gap_ND,
            row_teacher_ND=row_teacher_ND,
        )

    return tiles.over_vocab(tile, _merge, heads[0].shape[0], chunk_vocab)


def _merge(left: _Statistics, right: _Statistics) -> _Statistics:
    """When a maximum rises by δ, exp(x) shrinks by exp(−δ) and the gaps move."""
    max_N2 = jnp.maximum(left.max_N2, right.max_N2)
    pivot_N = None
    if left.pivot_N is not None:
        ahead_N = left.max_N2[:, 0] - right.max_N2[:, 0]
        of_equals_N = jnp.maximum(left.pivot_N, right.pivot_N)
        pivot_N = jnp.where(ahead_N < 0, right.pivot_N, of_equals_N)
        pivot_N = jnp.where(ahead_N > 0, left.pivot_N, pivot_N)

    def rescaled(part: _Statistics) -> _Statistics:
        shift_N2 = part.max_N2 - max_N2
        scale_N2 = jnp.exp(shift_N2)
        gap_student_N = gap_teacher_N = row_ND = row_gap_ND = row_teacher_ND = None
        if part.row_ND is not None:
            row_ND = scale_N2[:, :1] * part.row_ND
        if part.pivot_N is not None:
            move_N = shift_N2[:, 0] - (part.pivot_N - pivot_N)
            gap_student_N = scale_N2[:, 0] * (part.gap_student_N + part.sum_N2[:, 0] * move_N)
            if row_ND is not None:
                row_gap_ND = scale_N2[:, :1] * (part.row_gap_ND + part.row_ND * move_N[:, None])
        if part.gap_teacher_N is not None:
            move_N = shift_N2[:, 0] - shift_N2[:, 1]
            gap_teacher_N = scale_N2[:, 1] * (part.gap_teacher_N + part.sum_N2[:, 1] * move_N)
            if row_ND is not None:
                row_teacher_ND = scale_N2[:, 1:] * part.row_teacher_ND
        return _Statistics(
            max_N2=max_N2,
            sum_N2=scale_N2 * part.sum_N2,
            pivot_N=pivot_N,
            gap_student_N=gap_student_N,
            gap_teacher_N=gap_teacher_N,
            row_ND=row_ND,
            row_gap_ND=row_gap_ND,
            row_teacher_ND=row_teacher_ND,
        )

    total = tiles.add(rescaled(left), rescaled(right))
    return total._replace(max_N2=max_N2, pivot_N=pivot_N)


def _finish(total: _Statistics) -> _Finished:
    log_sum_N2 = jnp.log(total.sum_N2)
    # log p − log q is the gap less this, and the centred gap less this and the pivot's distance.
    offset_N = log_sum_N2[:, 0] - log_sum_N2[:, 1]
    kl_N = jnp.zeros_like(offset_N)
    mean_gap_N = None
    if total.pivot_N is not None:
        mean_gap_N = total.gap_student_N / total.sum_N2[:, 0]
        kl_N += (mean_gap_N - offset_N) + (total.max_N2[:, 1] - total.pivot_N)
    if total.gap_teacher_N is not None:
        kl_N += offset_N - total.gap_teacher_N / total.sum_N2[:, 1]
    kl_N = jnp.maximum(kl_N, 0.0)
    return _Finished(kl_N, total.pivot_N, mean_gap_N, total.max_N2, log_sum_N2)


def _centred_gap(x_student_NC: jax.Array, z_teacher_NC: jax.Array, pivot_N: jax.Array) -> jax.Array:
    return x_student_NC - (z_teacher_NC - pivot_N[:, None])


def _unit(total: _Statistics) -> jax.Array:
    """∂kl_N/∂h_student_ND, float32."""
    sum_N2 = total.sum_N2
    row_ND = total.row_ND / sum_N2[:, :1]
    unit_ND = jnp.zeros_like(row_ND)
    if total.row_gap_ND is not None:
        mean_gap_N = total.gap_student_N / sum_N2[:, 0]
        unit_ND += total.row_gap_ND / sum_N2[:, :1] - mean_gap_N[:, None] * row_ND
    if total.row_teacher_ND is not None:
        unit_ND += row_ND - total.row_teacher_ND / sum_N2[:, 1:]
    return unit_ND


def _dlogits(static: _Static, z_N2C: jax.Array, finished: _Finished) -> jax.Array:
    """∂kl/∂(student's logits) [N, C] for a tile."""
    x_N2C = z_N2C - finished.max_N2[..., None]
    p_N2C = jnp.exp(x_N2C - finished.log_sum_N2[..., None])
    dz_NC = jnp.zeros_like(p_N2C[:, 0])
    if static.direction in (STUDENT_TEACHER, JEFFREYS):
        # The normalisers cancel between the gap and its mean.
        gap_NC = _centred_gap(x_N2C[:, 0], z_N2C[:, 1], finished.pivot_N)
        dz_NC += p_N2C[:, 0] * (gap_NC - finished.mean_gap_N[:, None])
    if static.direction in (TEACHER_STUDENT, JEFFREYS):
        dz_NC += p_N2C[:, 0] - p_N2C[:, 1]
    return dz_NC
