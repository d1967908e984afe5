"""Tiles of the vocabulary with online soft-max statistics and a recomputing gradient, in plain XLA.

With p the student's and q the teacher's distribution, the gradient to a student logit is
`p (log p − log q − KL(p‖q))` for KL(p‖q), `p − q` for KL(q‖p), and their sum for Jeffreys.

Each token's KL depends on its own hidden state alone, so the derivative `u_ND = ∂kl_N/∂h_ND` can be
taken while the logits are at hand, and the backward pass is `g_N · u_ND`. This happens when only
the hidden states are differentiated (`symbolic_zeros` tells) and then the head's gradient costs
nothing. When the head is differentiated too, the forward pass keeps its statistics, and the
backward pass recomputes the logits tile by tile for both gradients.
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
    """Axis 2 is (student, teacher); with z a logit, x = z − maximum."""

    max_N2: jax.Array
    sum_N2: jax.Array  # Σ exp(x)
    student_N: jax.Array | None  # Σ exp(x_student) (x_student − x_teacher), if the direction asks
    teacher_N: jax.Array | None  # Σ exp(x_teacher) (x_teacher − x_student), if the direction asks


class _Finished(NamedTuple):
    kl_N: jax.Array
    student_teacher_N: jax.Array | None  # KL(student ‖ teacher), which its own gradient contains
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
    chunks = static.override(tiles.statistics_chunks(h_student_ND.shape[0], head_VD.shape[0], 2))

    def of_chunk(h_student_ND: jax.Array, h_teacher_ND: jax.Array) -> jax.Array:
        heads = (head_VD, head_teacher_VD)
        return _statistics(static, h_student_ND, h_teacher_ND, heads, chunks.vocab).kl_N

    return tiles.over_tokens(of_chunk, (h_student_ND, h_teacher_ND), chunks.tokens)


def _forward(
    static: _Static, h_student_ND: Any, h_teacher_ND: Any, head_VD: Any, head_teacher_VD: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Arguments are pairs of value and `perturbed`: whether that argument is differentiated."""
    heads = (head_VD.value, None if head_teacher_VD is None else head_teacher_VD.value)
    hidden = (h_student_ND.value, h_teacher_ND.value)
    tokens, vocab = hidden[0].shape[0], heads[0].shape[0]

    if head_VD.perturbed:
        chunks = static.override(tiles.statistics_chunks(tokens, vocab, 2))
        finished = tiles.over_tokens(
            lambda *h: _statistics(static, *h, heads, chunks.vocab), hidden, chunks.tokens
        )
        return finished.kl_N, (None, hidden, heads, finished)

    chunks = static.override(tiles.gradient_chunks(tokens, vocab, 2))

    def of_chunk(h_student_ND: jax.Array, h_teacher_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
        finished = _statistics(static, h_student_ND, h_teacher_ND, heads, chunks.vocab)

        # With one tile this repeats the very product of the statistics, and XLA keeps one of them.
        def tile(start: jax.Array | int, size: int) -> jax.Array:
            z_N2C, head_CD = _logits(h_student_ND, h_teacher_ND, heads, start, size)
            return tiles.product(_dlogits(static, z_N2C, finished), head_CD, (1, 0))

        unit_ND = tiles.over_vocab(tile, tiles.add, vocab, chunks.vocab)
        return finished.kl_N, unit_ND.astype(h_student_ND.dtype)

    kl_N, unit_ND = tiles.over_tokens(of_chunk, hidden, chunks.tokens)
    return kl_N, (unit_ND, None, None, None)


def _backward(static: _Static, residuals: tuple[Any, ...], g_N: jax.Array) -> tuple[Any, ...]:
    unit_ND, hidden, heads, finished = residuals
    live_N = g_N != 0  # a row that the loss masks out must not bring in its NaN
    if unit_ND is not None:
        dh_ND = jnp.where(live_N[:, None], g_N[:, None] * unit_ND, 0).astype(unit_ND.dtype)
        return dh_ND, None, None, None

    head_VD = heads[0]
    vocab = head_VD.shape[0]
    chunks = static.override(tiles.head_gradient_chunks(hidden[0].shape[0], vocab))
    summed = hidden[0].shape[0] > chunks.tokens

    def of_chunk(
        h_student_ND: jax.Array, h_teacher_ND: jax.Array, g_N: jax.Array, finished: _Finished
    ) -> tuple[jax.Array, jax.Array]:
        live_N1 = g_N[:, None] != 0
        h_student_ND = jnp.where(live_N1, h_student_ND, 0)

        def tile(start: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
            z_N2C, head_CD = _logits(h_student_ND, h_teacher_ND, heads, start, size)
            dz_NC = _dlogits(static, z_N2C, finished)
            dz_NC = jnp.where(live_N1, g_N[:, None] * dz_NC, 0)
            return (
                tiles.product(dz_NC, head_CD, (1, 0)),
                tiles.product(dz_NC, h_student_ND, (0, 0)),
            )

        dtype = jnp.float32 if summed else head_VD.dtype
        return tiles.head_gradient(tile, head_VD, chunks.vocab, dtype)

    dh_ND, dhead_VD = tiles.over_tokens_summing(of_chunk, (*hidden, g_N, finished), chunks.tokens)
    return dh_ND.astype(hidden[0].dtype), None, dhead_VD.astype(head_VD.dtype), None


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
) -> _Finished:
    """Both distributions' normalisers and the KL between them."""
    of_student = static.direction in (STUDENT_TEACHER, JEFFREYS)
    of_teacher = static.direction in (TEACHER_STUDENT, JEFFREYS)

    def tile(start: jax.Array | int, size: int) -> _Statistics:
        z_N2C, _ = _logits(h_student_ND, h_teacher_ND, heads, start, size)
        max_N2 = z_N2C.max(-1)
        x_N2C = z_N2C - max_N2[..., None]
        exp_N2C = jnp.exp(x_N2C)
        gap_NC = x_N2C[:, 0] - x_N2C[:, 1]
        return _Statistics(
            max_N2=max_N2,
            sum_N2=exp_N2C.sum(-1),
            student_N=(exp_N2C[:, 0] * gap_NC).sum(-1) if of_student else None,
            teacher_N=-(exp_N2C[:, 1] * gap_NC).sum(-1) if of_teacher else None,
        )

    total = tiles.over_vocab(tile, _merge, heads[0].shape[0], chunk_vocab)
    log_sum_N2 = jnp.log(total.sum_N2)
    kl_N = jnp.zeros_like(log_sum_N2[:, 0])
    student_teacher_N = None
    if of_student:
        student_teacher_N = (
            total.student_N / total.sum_N2[:, 0] - log_sum_N2[:, 0] + log_sum_N2[:, 1]
        )
        kl_N += student_teacher_N
    if of_teacher:
        kl_N += total.teacher_N / total.sum_N2[:, 1] - log_sum_N2[:, 1] + log_sum_N2[:, 0]
    return _Finished(jnp.maximum(kl_N, 0.0), student_teacher_N, total.max_N2, log_sum_N2)


def _merge(left: _Statistics, right: _Statistics) -> _Statistics:
    """When a maximum rises by δ, exp(x) shrinks by exp(−δ) and x_student − x_teacher moves."""
    max_N2 = jnp.maximum(left.max_N2, right.max_N2)
    parts = []
    for part in (left, right):
        shift_N2 = part.max_N2 - max_N2
        scale_N2 = jnp.exp(shift_N2)
        move_N = shift_N2[:, 0] - shift_N2[:, 1]
        student_N = teacher_N = None
        if part.student_N is not None:
            student_N = scale_N2[:, 0] * (part.student_N + part.sum_N2[:, 0] * move_N)
        if part.teacher_N is not None:
            teacher_N = scale_N2[:, 1] * (part.teacher_N - part.sum_N2[:, 1] * move_N)
        parts.append((scale_N2 * part.sum_N2, student_N, teacher_N))
    return _Statistics(max_N2, *tiles.add(*parts))


def _dlogits(static: _Static, z_N2C: jax.Array, finished: _Finished) -> jax.Array:
    """∂kl/∂(student's logits) [N, C] for a tile."""
    log_N2C = z_N2C - finished.max_N2[..., None] - finished.log_sum_N2[..., None]
    student_NC = jnp.exp(log_N2C[:, 0])
    dz_NC = jnp.zeros_like(student_NC)
    if static.direction in (STUDENT_TEACHER, JEFFREYS):
        gap_NC = log_N2C[:, 0] - log_N2C[:, 1]
        dz_NC += student_NC * (gap_NC - finished.student_teacher_N[:, None])
    if static.direction in (TEACHER_STUDENT, JEFFREYS):
        dz_NC += student_NC - jnp.exp(log_N2C[:, 1])
    return dz_NC
