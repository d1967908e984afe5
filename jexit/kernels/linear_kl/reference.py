"""The reference implementation of `linear_kl`: the formula, with all logits in memory."""

import jax
import jax.numpy as jnp

STUDENT_TEACHER = "student_teacher"
TEACHER_STUDENT = "teacher_student"
JEFFREYS = "jeffreys"
DIRECTIONS = (STUDENT_TEACHER, TEACHER_STUDENT, JEFFREYS)


def linear_kl(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None = None,
    *,
    direction: str = STUDENT_TEACHER,
    temperature: float = 1.0,
) -> jax.Array:
    """Implements `jexit.kernels.linear_kl` directly by its formula, for tests."""
    head_teacher_VD = head_VD if head_teacher_VD is None else head_teacher_VD
    log_student_NV = _log_probability(h_student_ND, head_VD, temperature)
    log_teacher_NV = jax.lax.stop_gradient(
        _log_probability(h_teacher_ND, head_teacher_VD, temperature)
    )
    kl_N = jnp.zeros(h_student_ND.shape[0], jnp.float32)
    if direction in (STUDENT_TEACHER, JEFFREYS):
        kl_N += jnp.sum(jnp.exp(log_student_NV) * (log_student_NV - log_teacher_NV), axis=-1)
    if direction in (TEACHER_STUDENT, JEFFREYS):
        kl_N += jnp.sum(jnp.exp(log_teacher_NV) * (log_teacher_NV - log_student_NV), axis=-1)
    # Rounding can leave a few 1e-8 below zero; the derivative there is still that of the KL.
    return kl_N + jax.lax.stop_gradient(jnp.maximum(kl_N, 0.0) - kl_N)


def _log_probability(h_ND: jax.Array, head_VD: jax.Array, temperature: float) -> jax.Array:
    logits_NV = h_ND.astype(jnp.float32) @ head_VD.astype(jnp.float32).T / temperature
    return jax.nn.log_softmax(logits_NV)
