"""The plain XLA implementation of `linear_kl`: vocabulary tiles with online softmax statistics.

If only the hidden states are differentiated, and products are float32, the forward pass also
computes the gradient. This is possible because the KL of a token depends only on the token's own
hidden state: its derivative u_ND is computed while the logits are in memory. The rows of the head,
weighted by exp(x), by exp(x) · gap and by the teacher's exp(x), are summed online like the
normalisers. The backward pass then returns `g_N · u_ND`, where g_N is the derivative of the loss
with respect to the KL. JAX's `symbolic_zeros` shows which arguments are differentiated.

Otherwise, and if a mesh shards the op, the forward pass stores its statistics and the backward pass
recomputes the logits tile by tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels import tiles
from jexit.kernels.linear_kl import reference, statistics, tiled
from jexit.kernels.linear_kl.reference import STUDENT_TEACHER
from jexit.kernels.linear_kl.statistics import FinishedKL, KLStatistics
from jexit.kernels.shards import Shards


class _KLChoices(NamedTuple):
    requested: tiles.Requested
    temperature: float


class _RowSums(NamedTuple):
    """Weighted sums [N, D] of the rows of the head; those that are not needed are None.

    x is a logit minus the largest logit. The centred gap is x_student − x_teacher minus its value
    at the student's arg-max.
    """

    student: jax.Array  # Σ exp(x_student) row
    student_gap: jax.Array | None  # Σ exp(x_student) centred gap row
    teacher: jax.Array | None  # Σ exp(x_teacher) row


class _KLTotal(NamedTuple):
    statistics: KLStatistics  # [N, 1] each
    rows: _RowSums | None  # None without gradients


def linear_kl(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None = None,
    *,
    direction: str = STUDENT_TEACHER,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> jax.Array:
    """Implements `jexit.kernels.linear_kl` in plain XLA.

    `chunk_tokens` and `chunk_vocab` are the numbers of tokens and vocabulary entries in a tile;
    None lets shapes and platform determine them.
    """
    arguments = (h_student_ND, h_teacher_ND, head_VD, head_teacher_VD)
    if h_student_ND.shape[0] == 0:
        return reference.linear_kl(*arguments, direction=direction, temperature=temperature)
    static = _KLChoices(tiles.Requested(chunk_tokens, chunk_vocab), temperature)
    if Shards.current(head_VD.shape[0]).divides:
        functions = tiled.TiledKL(partial(_of_all, static), partial(_gradients, static))
        return tiled.linear_kl(functions, *arguments, direction)
    return _linear_kl(static, direction, *arguments)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_kl(static: _KLChoices, direction: str, *arguments: Any) -> jax.Array:
    return statistics.finish(_of_all(static, direction, *arguments)).kl


def _forward(
    static: _KLChoices, direction: str, *arguments: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Returns the KL [N] of N tokens in nats, and the residuals for `_backward`.

    This is the forward rule of the custom VJP `_linear_kl`, with the KL in `direction`.
    Because of `symbolic_zeros`, each argument is a pair: `value` is the array, and `perturbed` is
    True if it is differentiated. The residuals are (derivative of each KL with respect to the
    student's hidden state, None, None, False) or, where the logits are to be recomputed, (None,
    arrays, statistics, whether the head is differentiated).
    """
    head_trains = arguments[2].perturbed
    values = tuple(None if pair is None else pair.value for pair in arguments)
    h_student_ND, h_teacher_ND, *heads = values
    online = tiles.sums_gradient_online(h_student_ND, heads[0], head_trains=head_trains)
    if not online:
        finished = statistics.finish(_of_all(static, direction, *values))
        return finished.kl, (None, values, finished, head_trains)

    # The weights of the head's rows are a third tile, as large as each of the two tiles of logits.
    chunks = static.requested.override(
        tiles.choose_chunks(h_student_ND.shape[0], heads[0].shape[0], 3)
    )

    def of_chunk(*hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = _of_chunk(
            static.temperature, direction, *hidden, tuple(heads), chunks.vocab, with_gradient=True
        )
        unit_ND = tiles.tempered(_unit(total), static.temperature).astype(h_student_ND.dtype)
        return statistics.finish(total.statistics).kl[:, 0], unit_ND

    kl_N, unit_ND = tiles.over_tokens(of_chunk, (h_student_ND, h_teacher_ND), chunks.tokens)
    return kl_N, (unit_ND, None, None, False)


def _backward(
    static: _KLChoices, direction: str, residuals: tuple[Any, ...], g_N: jax.Array
) -> tuple[Any, ...]:
    unit_ND, arguments, finished, head_trains = residuals
    live_N1 = (g_N != 0)[:, None]  # a row that the loss masks out must not bring in its NaN
    if unit_ND is not None:
        dh_ND = jnp.where(live_N1, g_N[:, None] * unit_ND, 0).astype(unit_ND.dtype)
        return dh_ND, None, None, None
    h_student_ND, h_teacher_ND, head_VD, head_teacher_VD = arguments
    dh_ND, dhead_VD = _gradients(
        static,
        direction,
        jnp.where(live_N1, h_student_ND, 0),
        h_teacher_ND,
        head_VD,
        head_teacher_VD,
        finished,
        g_N,
        head_VD.dtype if head_trains else None,
    )
    return dh_ND.astype(h_student_ND.dtype), None, dhead_VD, None


_linear_kl.defvjp(_forward, _backward, symbolic_zeros=True)


def _of_all(
    static: _KLChoices,
    direction: str,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    *heads: jax.Array | None,
) -> KLStatistics:
    """Returns the statistics [N] of all tokens over the whole vocabulary of the heads."""
    chunks = static.requested.override(
        tiles.choose_chunks(h_student_ND.shape[0], heads[0].shape[0], 2)
    )

    def of_chunk(*hidden: jax.Array) -> KLStatistics:
        total = _of_chunk(static.temperature, direction, *hidden, heads, chunks.vocab)
        return jax.tree.map(lambda array_N1: array_N1[:, 0], total.statistics)

    return tiles.over_tokens(of_chunk, (h_student_ND, h_teacher_ND), chunks.tokens)


def _gradients(
    static: _KLChoices,
    direction: str,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None,
    finished: FinishedKL,
    g_N: jax.Array,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns gradients for the student's hidden states and head, as `tiled.TiledKL` describes."""

    def dlogits(
        start: jax.Array | int,
        size: int,
        h_student_ND: jax.Array,
        h_teacher_ND: jax.Array,
        finished: FinishedKL,
        g_N: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        heads = (head_VD, head_teacher_VD)
        z_student_NC, z_teacher_NC, head_CD = _logits(
            static.temperature, h_student_ND, h_teacher_ND, heads, start, size
        )
        finished_N1 = jax.tree.map(lambda array: array[:, None], finished)
        dz_NC = g_N[:, None] * statistics.dlogits(
            z_student_NC, z_teacher_NC, finished_N1, direction
        )
        dz_NC = tiles.tempered(dz_NC, static.temperature)
        return jnp.where(g_N[:, None] != 0, dz_NC, 0), head_CD

    arguments = (h_student_ND, h_teacher_ND, finished, g_N)
    chunks = tiles.choose_chunks(h_student_ND.shape[0], head_VD.shape[0], 2)
    return tiles.gradients(
        dlogits, arguments, head_VD, static.requested.override(chunks), head_dtype
    )


def _logits(
    temperature: float,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    heads: tuple[jax.Array, jax.Array | None],
    start: jax.Array | int,
    size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a tile's logits [N, C] of student and teacher, and its rows of the student's head.

    The tile consists of the vocabulary entries `start` … `start + size − 1`. `heads` are the heads
    of student and teacher; None as the second means the student's head.
    """
    head_CD = tiles.slice_head(heads[0], start, size)
    if heads[1] is None:  # one product for both: the tile is read once
        student_NC, teacher_NC = tiles.logits(jnp.stack([h_student_ND, h_teacher_ND]), head_CD)
    else:
        student_NC = tiles.logits(h_student_ND, head_CD)
        teacher_NC = tiles.logits(h_teacher_ND, tiles.slice_head(heads[1], start, size))
    return (
        tiles.tempered(student_NC, temperature),
        tiles.tempered(teacher_NC, temperature),
        head_CD,
    )


def _of_chunk(
    temperature: float,
    direction: str,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    heads: tuple[jax.Array, jax.Array | None],
    chunk_vocab: int,
    *,
    with_gradient: bool = False,
) -> _KLTotal:
    def tile(start: jax.Array | int, size: int) -> _KLTotal:
        z_student_NC, z_teacher_NC, head_CD = _logits(
            temperature, h_student_ND, h_teacher_ND, heads, start, size
        )
        part, weights = statistics.of_tile(z_student_NC, z_teacher_NC, direction, axis=-1)
        if not with_gradient:
            return _KLTotal(part, None)
        student_gap_ND = teacher_ND = None
        if part.gap_student is not None:
            student_gap_ND = tiles.product(weights.student_gap, head_CD, (1, 0))
        if part.gap_teacher is not None:
            teacher_ND = tiles.product(weights.teacher, head_CD, (1, 0))
        rows = _RowSums(tiles.product(weights.student, head_CD, (1, 0)), student_gap_ND, teacher_ND)
        return _KLTotal(part, rows)

    return tiles.over_vocab(tile, _merge, heads[0].shape[0], chunk_vocab)


def _merge(left: _KLTotal, right: _KLTotal) -> _KLTotal:
    total, *scales = statistics.merge(left.statistics, right.statistics)
    if left.rows is None:
        return _KLTotal(total, None)

    def rescaled(rows: _RowSums, scale: statistics.KLRescale) -> _RowSums:
        student_gap = teacher = None
        if rows.student_gap is not None:
            student_gap = scale.student * (rows.student_gap + rows.student * scale.move)
        if rows.teacher is not None:
            teacher = scale.teacher * rows.teacher
        return _RowSums(scale.student * rows.student, student_gap, teacher)

    return _KLTotal(total, tiles.add(*map(rescaled, (left.rows, right.rows), scales)))


def _unit(total: _KLTotal) -> jax.Array:
    """Returns the gradient of each token's KL with respect to the student's hidden state.

    It is float32 [N, D]; `total` covers the whole vocabulary.
    """
    sums, rows = total.statistics, total.rows
    row_ND = rows.student / sums.sum_student
    unit_ND = jnp.zeros_like(row_ND)
    if rows.student_gap is not None:
        mean_gap_N1 = sums.gap_student / sums.sum_student
        unit_ND += rows.student_gap / sums.sum_student - mean_gap_N1 * row_ND
    if rows.teacher is not None:
        unit_ND += row_ND - rows.teacher / sums.sum_teacher
    return unit_ND
