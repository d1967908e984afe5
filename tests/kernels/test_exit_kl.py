"""`exit_kl`: every implementation runs the cases of `ExitKLCases`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import truth

from jexit.kernels import ExitKL, exit_kl, gpu, tpu
from jexit.kernels.exit_kl import pallas_gpu, pallas_tpu, xla

SMALL_TPU_TILE = tpu.Tile(tokens=4, vocab=32)
SMALL_GPU_TILE = gpu.Tile(tokens=16, vocab=32, width=16)


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


class ExitKLCases:
    """An implementation is a subclass that says how to call it."""

    @staticmethod
    def op(h_final_ND: jax.Array, h_exits_END: jax.Array, head_VD: jax.Array) -> ExitKL:
        raise NotImplementedError

    def check(self, h_final_ND: Any, h_exits_END: Any, head_VD: Any, dtype: str) -> ExitKL:
        out = jax.jit(self.op)(h_final_ND, h_exits_END, head_VD)
        wanted = expected(h_final_ND, h_exits_END, head_VD)
        for name in ("kl_EN", "entropy_N", "logsumexp_N"):
            assert getattr(out, name).dtype == jnp.float32
            truth.assert_close(getattr(out, name), getattr(wanted, name), dtype, name)
        np.testing.assert_array_equal(out.agree_EN, wanted.agree_EN)
        return out

    def test_is_the_kl_at_any_shape(self) -> None:
        for tokens, width, vocab, exits in [
            (13, 24, 97, 4),
            (1, 7, 1, 1),
            (37, 16, 129, 1),
            (9, 33, 64, 7),
            (3, 5, 2, 2),
        ]:
            for dtype in truth.DTYPES:
                final_ND = truth.normal(0, tokens, width, dtype=dtype)
                exits_END = truth.normal(1, exits, tokens, width, dtype=dtype)
                self.check(final_ND, exits_END, truth.normal(2, vocab, width, dtype=dtype), dtype)

    def test_covers_a_whole_vocabulary(self) -> None:
        for dtype in truth.DTYPES:
            final_ND = truth.normal(0, 3, 8, dtype=dtype)
            exits_END = truth.normal(1, 2, 3, 8, dtype=dtype)
            head_VD = truth.normal(2, truth.LARGE_VOCAB, 8, dtype=dtype)
            # One row prefers the last token: a dropped end of the vocabulary shows.
            head_VD = head_VD.at[-1].set(20 * final_ND[0] / jnp.sum(final_ND[0] ** 2))
            self.check(final_ND, exits_END, head_VD, dtype)

    def test_extreme_logits_lose_nothing(self) -> None:
        for dtype in truth.DTYPES:
            student_ND, teacher_ND, head_VD = truth.extreme(dtype)
            out = self.check(teacher_ND, jnp.stack([student_ND, teacher_ND]), head_VD, dtype)
            assert out.kl_EN.max() > 1_000
            assert (out.kl_EN[1] == 0).all()

    def test_an_exit_equal_to_the_final_state_has_no_kl(self) -> None:
        for scale in [0.0, 1.0, 1e3]:
            final_ND = truth.normal(0, 11, 16, scale=scale)
            head_VD = truth.normal(1, 101, 16)
            out = jax.jit(self.op)(final_ND, jnp.stack([final_ND] * 3), head_VD)
            # Equal rows may leave a matrix product some ulps of a logit apart.
            ulp = np.finfo(np.float32).eps * max(1.0, float(jnp.abs(out.logsumexp_N).max()))
            assert (out.kl_EN >= 0).all() and (out.kl_EN <= 4 * ulp).all()
            assert out.agree_EN.all()

    def test_kl_is_never_negative(self) -> None:
        final_ND = truth.normal(0, 64, 16)
        exits_END = final_ND + truth.normal(1, 4, 64, 16, scale=1e-5)
        assert (jax.jit(self.op)(final_ND, exits_END, truth.normal(2, 501, 16)).kl_EN >= 0).all()

    def test_equal_maxima_count_as_the_first_of_them(self) -> None:
        """Tokens 3 and 90 tie in the final state; each exit prefers one of them."""
        head_VD = (
            jnp.zeros((97, 2)).at[3].set(jnp.array([1.0, 0.0])).at[90].set(jnp.array([1.0, 1.0]))
        )
        final_ND = jnp.array([[1.0, 0.0]])
        exits_END = jnp.array([[[1.0, -1.0]], [[1.0, 1.0]], [[2.0, 0.0]]])
        out = jax.jit(self.op)(final_ND, exits_END, head_VD)
        np.testing.assert_array_equal(out.agree_EN[:, 0], [True, False, True])

    def test_a_row_of_nan_stays_alone(self) -> None:
        """Padding may hold anything; other rows must not see it."""
        final_ND, head_VD = truth.normal(0, 12, 8), truth.normal(1, 70, 8)
        exits_END = truth.normal(2, 2, 12, 8)
        clean = jax.jit(self.op)(final_ND, exits_END, head_VD)
        out = jax.jit(self.op)(final_ND.at[5].set(jnp.nan), exits_END, head_VD)
        keep = np.arange(12) != 5
        np.testing.assert_array_equal(out.kl_EN[:, keep], clean.kl_EN[:, keep])
        assert jnp.isnan(out.kl_EN[:, 5]).all()

    def test_types_may_differ(self) -> None:
        final_ND = truth.normal(0, 5, 8)
        exits_END = truth.normal(1, 2, 5, 8, dtype="bfloat16")
        head_VD = truth.normal(2, 70, 8, dtype="bfloat16")
        self.check(final_ND, exits_END, head_VD, "float32")

    def test_no_tokens_give_empty_outputs(self) -> None:
        out = self.op(jnp.zeros((0, 8)), jnp.zeros((3, 0, 8)), jnp.zeros((9, 8)))
        assert out.kl_EN.shape == (3, 0) and out.entropy_N.shape == (0,)


class TestReference(ExitKLCases):
    op = staticmethod(partial(exit_kl, implementation="reference"))


class TestXla(ExitKLCases):
    op = staticmethod(partial(exit_kl, implementation="xla"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        final_ND = truth.normal(0, 700, 8)
        exits_END = truth.normal(1, 1, 700, 8)
        self.check(final_ND, exits_END, truth.normal(2, 2500, 8), "float32")


class TestXlaSmallTiles(ExitKLCases):
    op = staticmethod(partial(xla.exit_kl, chunk_tokens=4, chunk_vocab=32))


@pytest.mark.slow
class TestPallasTPU(ExitKLCases):
    """Interpreted, with the tiles of a chip."""

    op = staticmethod(partial(exit_kl, implementation="pallas_tpu"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        exits_END, head_VD = truth.normal(1, 2, 300, 8), truth.normal(2, 1100, 8)
        self.check(truth.normal(0, 300, 8), exits_END, head_VD, "float32")


class TestPallasTPUSmallTiles(ExitKLCases):
    @staticmethod
    def op(h_final_ND: Any, h_exits_END: Any, head_VD: Any) -> ExitKL:
        tile = SMALL_TPU_TILE if head_VD.shape[0] < truth.LARGE_VOCAB else tpu.BY_CHIP
        return pallas_tpu.exit_kl(h_final_ND, h_exits_END, head_VD, tile=tile)


@pytest.mark.slow
class TestPallasGPU(ExitKLCases):
    """Interpreted, with the tiles of a chip."""

    op = staticmethod(partial(exit_kl, implementation="pallas_gpu"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        exits_END, head_VD = truth.normal(1, 2, 300, 8), truth.normal(2, 1100, 8)
        self.check(truth.normal(0, 300, 8), exits_END, head_VD, "float32")

    def test_more_exits_than_the_registers_hold(self) -> None:
        exits_END, head_VD = truth.normal(1, 17, 5, 8), truth.normal(2, 300, 8)
        self.check(truth.normal(0, 5, 8), exits_END, head_VD, "float32")


class TestPallasGPUSmallTiles(ExitKLCases):
    @staticmethod
    def op(h_final_ND: Any, h_exits_END: Any, head_VD: Any) -> ExitKL:
        tile = SMALL_GPU_TILE if head_VD.shape[0] < truth.LARGE_VOCAB else gpu.BY_CHIP
        return pallas_gpu.exit_kl(h_final_ND, h_exits_END, head_VD, tile=tile)


def test_no_gradient_passes() -> None:
    arguments = truth.normal(0, 5, 8), truth.normal(1, 2, 5, 8), truth.normal(2, 30, 8)
    for implementation in ("reference", "xla", "pallas_tpu", "pallas_gpu"):
        gradients = jax.grad(
            lambda *a, name=implementation: exit_kl(*a, implementation=name).kl_EN.sum(), (0, 1, 2)
        )(*arguments)
        for gradient in gradients:
            assert not gradient.any()


WRONG_SHAPES = [
    (((2, 3, 8), (1, 2, 8), (9, 8)), "h_final_ND is float32.* flatten batch and time"),
    (((4, 8), (1, 4, 8), (9, 7)), "h_final_ND has width 8 but the head has width 7"),
    (((4, 8), (1, 4, 7), (9, 8)), r"h_exits_END has shape \[1, 4, 7\] but \[1, 4, 8\]"),
    (((4, 8), (4, 8), (9, 8)), r"h_exits_END has shape \[4, 8\]"),
    (((4, 8), (), (9, 8)), r"h_exits_END has shape \[\]"),
    (((4, 8), (1, 4, 8), (0, 8)), "the head has no rows"),
]


def test_wrong_shapes_are_refused() -> None:
    for shapes, message in WRONG_SHAPES:
        with pytest.raises(ValueError, match=f"^exit_kl: {message}"):
            exit_kl(*map(jnp.zeros, shapes))


def test_whole_numbers_are_refused() -> None:
    floats_END = jnp.zeros((1, 4, 8))
    with pytest.raises(ValueError, match=r"^exit_kl: h_final_ND is int32"):
        exit_kl(jnp.zeros((4, 8), jnp.int32), floats_END, jnp.zeros((9, 8)))
    with pytest.raises(ValueError, match=r"^exit_kl: h_exits_END is int32"):
        exit_kl(jnp.zeros((4, 8)), floats_END.astype(jnp.int32), jnp.zeros((9, 8)))


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exit_kl has no implementation 'cuda'.*reference, xla"):
        exit_kl(jnp.zeros((4, 8)), jnp.zeros((1, 4, 8)), jnp.zeros((9, 8)), implementation="cuda")
