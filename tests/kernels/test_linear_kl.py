"""`linear_kl` and its gradients against float64, by every implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels import truth

from jexit.kernels import linear_kl
from jexit.kernels.linear_kl import api, pallas_gpu, pallas_tpu, xla

truth.register_small_tiles(api.OPERATION, xla.linear_kl, pallas_tpu.linear_kl, pallas_gpu.linear_kl)


def expected(
    student_ND: Any,
    teacher_ND: Any,
    head_VD: Any,
    teacher_head_VD: Any,
    direction: str,
    g_N: Any,
    temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL per token, and the gradients of Σ g kl to the student's states and head."""
    log_p_NV = truth.log_softmax(truth.logits(student_ND, head_VD) / temperature)
    teacher_head_VD = head_VD if teacher_head_VD is None else teacher_head_VD
    log_q_NV = truth.log_softmax(truth.logits(teacher_ND, teacher_head_VD) / temperature)
    p_NV, q_NV = np.exp(log_p_NV), np.exp(log_q_NV)
    kl_N, dz_NV = np.zeros(len(p_NV)), np.zeros_like(p_NV)
    if direction != "teacher_student":
        forward_N = truth.kl(log_p_NV, log_q_NV)
        kl_N += forward_N
        dz_NV += p_NV * (log_p_NV - log_q_NV - forward_N[:, None])
    if direction != "student_teacher":
        kl_N += truth.kl(log_q_NV, log_p_NV)
        dz_NV += p_NV - q_NV
    dz_NV *= truth.float64(g_N)[:, None] / temperature
    return kl_N, dz_NV @ truth.float64(head_VD), dz_NV.T @ truth.float64(student_ND)


@functools.cache
def compiled(implementation: str, direction: str, temperature: float = 1.0) -> Any:
    """KL, KL beside a gradient, the gradient to the states alone, and to states and head."""

    def loss(
        student_ND: Any, head_VD: Any, teacher_ND: Any, teacher_head_VD: Any, g_N: Any
    ) -> tuple[jax.Array, jax.Array]:
        kl_N = linear_kl(
            student_ND,
            teacher_ND,
            head_VD,
            direction=direction,
            head_teacher_VD=teacher_head_VD,
            temperature=temperature,
            implementation=implementation,
        )
        return jnp.sum(jnp.where(g_N != 0, g_N * kl_N, 0)), kl_N

    def everything(*arguments: Any) -> tuple[jax.Array, ...]:
        alone_ND, _ = jax.grad(loss, has_aux=True)(*arguments)
        (dh_ND, dhead_VD), kl_N = jax.grad(loss, (0, 1), has_aux=True)(*arguments)
        return loss(*arguments)[1], kl_N, alone_ND, dh_ND, dhead_VD

    return jax.jit(everything)


def check(
    implementation: str,
    student_ND: jax.Array,
    teacher_ND: jax.Array,
    head_VD: jax.Array,
    direction: str,
    teacher_head_VD: jax.Array | None = None,
    temperature: float = 1.0,
) -> np.ndarray:
    """Forward and gradients against the truth.

    Some rows are masked out and hold NaN, as padding may: they must reach no gradient. The
    reference, whose gradient JAX derives, has 0 · NaN there.
    """
    g_N = truth.normal(9, student_ND.shape[0]).at[1::4].set(0)
    dtype, live_N = student_ND.dtype.name, np.asarray(g_N) != 0
    arguments = (student_ND, teacher_ND, head_VD, teacher_head_VD, direction, g_N)
    wanted_N, wanted_ND, wanted_VD = expected(*arguments, temperature)
    if implementation != "reference":
        student_ND, teacher_ND = (
            jnp.where(live_N[:, None], h_ND, jnp.nan) for h_ND in (student_ND, teacher_ND)
        )
    found = compiled(implementation, direction, temperature)
    plain_N, kl_N, alone_ND, dh_ND, dhead_VD = found(
        student_ND, head_VD, teacher_ND, teacher_head_VD, g_N
    )
    assert kl_N.dtype == jnp.float32 and dhead_VD.dtype == head_VD.dtype
    assert alone_ND.dtype == dh_ND.dtype == student_ND.dtype
    truth.assert_close(plain_N[live_N], wanted_N[live_N], dtype, "kl_N")
    truth.assert_close(kl_N[live_N], wanted_N[live_N], dtype, "kl_N beside a gradient")
    truth.assert_close(alone_ND, wanted_ND, dtype, "gradient to the states alone")
    truth.assert_close(dh_ND, wanted_ND, dtype, "gradient to the states")
    truth.assert_close(dhead_VD, wanted_VD, dtype, "gradient to the head")
    return np.asarray(kl_N)


