"""`linear_kl`: every implementation runs the cases of `LinearKLCases`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import truth

from jexit.kernels import gpu, linear_kl, tpu
from jexit.kernels.linear_kl import pallas_gpu, pallas_tpu, xla

SMALL_TPU_TILE = tpu.Tile(tokens=4, vocab=32)
SMALL_GPU_TILE = gpu.Tile(tokens=16, vocab=32, width=16)

DIRECTIONS = ("student_teacher", "teacher_student", "jeffreys")


def expected(
    student_ND: Any, teacher_ND: Any, head_VD: Any, teacher_head_VD: Any, direction: str, g_N: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL per token, and the gradients of Σ g kl to the student's states and head."""
    log_p_NV = truth.log_softmax(truth.logits(student_ND, head_VD))
    teacher_head_VD = head_VD if teacher_head_VD is None else teacher_head_VD
    log_q_NV = truth.log_softmax(truth.logits(teacher_ND, teacher_head_VD))
    p_NV, q_NV = np.exp(log_p_NV), np.exp(log_q_NV)
    kl_N, dz_NV = np.zeros(len(p_NV)), np.zeros_like(p_NV)
    if direction != "teacher_student":
        forward_N = truth.kl(log_p_NV, log_q_NV)
        kl_N += forward_N
        dz_NV += p_NV * (log_p_NV - log_q_NV - forward_N[:, None])
    if direction != "student_teacher":
        kl_N += truth.kl(log_q_NV, log_p_NV)
        dz_NV += p_NV - q_NV
    dz_NV *= truth.float64(g_N)[:, None]
    return kl_N, dz_NV @ truth.float64(head_VD), dz_NV.T @ truth.float64(student_ND)


