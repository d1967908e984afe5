"""The GPU kernels of `linear_kl`, which loop over tiles of logits with statistics in registers."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from jexit.kernels import gpu
from jexit.kernels.gpu import BY_CHIP, MASKED, Blocks, GpuOperands, GpuTile, Set
from jexit.kernels.linear_kl import reference, statistics, tiled
from jexit.kernels.linear_kl.reference import JEFFREYS, STUDENT_TEACHER, TEACHER_STUDENT
from jexit.kernels.linear_kl.statistics import FinishedKL, KLStatistics
from jexit.kernels.tiles import tempered


def linear_kl(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None = None,
    *,
    direction: str = STUDENT_TEACHER,
    temperature: float = 1.0,
    tile: GpuTile = BY_CHIP,
) -> jax.Array:
    """Implements `jexit.kernels.linear_kl` on GPUs; sizes set in `tile` override the defaults."""
    arguments = (h_student_ND, h_teacher_ND, head_VD, head_teacher_VD)
    if h_student_ND.shape[0] == 0:
        return reference.linear_kl(*arguments, direction=direction, temperature=temperature)
    kernels = tiled.TiledKL(
        partial(_statistics, tile, temperature), partial(_gradients, tile, temperature)
    )
    return tiled.linear_kl(kernels, *arguments, direction)


def _operands(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None,
) -> GpuOperands:
    """Returns the operands of the kernels: first the student's logits, then the teacher's.

    Without `head_teacher_VD`, both use `head_VD`.
    """
    heads = (head_VD,) if head_teacher_VD is None else (head_VD, head_teacher_VD)
    return GpuOperands((h_student_ND, h_teacher_ND), heads, (Set(0), Set(1, head=len(heads) - 1)))


def _logits(blocks: Blocks, temperature: float) -> Iterator[jax.Array]:
    """Yields the student's and the teacher's logits [T, C] of a tile."""
    return (tempered(z_TC, temperature) for z_TC in blocks.logits)


def _neutral(direction: str) -> KLStatistics:
    """Returns the statistics of an empty vocabulary, which change nothing when merged."""
    of_student = 0.0 if direction in (STUDENT_TEACHER, JEFFREYS) else None
    of_teacher = 0.0 if direction in (TEACHER_STUDENT, JEFFREYS) else None
    return KLStatistics(MASKED, MASKED, 0.0, 0.0, of_student, of_student, of_teacher)


def _statistics(
    tile: GpuTile, temperature: float, direction: str, *arrays: jax.Array | None
) -> KLStatistics:
    """Returns one device's statistics [N], as `tiled.TiledKL` describes."""
    return gpu.statistics(
        lambda blocks: statistics.of_tile(*_logits(blocks, temperature), direction, axis=1)[0],
        lambda left, right: statistics.merge(left, right)[0],
        _neutral(direction),
        _operands(*arrays),
        tile,
    )


def _gradients(
    tile: GpuTile,
    temperature: float,
    direction: str,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None,
    finished: FinishedKL,
    g_N: jax.Array,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns one device's share of the gradients of student states [N, D] and head [V, D].

    `tiled.TiledKL.gradients` describes them; the head's is None without `head_dtype`.
    """

    def dlogits(blocks: Blocks) -> jax.Array:
        g_T1, finished = blocks.rows
        dz_TC = g_T1 * statistics.dlogits(*_logits(blocks, temperature), finished, direction)
        return jnp.where(g_T1 != 0, tempered(dz_TC, temperature), 0)

    operands = _operands(h_student_ND, h_teacher_ND, head_VD, head_teacher_VD)
    return gpu.gradients(dlogits, operands._replace(rows=(g_N, finished)), tile, head_dtype)