SHAPES = [  # tokens, width, vocabulary, width of a teacher with a head of its own
    (13, 24, 97, None, "float32", "student_teacher", 1.0),
    (13, 24, 97, None, "bfloat16", "teacher_student", 0.7),
    (37, 16, 129, 10, "float32", "jeffreys", 1.5),
    (1, 7, 2, None, "float32", "jeffreys", 1.0),
]


@truth.every
def test_every_direction_and_its_gradients_at_any_shape(implementation):
    for tokens, width, vocab, own, dtype, direction, temperature in SHAPES:
        student_ND = truth.normal(0, tokens, width, dtype=dtype)
        teacher_ND = truth.normal(1, tokens, own or width, dtype=dtype)
        teacher_head_VD = None if own is None else truth.normal(3, vocab, own)
        head_VD = truth.normal(2, vocab, width, dtype=dtype)
        check(
            implementation, student_ND, teacher_ND, head_VD, direction, teacher_head_VD, temperature
        )
    empty_ND, head_VD = jnp.zeros((0, 8)), jnp.zeros((9, 8))
    assert linear_kl(empty_ND, empty_ND, head_VD, implementation=implementation).shape == (0,)


@truth.with_chip_tiles
@truth.beyond_a_tile
def test_covers_more_than_a_tile(implementation, tokens, vocab):
    student_ND, teacher_ND = (truth.normal(i, tokens, 8) for i in (0, 1))
    head_VD = truth.normal(2, vocab, 8)
    # One row prefers the last token: a dropped end of the vocabulary shows.
    head_VD = head_VD.at[-1].set(20 * student_ND[0] / jnp.sum(student_ND[0] ** 2))
    check(implementation, student_ND, teacher_ND, head_VD, "jeffreys")


@truth.streaming
def test_extreme_logits_lose_nothing(implementation):
    """Probabilities that are 0 in float32: their logarithms still count."""
    assert np.nanmax(check(implementation, *truth.extreme(), "jeffreys")) > 1_000


@truth.streaming
def test_equal_distributions_have_no_kl_and_no_gradient(implementation):
    head_VD = truth.normal(1, 101, 16)
    for scale in (1.0, 1e3):
        h_ND = truth.normal(0, 11, 16, scale=scale)
        function = compiled(implementation, "student_teacher")
        kl_N, _, *gradients = function(h_ND, head_VD, h_ND, None, jnp.ones(11))
        # Equal rows may leave a matrix product some ulps of a logit apart.
        largest = float(np.abs(truth.logits(h_ND, head_VD)).max())
        ulp = np.finfo(np.float32).eps * max(1.0, largest)
        assert (kl_N >= 0).all() and (kl_N <= 4 * ulp).all()
        for gradient in gradients:
            assert jnp.abs(gradient).max() <= 40 * ulp * max(1.0, scale)


@truth.streaming
def test_the_teacher_carries_no_gradient_and_the_published_direction_is_the_default(implementation):
    student_ND, teacher_ND = (truth.normal(i, 5, 8) for i in (0, 1))
    heads = truth.normal(2, 33, 8), truth.normal(3, 33, 8)

    def kl(teacher_ND: jax.Array, teacher_head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
        kl_N = linear_kl(
            student_ND,
            teacher_ND,
            heads[0],
            head_teacher_VD=teacher_head_VD,
            implementation=implementation,
        )
        return kl_N.sum(), kl_N

    gradients, kl_N = jax.grad(kl, (0, 1), has_aux=True)(teacher_ND, heads[1])  # outside of jit
    assert not any(gradient.any() for gradient in gradients)
    wanted_N, *_ = expected(student_ND, teacher_ND, *heads, "student_teacher", np.ones(5))
    truth.assert_close(kl_N, wanted_N, "float32")
