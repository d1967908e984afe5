"""The TPU kernels of `linear_kl`, which loop over tiles of logits with statistics in VMEM."""

from functools import partial

import jax
import jax.numpy as jnp

from jexit.kernels import tpu
from jexit.kernels.linear_kl import reference, statistics, tiled
from jexit.kernels.linear_kl.reference import STUDENT_TEACHER
from jexit.kernels.linear_kl.statistics import FinishedKL, KLStatistics
from jexit.kernels.tiles import tempered
from jexit.kernels.tpu import BY_CHIP, TpuOperands, TpuTile


def linear_kl(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None = None,
    *,
    direction: str = STUDENT_TEACHER,
    temperature: float = 1.0,
    tile: TpuTile = BY_CHIP,
) -> jax.Array:
    """Implements `jexit.kernels.linear_kl` on TPUs; sizes set in `tile` override the defaults."""
    arguments = (h_student_ND, h_teacher_ND, head_VD, head_teacher_VD)
    if h_student_ND.shape[0] == 0:
        return reference.linear_kl(*arguments, direction=direction, temperature=temperature)
    tpu.check_covers(_operands(*arguments))
    kernels = tiled.TiledKL(
        partial(_statistics, tile, temperature), partial(_gradients, tile, temperature)
    )
    return tiled.linear_kl(kernels, *arguments, direction)


def _operands(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None,
) -> TpuOperands:
    heads = (head_VD,) if head_teacher_VD is None else (head_VD, head_teacher_VD)
    return TpuOperands((h_student_ND, h_teacher_ND), heads)


def _logits(blocks: TpuOperands, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Returns the student's and the teacher's logits [C, T] of a tile.

    The teacher uses the last head, which is the only one if student and teacher share it.
    """
    student, teacher = blocks.hidden
    z_student_CT = blocks.logits(student[...])
    z_teacher_CT = blocks.logits(teacher[...], head=len(blocks.heads) - 1)
    return tempered(z_student_CT, temperature), tempered(z_teacher_CT, temperature)


def _statistics(
    tile: TpuTile, temperature: float, direction: str, *arrays: jax.Array | None
) -> KLStatistics:
    """Returns one device's statistics [N], as `tiled.TiledKL` describes."""
    total = tpu.statistics(
        lambda blocks: statistics.of_tile(*_logits(blocks, temperature), direction, axis=0)[0],
        lambda left, right: statistics.merge(left, right)[0],
        _operands(*arrays),
        tile,
    )
    return jax.tree.map(lambda array_1N: array_1N[0], total)


def _gradients(
    tile: TpuTile,
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
    """Returns one device's gradients for student states and head, as `tiled.TiledKL` describes."""

    def dlogits(blocks: TpuOperands) -> jax.Array:
        g_1T, finished = blocks.rows
        dz_CT = g_1T * statistics.dlogits(*_logits(blocks, temperature), finished, direction)
        return jnp.where(g_1T != 0, tempered(dz_CT, temperature), 0)

    operands = _operands(h_student_ND, h_teacher_ND, head_VD, head_teacher_VD)
    return tpu.gradients(dlogits, operands._replace(rows=(g_N, finished)), tile, head_dtype)
