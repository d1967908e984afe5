"""Online statistics of two distributions, for every tile-by-tile implementation.

Let z be a logit, m the largest logit, x = z − m and gap = x_student − x_teacher. Let p be the
student's and q the teacher's distribution. In sums with the student's weights the gap is centred:
it is measured from its value at the student's arg-max, where most of the weight is. The reason is
rounding. The gradient with respect to a student's logit is a difference from the mean gap,
`p (gap − Σ p gap)` for KL(p ‖ q), and a distance of hundreds of nats between the two maxima would
bury it in rounding errors. For KL(q ‖ p) the gradient is `p − q`, and for Jeffreys it is the sum of
both.

Everything here is elementwise over the tokens, whether they form a vector or a row of lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels.linear_kl.reference import JEFFREYS, STUDENT_TEACHER, TEACHER_STUDENT


class Statistics(NamedTuple):
    """Statistics per token over a part of the vocabulary; those that are not needed are None."""

    max_student: jax.Array
    max_teacher: jax.Array
    sum_student: jax.Array  # Σ exp(x)
    sum_teacher: jax.Array
    pivot: jax.Array | None  # teacher's logit at the student's arg-max (the largest of equals)
    gap_student: jax.Array | None  # Σ exp(x_student) centred gap
    gap_teacher: jax.Array | None  # Σ exp(x_teacher) gap


class Weights(NamedTuple):
    """The factors of the head's rows in the gradient, per token and vocabulary entry."""

    student: jax.Array  # exp(x_student)
    student_gap: jax.Array | None  # exp(x_student) centred gap
    teacher: jax.Array  # exp(x_teacher)


class Rescale(NamedTuple):
    """The change of a part's sums when the maxima and the pivot become those of the whole."""

    student: jax.Array
    teacher: jax.Array
    move: jax.Array | None  # of the centred gap


class Finished(NamedTuple):
    """The KL in nats, and the statistics that its gradient needs."""

    kl: jax.Array
    max_student: jax.Array
    max_teacher: jax.Array
    log_sum_student: jax.Array
    log_sum_teacher: jax.Array
    pivot: jax.Array | None
    mean_gap: jax.Array | None  # Σ p centred gap


def of_tile(
    z_student: jax.Array, z_teacher: jax.Array, direction: str, axis: int
) -> tuple[Statistics, Weights]:
    """Returns the statistics and the weights for a tile of logits.

    The vocabulary lies along `axis`, which the statistics keep with length 1.
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
    statistics = Statistics(
        max_student,
        max_teacher,
        exp_student.sum(axis, keepdims=True),
        exp_teacher.sum(axis, keepdims=True),
        pivot,
        gap_student,
        gap_teacher,
    )
    return statistics, Weights(exp_student, weighted_gap, exp_teacher)


def merge(left: Statistics, right: Statistics) -> tuple[Statistics, Rescale, Rescale]:
    """Merges the statistics of two parts.

    Also returns how sums over the left and the right part rescale.
    """
    max_student = jnp.maximum(left.max_student, right.max_student)
    max_teacher = jnp.maximum(left.max_teacher, right.max_teacher)
    pivot = None
    if left.pivot is not None:
        of_equals = jnp.maximum(left.pivot, right.pivot)
        pivot = jnp.where(left.max_student < right.max_student, right.pivot, of_equals)
        pivot = jnp.where(left.max_student > right.max_student, left.pivot, pivot)

    def rescaled(part: Statistics) -> tuple[Statistics, Rescale]:
        """Rescales a part: a maximum that rises by δ shrinks exp(x) by exp(−δ) and shifts gaps."""
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
        statistics = Statistics(
            max_student,
            max_teacher,
            scale_student * part.sum_student,
            scale_teacher * part.sum_teacher,
            pivot,
            gap_student,
            gap_teacher,
        )
        return statistics, Rescale(scale_student, scale_teacher, move)

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


def finish(total: Statistics) -> Finished:
    """Returns the KL and what its gradient needs, from the whole vocabulary's statistics."""
    log_sum_student, log_sum_teacher = jnp.log(total.sum_student), jnp.log(total.sum_teacher)
    # log p − log q is gap − offset; gap is the centred gap + max_teacher − pivot.
    offset = log_sum_student - log_sum_teacher
    kl, mean_gap = jnp.zeros_like(offset), None
    if total.pivot is not None:
        mean_gap = total.gap_student / total.sum_student
        kl += (mean_gap - offset) + (total.max_teacher - total.pivot)
    if total.gap_teacher is not None:
        kl += offset - total.gap_teacher / total.sum_teacher
    return Finished(
        jnp.maximum(kl, 0.0),
        total.max_student,
        total.max_teacher,
        log_sum_student,
        log_sum_teacher,
        total.pivot,
        mean_gap,
    )


def dlogits(
    z_student: jax.Array, z_teacher: jax.Array, finished: Finished, direction: str
) -> jax.Array:
    """Returns ∂kl/∂z_student; the statistics must broadcast against the logits."""
    x_student = z_student - finished.max_student
    p = jnp.exp(x_student - finished.log_sum_student)
    dz = jnp.zeros_like(p)
    if direction in (STUDENT_TEACHER, JEFFREYS):
        # The normalisers cancel between the gap and its mean.
        dz += p * (x_student - (z_teacher - finished.pivot) - finished.mean_gap)
    if direction in (TEACHER_STUDENT, JEFFREYS):
        dz += p - jnp.exp(z_teacher - finished.max_teacher - finished.log_sum_teacher)
    return dz