class LinearKLCases:
    """An implementation is a subclass that says how to call it, and where it is weaker."""

    # Whether a gradient keeps its digits where logits of 10⁴ are within a nat of each other.
    gradient_exact_at_extremes = True
    # Whether a row of NaN that the loss masks out leaves the gradients alone.
    masks_nan = True

    @staticmethod
    def op(*arguments: Any, direction: str, head_teacher_VD: Any = None) -> jax.Array:
        raise NotImplementedError

    def gradients(self, g_N: jax.Array, direction: str, **kwargs: Any) -> Any:
        """A function of states and head: KL and gradient to the states alone, and to both."""

        def loss(student_ND: Any, head_VD: Any, teacher_ND: Any, teacher_head_VD: Any) -> Any:
            kl_N = self.op(
                student_ND,
                teacher_ND,
                head_VD,
                direction=direction,
                head_teacher_VD=teacher_head_VD,
                **kwargs,
            )
            return jnp.sum(g_N * kl_N), kl_N

        def both(student_ND: Any, head_VD: Any, teacher_ND: Any, teacher_head_VD: Any) -> Any:
            arguments = (student_ND, head_VD, teacher_ND, teacher_head_VD)
            plain_N = loss(*arguments)[1]
            alone_ND, kl_N = jax.grad(loss, has_aux=True)(*arguments)
            (dh_ND, dhead_VD), _ = jax.grad(loss, (0, 1), has_aux=True)(*arguments)
            return plain_N, kl_N, alone_ND, dh_ND, dhead_VD

        return both

    def check(
        self,
        student_ND: Any,
        teacher_ND: Any,
        head_VD: Any,
        dtype: str,
        direction: str = "student_teacher",
        teacher_head_VD: Any = None,
        jit: bool = True,
        gradient_exact: bool = True,
    ) -> np.ndarray:
        """Forward and gradients against the truth; one row is masked."""
        g_N = truth.normal(9, student_ND.shape[0])
        g_N = g_N.at[1:2].set(0)
        function = self.gradients(g_N, direction)
        function = jax.jit(function) if jit else function
        found = function(student_ND, head_VD, teacher_ND, teacher_head_VD)
        plain_N, kl_N, alone_ND, dh_ND, dhead_VD = found
        assert kl_N.dtype == jnp.float32
        assert alone_ND.dtype == dh_ND.dtype == student_ND.dtype
        assert dhead_VD.dtype == head_VD.dtype
        arguments = (student_ND, teacher_ND, head_VD, teacher_head_VD, direction, g_N)
        wanted_N, wanted_ND, wanted_VD = expected(*arguments)
        truth.assert_close(plain_N, wanted_N, dtype, "kl_N")
        truth.assert_close(kl_N, wanted_N, dtype, "kl_N beside a gradient")
        if not gradient_exact:
            assert all(jnp.isfinite(gradient).all() for gradient in (alone_ND, dh_ND, dhead_VD))
            return np.asarray(kl_N)
        truth.assert_close(alone_ND, wanted_ND, dtype, "gradient to the states alone")
        truth.assert_close(dh_ND, wanted_ND, dtype, "gradient to the states")
        truth.assert_close(dhead_VD, wanted_VD, dtype, "gradient to the head")
        return np.asarray(kl_N)

    def test_every_direction_and_its_gradients(self) -> None:
        for direction in DIRECTIONS:
            for dtype in truth.DTYPES:
                student_ND, teacher_ND = (truth.normal(i, 13, 24, dtype=dtype) for i in (0, 1))
                self.check(
                    student_ND, teacher_ND, truth.normal(2, 97, 24, dtype=dtype), dtype, direction
                )

    def test_any_shape(self) -> None:
        for tokens, width, vocab in [(1, 7, 2), (37, 16, 129), (9, 33, 64), (4, 5, 3)]:
            student_ND, teacher_ND = (truth.normal(i, tokens, width) for i in (0, 1))
            head_VD = truth.normal(2, vocab, width)
            self.check(student_ND, teacher_ND, head_VD, "float32", "jeffreys")

    def test_the_teacher_may_have_its_own_head_and_width(self) -> None:
        for direction in DIRECTIONS[::2]:
            teacher_ND, teacher_head_VD = truth.normal(1, 13, 10), truth.normal(3, 97, 10)
            self.check(
                truth.normal(0, 13, 24),
                teacher_ND,
                truth.normal(2, 97, 24),
                "float32",
                direction,
                teacher_head_VD,
            )

    def test_covers_a_whole_vocabulary(self) -> None:
        for dtype in truth.DTYPES:
            student_ND, teacher_ND = (truth.normal(i, 3, 8, dtype=dtype) for i in (0, 1))
            head_VD = truth.normal(2, truth.LARGE_VOCAB, 8, dtype=dtype)
            # One row prefers the last token: a dropped end of the vocabulary shows.
            head_VD = head_VD.at[-1].set(20 * student_ND[0] / jnp.sum(student_ND[0] ** 2))
            self.check(student_ND, teacher_ND, head_VD, dtype, "jeffreys")

    def test_extreme_logits_lose_nothing(self) -> None:
        for direction, dtype in [*((d, "float32") for d in DIRECTIONS), ("jeffreys", "bfloat16")]:
            student_ND, teacher_ND, head_VD = truth.extreme(dtype)
            kl_N = self.check(
                student_ND,
                teacher_ND,
                head_VD,
                dtype,
                direction,
                gradient_exact=self.gradient_exact_at_extremes,
            )
            assert kl_N.max() > 1_000

    def test_a_nearly_one_hot_teacher(self) -> None:
        """Probabilities down to e⁻²⁰⁰, which are 0 in float32: their logarithms still count."""
        for direction in DIRECTIONS:
            head_VD = truth.normal(2, 97, 16)
            teacher_ND = 8 * head_VD[:13]
            self.check(truth.normal(0, 13, 16), teacher_ND, head_VD, "float32", direction)

    def test_equal_distributions_have_no_kl_and_no_gradient(self) -> None:
        for scale in [1.0, 1e3]:
            for direction in DIRECTIONS:
                h_ND, head_VD = truth.normal(0, 11, 16, scale=scale), truth.normal(1, 101, 16)
                function = jax.jit(self.gradients(jnp.ones(11), direction))
                kl_N, _, *gradients = function(h_ND, head_VD, h_ND, None)
                # Equal rows may leave a matrix product some ulps of a logit apart.
                ulp = np.finfo(np.float32).eps * max(
                    1.0, float(np.abs(truth.logits(h_ND, head_VD)).max())
                )
                assert (kl_N >= 0).all() and (kl_N <= 4 * ulp).all()
                for gradient in gradients:
                    assert jnp.abs(gradient).max() <= 40 * ulp * max(1.0, scale)

    @pytest.mark.parametrize("direction", DIRECTIONS[1:])
    def test_masked_rows_of_nan_touch_no_gradient(self, direction: str) -> None:
        """Padding may hold anything: a row that the loss masks out gives zeros, not NaN."""
        if not self.masks_nan:
            pytest.skip("0 · NaN in the gradient that JAX derives")
        student_ND, teacher_ND = (truth.normal(i, 12, 8) for i in (0, 1))
        head_VD = truth.normal(2, 70, 8)
        live_N = np.arange(12) % 4 != 3
        _, wanted_ND, wanted_VD = expected(student_ND, teacher_ND, head_VD, None, direction, live_N)
        student_ND, teacher_ND = (
            jnp.where(live_N[:, None], h_ND, jnp.nan) for h_ND in (student_ND, teacher_ND)
        )

        def loss(student_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
            kl_N = self.op(student_ND, teacher_ND, head_VD, direction=direction)
            return jnp.sum(jnp.where(live_N, kl_N, 0))

        alone_ND = jax.jit(jax.grad(loss))(student_ND, head_VD)
        dh_ND, dhead_VD = jax.jit(jax.grad(loss, (0, 1)))(student_ND, head_VD)
        truth.assert_close(alone_ND, wanted_ND, "float32", "gradient to the states alone")
        truth.assert_close(dh_ND, wanted_ND, "float32", "gradient to the states")
        truth.assert_close(dhead_VD, wanted_VD, "float32", "gradient to the head")

    def test_works_outside_jit(self) -> None:
        student_ND, teacher_ND = (truth.normal(i, 5, 8) for i in (0, 1))
        head_VD = truth.normal(2, 33, 8)
        self.check(student_ND, teacher_ND, head_VD, "float32", "jeffreys", jit=False)

    def test_the_teacher_carries_no_gradient(self) -> None:
        student_ND, teacher_ND = (truth.normal(i, 5, 8) for i in (0, 1))
        heads = truth.normal(2, 33, 8), truth.normal(3, 33, 8)
        gradients = jax.grad(
            lambda teacher_ND, teacher_head_VD: self.op(
                student_ND, teacher_ND, heads[0], direction="jeffreys",
                head_teacher_VD=teacher_head_VD,
            ).sum(),
            (0, 1),
        )(teacher_ND, heads[1])  # fmt: skip
        for gradient in gradients:
            assert not gradient.any()

    def test_under_remat_and_scan(self) -> None:
        """Where losses over chunks of a long batch put it."""
        student_ND, teacher_ND = (truth.normal(i, 12, 8) for i in (0, 1))
        head_VD = truth.normal(2, 70, 8)

        @jax.checkpoint
        def step(total: jax.Array, part: Any) -> Any:
            return total + self.op(*part, head_VD, direction="student_teacher").sum(), None

        def loss(student_ND: jax.Array) -> jax.Array:
            parts = (student_ND.reshape(3, 4, 8), teacher_ND.reshape(3, 4, 8))
            return jax.lax.scan(step, jnp.float32(0), parts)[0]

        arguments = (student_ND, teacher_ND, head_VD, None, "student_teacher", np.ones(12))
        kl_N, wanted_ND, _ = expected(*arguments)
        value, dh_ND = jax.jit(jax.value_and_grad(loss))(student_ND)
        truth.assert_close(value, kl_N.sum(), "float32", "sum")
        truth.assert_close(dh_ND, wanted_ND, "float32", "gradient to the states")

    def test_no_tokens_give_an_empty_output(self) -> None:
        empty_ND, head_VD = jnp.zeros((0, 8)), jnp.zeros((9, 8))
        assert self.op(empty_ND, empty_ND, head_VD, direction="jeffreys").shape == (0,)


class TestReference(LinearKLCases):
    op = staticmethod(partial(linear_kl, implementation="reference"))
    gradient_exact_at_extremes = False  # its log-softmax rounds 10⁴ to 10⁻³
    masks_nan = False


class TestXla(LinearKLCases):
    op = staticmethod(partial(linear_kl, implementation="xla"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        student_ND, teacher_ND = (truth.normal(i, 700, 8) for i in (0, 1))
        self.check(student_ND, teacher_ND, truth.normal(2, 2500, 8), "float32", "jeffreys")


class TestXlaSmallTiles(LinearKLCases):
    @staticmethod
    def op(
        student_ND: Any,
        teacher_ND: Any,
        head_VD: Any,
        *,
        head_teacher_VD: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        return xla.linear_kl(
            student_ND,
            *jax.lax.stop_gradient((teacher_ND,)),
            head_VD,
            jax.lax.stop_gradient(head_teacher_VD),
            chunk_tokens=4,
            chunk_vocab=32,
            **kwargs,
        )


@pytest.mark.slow
class TestPallasTPU(LinearKLCases):
    """Interpreted, with the tiles of a chip."""

    op = staticmethod(partial(linear_kl, implementation="pallas_tpu"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        student_ND, teacher_ND = (truth.normal(i, 300, 8) for i in (0, 1))
        self.check(student_ND, teacher_ND, truth.normal(2, 1100, 8), "float32", "jeffreys")


class TestPallasTPUSmallTiles(LinearKLCases):
    @staticmethod
    def op(
        student_ND: Any,
        teacher_ND: Any,
        head_VD: Any,
        *,
        head_teacher_VD: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        teacher_ND, head_teacher_VD = jax.lax.stop_gradient((teacher_ND, head_teacher_VD))
        return pallas_tpu.linear_kl(
            student_ND,
            teacher_ND,
            head_VD,
            head_teacher_VD,
            tile=SMALL_TPU_TILE if head_VD.shape[0] < truth.LARGE_VOCAB else tpu.BY_CHIP,
            **kwargs,
        )


@pytest.mark.slow
class TestPallasGPU(LinearKLCases):
    """Interpreted, with the tiles of a chip."""

    op = staticmethod(partial(linear_kl, implementation="pallas_gpu"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        student_ND, teacher_ND = (truth.normal(i, 300, 8) for i in (0, 1))
        self.check(student_ND, teacher_ND, truth.normal(2, 1100, 8), "float32", "jeffreys")


class TestPallasGPUSmallTiles(LinearKLCases):
    @staticmethod
    def op(
        student_ND: Any,
        teacher_ND: Any,
        head_VD: Any,
        *,
        head_teacher_VD: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        teacher_ND, head_teacher_VD = jax.lax.stop_gradient((teacher_ND, head_teacher_VD))
        return pallas_gpu.linear_kl(
            student_ND,
            teacher_ND,
            head_VD,
            head_teacher_VD,
            tile=SMALL_GPU_TILE if head_VD.shape[0] < truth.LARGE_VOCAB else gpu.BY_CHIP,
            **kwargs,
        )


def test_the_published_direction_is_the_default() -> None:
    student_ND, teacher_ND = (truth.normal(i, 5, 8) for i in (0, 1))
    head_VD = truth.normal(2, 33, 8)
    arguments = (student_ND, teacher_ND, head_VD)
    wanted_N = expected(*arguments, None, "student_teacher", np.ones(5))[0]
    truth.assert_close(linear_kl(*arguments), wanted_N, "float32")


WRONG_SHAPES = [
    (((2, 3, 8), (2, 3, 8), (9, 8)), "h_student_ND is float32.* flatten batch and time"),
    (((4, 8), (4, 8), (9, 7)), "h_student_ND has width 8 but the head has width 7"),
    (((4, 8), (5, 8), (9, 8)), r"h_teacher_ND has shape \[5, 8\] but \[4, 8\]"),
    (((4, 8), (4, 7), (9, 8), (9, 8)), "h_teacher_ND has width 7 but the head has width 8"),
    (((4, 8), (5, 8), (9, 8), (9, 8)), r"h_teacher_ND has shape \[5\] but \[4\]"),
    (((4, 8), (4, 8), (9, 8), (8, 8)), r"head_teacher_VD has shape \[8\] but \[9\]"),
]


def test_wrong_shapes_are_refused() -> None:
    for shapes, message in WRONG_SHAPES:
        student_ND, teacher_ND, head_VD, *rest = map(jnp.zeros, shapes)
        head_teacher_VD = rest[0] if rest else None
        with pytest.raises(ValueError, match=f"^linear_kl: {message}"):
            linear_kl(student_ND, teacher_ND, head_VD, head_teacher_VD=head_teacher_VD)


def test_a_teacher_of_whole_numbers_is_refused() -> None:
    h_ND, head_VD = jnp.zeros((4, 8)), jnp.zeros((9, 8))
    with pytest.raises(ValueError, match=r"^linear_kl: head_teacher_VD is int32\[9, 8\]"):
        linear_kl(h_ND, h_ND, head_VD, head_teacher_VD=head_VD.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"^linear_kl: h_teacher_ND is int32"):
        linear_kl(h_ND, h_ND.astype(jnp.int32), head_VD)


def test_unknown_names_are_refused() -> None:
    h_ND, head_VD = jnp.zeros((4, 8)), jnp.zeros((9, 8))
    with pytest.raises(ValueError, match=r"linear_kl has no direction 'reverse'.*jeffreys"):
        linear_kl(h_ND, h_ND, head_VD, direction="reverse")
    with pytest.raises(ValueError, match=r"linear_kl has no implementation 'cuda'.*reference, xla"):
        linear_kl(h_ND, h_ND, head_VD, implementation="cuda")
