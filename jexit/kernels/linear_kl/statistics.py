"""Online statistics for `linear_kl`, which are merged tile by tile over the vocabulary.

Let p be the student's and q the teacher's distribution, z a logit, m the largest logit of its
distribution, x = z − m and gap = x_student − x_teacher. In sums weighted by p, the gap is centred:
its value at the student's arg-max, where most of the weight is, is subtracted. The reason is
rounding. For KL(p ‖ q), the gradient with respect to a student's logit is `p (gap − Σ p gap)`. If
the maxima of the two distributions were hundreds of nats apart, rounding would destroy this small
difference of large gaps. For KL(q ‖ p) the gradient is `p − q`; for Jeffreys it is the sum of both.

All operations are elementwise over the tokens, so the tokens may form a vector or a row of lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels.linear_kl.reference import JEFFREYS, STUDENT_TEACHER, TEACHER_STUDENT


class KLStatistics(NamedTuple):
    """Statistics per token over part of the vocabulary; those that are not needed are None.

    x is a logit minus its distribution's largest logit, and gap = x_student − x_teacher. The
    centred gap is the gap minus its value at the student's arg-max.
    """

    max_student: jax.Array
    max_teacher: jax.Array
    sum_student: jax.Array  # Σ exp(x)
    sum_teacher: jax.Array
    pivot: jax.Array | None  # teacher's logit at the student's arg-max (the largest of equals)
    gap_student: jax.Array | None  # Σ exp(x_student) centred gap
    gap_teacher: jax.Array | None  # Σ exp(x_teacher) gap


class KLWeights(NamedTuple):
    """For each token, the unnormalised weight of each row of the output head in one tile.

    The gradient with respect to the student's hidden state is computed from the weighted sums of
    the rows. x is a logit minus its distribution's largest logit. `KLStatistics` defines the
    centred gap.
    """

    student: jax.Array  # exp(x_student)
    student_gap: jax.Array | None  # exp(x_student) centred gap
    teacher: jax.Array  # exp(x_teacher)


class KLRescale(NamedTuple):
    """The rescaling of sums over one part of the vocabulary when the part is merged with another.

    `student` and `teacher` multiply the sums; `move` is added to the centred gap.
    """

    student: jax.Array
    teacher: jax.Array
    move: jax.Array | None  # of the centred gap


class FinishedKL(NamedTuple):
    """The KL of each token in nats, and the whole-vocabulary statistics that its gradient needs."""

    kl: jax.Array
    max_student: jax.Array
    max_teacher: jax.Array
    log_sum_student: jax.Array
    log_sum_teacher: jax.Array
    pivot: jax.Array | None
    mean_gap: jax.Array | None  # Σ p centred gap


def of_tile(
    z_student: jax.Array, z_teacher: jax.Array, direction: str, axis: int
) -> tuple[KLStatistics, KLWeights]:
    """Returns (statistics, weights) for a tile of student and teacher logits.

    `axis` is the vocabulary axis of the logits, which has length 1 in the statistics. `direction`
    determines which statistics are needed.
    """
    max_student = z_student.max(axis, keepdims=True)
    max_teacher = z_teacher.max(axis, keepdims=True)
    x_student, x_teacher = z_student - max_student, z_teacher - max_teacher
    exp_student, exp_teacher = jnp.exp(x_student), jnp.exp(x_teacher)
    pivot = gap_student = gap_teacher = weighted_gap = None
    if direction in (STUDENT_TEACHER, JEFFREYS):
        pivot = jnp.where(x_student == 0, z_teacher, -jnp.inf).max(axis, keepdims=True)
        weighted_gap = exp_student * (x_student - (z_teacher - pivot))
        gap_student = weighted_gap.sum(axis, keepdims=True)
    if direction in (TEACHER_STUDENT, JEFFREYS):
        gap_teacher = (exp_teacher * (x_student - x_teacher)).sum(axis, keepdims=True)
    statistics = KLStatistics(
        max_student,
        max_teacher,
        exp_student.sum(axis, keepdims=True),
        exp_teacher.sum(axis, keepdims=True),
        pivot,
        gap_student,
        gap_teacher,
    )
    return statistics, KLWeights(exp_student, weighted_gap, exp_teacher)


def merge(left: KLStatistics, right: KLStatistics) -> tuple[KLStatistics, KLRescale, KLRescale]:
    """Merges the statistics of two parts of the vocabulary.

    Returns the merged statistics, the `KLRescale` of sums over the left part, and that of sums over
    the right part.
    """
    max_student = jnp.maximum(left.max_student, right.max_student)
    max_teacher = jnp.maximum(left.max_teacher, right.max_teacher)
    pivot = None
    if left.pivot is not None:
        of_equals = jnp.maximum(left.pivot, right.pivot)
        pivot = jnp.where(left.max_student < right.max_student, right.pivot, of_equals)
        pivot = jnp.where(left.max_student > right.max_student, left.pivot, pivot)

    def rescaled(part: KLStatistics) -> tuple[KLStatistics, KLRescale]:
        """Returns a part's statistics relative to the merged maxima and pivot, and the `KLRescale`.

        If a maximum rises by δ, exp(x) is multiplied by exp(−δ), and gaps shift.
        """
        shift_student = part.max_student - max_student
        shift_teacher = part.max_teacher - max_teacher
        scale_student, scale_teacher = jnp.exp(shift_student), jnp.exp(shift_teacher)
        move = gap_student = gap_teacher = None
        if pivot is not None:
            move = shift_student - (part.pivot - pivot)
            gap_student = scale_student * (part.gap_student + part.sum_student * move)
        if part.gap_teacher is not None:
            gap_teacher = scale_teacher * (
                part.gap_teacher + part.sum_teacher * (shift_student - shift_teacher)
            )
        statistics = KLStatistics(
            max_student,
            max_teacher,
            scale_student * part.sum_student,
            scale_teacher * part.sum_teacher,
            pivot,
            gap_student,
            gap_teacher,
        )
        return statistics, KLRescale(scale_student, scale_teacher, move)

    (one, left_scale), (two, right_scale) = rescaled(left), rescaled(right)
    total = one._replace(
        sum_student=one.sum_student + two.sum_student,
        sum_teacher=one.sum_teacher + two.sum_teacher,
    )
    if pivot is not None:
        total = total._replace(gap_student=one.gap_student + two.gap_student)
    if one.gap_teacher is not None:
        total = total._replace(gap_teacher=one.gap_teacher + two.gap_teacher)
    return total, left_scale, right_scale


def finish(total: KLStatistics) -> FinishedKL:
    """Returns the KL, and the values for its gradient, from whole-vocabulary statistics.

    The KL has the `direction` for which `of_tile` computed the statistics.
    """
    log_sum_student, log_sum_teacher = jnp.log(total.sum_student), jnp.log(total.sum_teacher)
    # log p − log q is gap − offset; gap is the centred gap + max_teacher − pivot.
    offset = log_sum_student - log_sum_teacher
    kl, mean_gap = jnp.zeros_like(offset), None
    if total.pivot is not None:
        mean_gap = total.gap_student / total.sum_student
        kl += (mean_gap - offset) + (total.max_teacher - total.pivot)
    if total.gap_teacher is not None:
        kl += offset - total.gap_teacher / total.sum_teacher
    return FinishedKL(
        jnp.maximum(kl, 0.0),
        total.max_student,
        total.max_teacher,
        log_sum_student,
        log_sum_teacher,
        total.pivot,
        mean_gap,
    )


def dlogits(
    z_student: jax.Array, z_teacher: jax.Array, finished: FinishedKL, direction: str
) -> jax.Array:
    """Returns the derivative of each token's KL with respect to the student's logits `z_student`.

    The arrays of `finished` must broadcast against the logits.
    """
    x_student = z_student - finished.max_student
    p = jnp.exp(x_student - finished.log_sum_student)
    dz = jnp.zeros_like(p)
    if direction in (STUDENT_TEACHER, JEFFREYS):
        # The normalisers cancel between the gap and its mean.
        dz += p * (x_student - (z_teacher - finished.pivot) - finished.mean_gap)
    if direction in (TEACHER_STUDENT, JEFFREYS):
        dz += p - jnp.exp(z_teacher - finished.max_teacher - finished.log_sum_teacher)
    return dz
