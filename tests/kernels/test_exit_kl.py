"""`exit_kl` against float64, by every implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels import truth

from jexit.kernels import ExitKL, exit_kl
from jexit.kernels.exit_kl import api, pallas_gpu, pallas_tpu, xla

truth.register_small_tiles(api.OPERATION, xla.exit_kl, pallas_tpu.exit_kl, pallas_gpu.exit_kl)


@functools.cache
def compiled(implementation: str) -> Any:
    return jax.jit(functools.partial(exit_kl, implementation=implementation))


def expected(h_final_ND: Any, h_exits_END: Any, head_VD: Any) -> ExitKL:
    final_NV = truth.logits(h_final_ND, head_VD)
    exits_ENV = truth.logits(h_exits_END, head_VD)
    log_final_NV = truth.log_softmax(final_NV)
    return ExitKL(
        kl_EN=truth.kl(log_final_NV, truth.log_softmax(exits_ENV)),
        entropy_N=truth.entropy(log_final_NV),
        logsumexp_N=truth.logsumexp(final_NV),
        agree_EN=exits_ENV.argmax(-1) == final_NV.argmax(-1),
    )


def check(implementation: str, h_final_ND: Any, h_exits_END: Any, head_VD: Any) -> ExitKL:
    out = compiled(implementation)(h_final_ND, h_exits_END, head_VD)
    wanted = expected(h_final_ND, h_exits_END, head_VD)
    for name in ("kl_EN", "entropy_N", "logsumexp_N"):
        assert getattr(out, name).dtype == jnp.float32
        truth.assert_close(getattr(out, name), getattr(wanted, name), h_final_ND.dtype.name, name)
    np.testing.assert_array_equal(out.agree_EN, wanted.agree_EN)
    return out


SHAPES = [  # tokens, width, vocabulary, exits, type of the final state, of the rest
    (13, 24, 97, 4, "float32", "float32"),
    (37, 16, 129, 1, "bfloat16", "bfloat16"),
    (5, 8, 70, 17, "float32", "bfloat16"),  # more exits than a GPU's registers hold
    (1, 7, 1, 1, "float32", "float32"),
]


@truth.every
def test_is_the_kl_at_any_shape(implementation):
    for tokens, width, vocab, exits, dtype, other in SHAPES:
        final_ND = truth.normal(0, tokens, width, dtype=dtype)
        exits_END = truth.normal(1, exits, tokens, width, dtype=other)
        check(implementation, final_ND, exits_END, truth.normal(2, vocab, width, dtype=other))
    out = exit_kl(
        jnp.zeros((0, 8)), jnp.zeros((3, 0, 8)), jnp.zeros((9, 8)), implementation=implementation
    )
    assert out.kl_EN.shape == (3, 0) and out.entropy_N.shape == (0,)


@truth.with_chip_tiles
@truth.beyond_a_tile
def test_covers_more_than_a_tile(implementation, tokens, vocab):
    final_ND, exits_END = truth.normal(0, tokens, 8), truth.normal(1, 2, tokens, 8)
    head_VD = truth.normal(2, vocab, 8)
    # One row prefers the last token: a dropped end of the vocabulary shows.
    head_VD = head_VD.at[-1].set(20 * final_ND[0] / jnp.sum(final_ND[0] ** 2))
    check(implementation, final_ND, exits_END, head_VD)


@truth.streaming
def test_extreme_logits_lose_nothing(implementation):
    student_ND, teacher_ND, head_VD = truth.extreme()
    out = check(implementation, teacher_ND, jnp.stack([student_ND, teacher_ND]), head_VD)
    assert out.kl_EN.max() > 1_000
    assert (out.kl_EN[1] == 0).all()


@truth.streaming
def test_kl_is_never_negative_and_none_where_the_exit_is_the_final_state(implementation):
    head_VD = truth.normal(1, 101, 16)
    for scale in (0.0, 1.0, 1e3):
        final_ND = truth.normal(0, 11, 16, scale=scale)
        near_ND = final_ND + truth.normal(2, 11, 16, scale=1e-5)
        out = compiled(implementation)(final_ND, jnp.stack([final_ND, near_ND]), head_VD)
        # Equal rows may leave a matrix product some ulps of a logit apart.
        ulp = np.finfo(np.float32).eps * max(1.0, float(jnp.abs(out.logsumexp_N).max()))
        assert (out.kl_EN >= 0).all() and (out.kl_EN[0] <= 4 * ulp).all()
        assert out.agree_EN[0].all()


@truth.streaming
def test_rows_of_nan_stay_alone_and_of_equal_maxima_the_first_counts(implementation):
    """Tokens 3 and 90 tie in the final state; each exit prefers one of them."""
    head_VD = jnp.zeros((97, 2)).at[3].set(jnp.array([1.0, 0.0])).at[90].set(jnp.array([1.0, 1.0]))
    final_ND = jnp.array([[4.0, 0.0], [jnp.nan, jnp.nan], [4.0, 0.0]])
    exits_END = jnp.array([[[4.0, -4.0]] * 3, [[4.0, 4.0]] * 3, [[8.0, 0.0]] * 3])
    out = compiled(implementation)(final_ND, exits_END, head_VD)
    assert jnp.isnan(out.kl_EN[:, 1]).all()
    wanted = expected(final_ND[::2], exits_END[:, ::2], head_VD)
    truth.assert_close(out.kl_EN[:, ::2], wanted.kl_EN, "float32")
    for row in (0, 2):
        np.testing.assert_array_equal(out.agree_EN[:, row], [True, False, True])


def test_no_gradient_passes():
    arguments = truth.normal(0, 5, 8), truth.normal(1, 2, 5, 8), truth.normal(2, 30, 8)
    for implementation in ("reference", *truth.CHIP_TILES):
        gradients = jax.jit(
            jax.grad(
                lambda *a, name=implementation: exit_kl(*a, implementation=name).kl_EN.sum(),
                (0, 1, 2),
            )
        )(*arguments)
        assert not any(gradient.any() for gradient in gradients)
