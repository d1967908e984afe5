"""`linear_logprob`: every implementation runs the cases of `LinearLogprobCases`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import truth

from jexit.kernels import LinearLogprob, gpu, linear_logprob, tpu
from jexit.kernels.linear_logprob import pallas_gpu, pallas_tpu, xla

SMALL_TPU_TILE = tpu.Tile(tokens=4, vocab=32)
SMALL_GPU_TILE = gpu.Tile(tokens=16, vocab=32, width=16)


def expected(
    h_ND: Any, head_VD: Any, targets_N: Any, weights_3N: np.ndarray
) -> tuple[LinearLogprob, np.ndarray, np.ndarray]:
    """Outputs, and the gradients of their weighted sum to the states and the head.

    A target that does not exist contributes minus the normaliser.
    """
    z_NV = truth.logits(h_ND, head_VD)
    log_NV = truth.log_softmax(z_NV)
    p_NV, entropy_N = np.exp(log_NV), truth.entropy(log_NV)
    hit_NV = np.asarray(targets_N)[:, None] == np.arange(z_NV.shape[1])
    target_N = np.where(hit_NV.any(-1), np.sum(hit_NV * log_NV, axis=-1), -np.inf)
    of_target_N1, of_entropy_N1, of_logsumexp_N1 = np.asarray(weights_3N, np.float64)[..., None]
    dz_NV = of_target_N1 * (hit_NV - p_NV) + of_logsumexp_N1 * p_NV
    dz_NV -= of_entropy_N1 * p_NV * (log_NV + entropy_N[:, None])
    out = LinearLogprob(target_N, entropy_N, truth.logsumexp(z_NV))
    return out, dz_NV @ truth.float64(head_VD), dz_NV.T @ truth.float64(h_ND)


class LinearLogprobCases:
    """An implementation is a subclass that says how to call it, and where it is weaker."""

    # Whether a row of NaN that the loss masks out leaves the gradients alone.
    masks_nan = True

    @staticmethod
    def op(h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array) -> LinearLogprob:
        raise NotImplementedError

    def check(
        self,
        h_ND: Any,
        head_VD: Any,
        targets_N: Any,
        dtype: str,
        outputs: tuple[int, ...] = (0, 1, 2),
        jit: bool = True,
    ) -> LinearLogprob:
        """Outputs and the gradients of a sum over `outputs` against the truth; a row is masked."""
        weights_3N = np.zeros((3, h_ND.shape[0]), np.float32)
        weights_3N[list(outputs)] = truth.normal(9, len(outputs), h_ND.shape[0])
        weights_3N[:, 1:2] = 0

        def loss(h_ND: Any, head_VD: Any, targets_N: Any) -> Any:
            out = self.op(h_ND, head_VD, targets_N)
            return sum(jnp.sum(weights_3N[i] * out[i]) for i in outputs), out

        def everything(*arguments: Any) -> Any:
            plain = loss(*arguments)[1]
            alone_ND, out = jax.grad(loss, has_aux=True)(*arguments)
            (dh_ND, dhead_VD), _ = jax.grad(loss, (0, 1), has_aux=True)(*arguments)
            return plain, out, alone_ND, dh_ND, dhead_VD

        function = jax.jit(everything) if jit else everything
        plain, out, alone_ND, dh_ND, dhead_VD = function(h_ND, head_VD, targets_N)
        assert alone_ND.dtype == dh_ND.dtype == h_ND.dtype
        assert dhead_VD.dtype == head_VD.dtype
        wanted, wanted_ND, wanted_VD = expected(h_ND, head_VD, targets_N, weights_3N)
        for name, value in zip(wanted._fields, wanted, strict=True):
            assert getattr(out, name).dtype == jnp.float32
            truth.assert_close(getattr(plain, name), value, dtype, name)
            truth.assert_close(getattr(out, name), value, dtype, f"{name} beside a gradient")
        truth.assert_close(alone_ND, wanted_ND, dtype, "gradient to the states alone")
        truth.assert_close(dh_ND, wanted_ND, dtype, "gradient to the states")
        truth.assert_close(dhead_VD, wanted_VD, dtype, "gradient to the head")
        return out

    def test_every_output_and_its_gradients(self) -> None:
        for outputs in [(0,), (1,), (2,), (0, 1, 2)]:
            for dtype in truth.DTYPES:
                h_ND, head_VD = (
                    truth.normal(0, 13, 24, dtype=dtype),
                    truth.normal(1, 97, 24, dtype=dtype),
                )
                # The first and the last token, those around a tile's edge, and repeated ones.
                targets_N = jnp.array([0, 96, 96, 31, 32, 33, 63, 64, 65, 95, 5, 5, 5])
                self.check(h_ND, head_VD, targets_N, dtype, outputs)

    def test_any_shape(self) -> None:
        for tokens, width, vocab in [(1, 7, 2), (37, 16, 129), (9, 33, 64), (4, 5, 3)]:
            targets_N = (vocab - 1 - jnp.arange(tokens)) % vocab
            h_ND, head_VD = truth.normal(0, tokens, width), truth.normal(1, vocab, width)
            self.check(h_ND, head_VD, targets_N, "float32")

    def test_covers_a_whole_vocabulary(self) -> None:
        for dtype in truth.DTYPES:
            h_ND = truth.normal(0, 3, 8, dtype=dtype)
            head_VD = truth.normal(1, truth.LARGE_VOCAB, 8, dtype=dtype)
            targets_N = jnp.array([truth.LARGE_VOCAB - 1, 0, truth.LARGE_VOCAB - 1])
            self.check(h_ND, head_VD, targets_N, dtype)

    def test_extreme_logits_lose_nothing(self) -> None:
        for dtype in truth.DTYPES:
            h_ND, _, head_VD = truth.extreme(dtype)
            targets_N = jnp.arange(10).at[0].set(2)
            out = self.check(h_ND, head_VD, targets_N, dtype)
            assert out.logprob_N.min() <= -10_000
            assert out.entropy_N.min() >= 0

    def test_a_nearly_certain_target(self) -> None:
        """Its log-probability is tiny, and not 0, next to logits in the hundreds."""
        head_VD = jnp.array([[1.0], [0.0], [0.0]])
        h_ND = jnp.array([[12.0], [14.0], [15.0]])
        out = jax.jit(self.op)(h_ND, head_VD, jnp.zeros(3, jnp.int32))
        wanted_N = -np.log1p(2 * np.exp(-truth.float64(h_ND)[:, 0]))
        np.testing.assert_allclose(out.logprob_N, wanted_N, rtol=0, atol=1.2e-7)

    def test_targets_of_narrow_or_unsigned_integers(self) -> None:
        for dtype in [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32]:
            h_ND, head_VD = truth.normal(0, 4, 8), truth.normal(1, 1100, 8)
            self.check(h_ND, head_VD, jnp.array([0, 1, 100, 127], dtype), "float32")

    @pytest.mark.parametrize("impossible", [-1, 97, 2**31 - 1])
    def test_a_target_that_does_not_exist_has_no_probability(self, impossible: int) -> None:
        """Masked by `where`, as losses do, it has no gradient; unmasked, its normaliser's."""
        h_ND, head_VD = truth.normal(0, 4, 8), truth.normal(1, 97, 8)
        targets_N = jnp.array([1, impossible, 2, 96])

        def gradients(mask_N: jax.Array) -> Any:
            def loss(h_ND: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, LinearLogprob]:
                out = self.op(h_ND, head_VD, targets_N)
                return jnp.where(mask_N, out.logprob_N, 0).sum(), out

            alone_ND, _ = jax.grad(loss, has_aux=True)(h_ND, head_VD)
            return alone_ND, *jax.grad(loss, (0, 1), has_aux=True)(h_ND, head_VD)

        compiled = jax.jit(gradients)
        for mask_N in (targets_N != impossible, jnp.ones(4, bool)):
            weights_3N = np.zeros((3, 4))
            weights_3N[0] = mask_N
            wanted, wanted_ND, wanted_VD = expected(h_ND, head_VD, targets_N, weights_3N)
            alone_ND, (dh_ND, dhead_VD), out = compiled(mask_N)
            assert out.logprob_N[1] == -jnp.inf
            truth.assert_close(out.entropy_N, wanted.entropy_N, "float32", "entropy_N")
            truth.assert_close(alone_ND, wanted_ND, "float32", "gradient to the states alone")
            truth.assert_close(dh_ND, wanted_ND, "float32", "gradient to the states")
            truth.assert_close(dhead_VD, wanted_VD, "float32", "gradient to the head")

    @pytest.mark.parametrize("output", ["logprob_N", "entropy_N", "logsumexp_N"])
    def test_masked_rows_of_nan_touch_no_gradient(self, output: str) -> None:
        """Padding may hold anything: a row that the loss masks out gives zeros, not NaN."""
        if not self.masks_nan:
            pytest.skip("0 · NaN in the gradient that JAX derives")
        h_ND, head_VD = truth.normal(0, 12, 8), truth.normal(1, 70, 8)
        targets_N = jnp.arange(12)
        live_N = np.arange(12) % 4 != 3
        weights_3N = np.zeros((3, 12))
        weights_3N[LinearLogprob._fields.index(output)] = live_N
        _, wanted_ND, wanted_VD = expected(h_ND, head_VD, targets_N, weights_3N)
        h_ND = jnp.where(live_N[:, None], h_ND, jnp.nan)

        def loss(h_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
            out_N = getattr(self.op(h_ND, head_VD, targets_N), output)
            return jnp.sum(jnp.where(live_N, out_N, 0))

        alone_ND = jax.jit(jax.grad(loss))(h_ND, head_VD)
        dh_ND, dhead_VD = jax.jit(jax.grad(loss, (0, 1)))(h_ND, head_VD)
        truth.assert_close(alone_ND, wanted_ND, "float32", "gradient to the states alone")
        truth.assert_close(dh_ND, wanted_ND, "float32", "gradient to the states")
        truth.assert_close(dhead_VD, wanted_VD, "float32", "gradient to the head")

    def test_works_outside_jit(self) -> None:
        h_ND, head_VD = truth.normal(0, 5, 8), truth.normal(1, 33, 8)
        self.check(h_ND, head_VD, jnp.arange(5) + 28, "float32", jit=False)

    def test_a_flat_distribution(self) -> None:
        """Every probability is 1/V, to the last digit of float32 but a few."""
        out = jax.jit(self.op)(jnp.zeros((3, 8)), truth.normal(1, 97, 8), jnp.array([0, 50, 96]))
        np.testing.assert_allclose(out.logprob_N, -np.log(97), rtol=3e-7)
        np.testing.assert_allclose(out.entropy_N, np.log(97), rtol=3e-7)

    def test_no_tokens_give_empty_outputs(self) -> None:
        out = self.op(jnp.zeros((0, 8)), jnp.zeros((9, 8)), jnp.zeros(0, jnp.int32))
        assert [value.shape for value in out] == [(0,)] * 3


class TestReference(LinearLogprobCases):
    op = staticmethod(partial(linear_logprob, implementation="reference"))
    masks_nan = False


class TestXla(LinearLogprobCases):
    op = staticmethod(partial(linear_logprob, implementation="xla"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        h_ND, head_VD = truth.normal(0, 1100, 8), truth.normal(1, 2500, 8)
        targets_N = jnp.arange(1100) + 1400
        self.check(h_ND, head_VD, targets_N, "float32")


class TestXlaSmallTiles(LinearLogprobCases):
    @staticmethod
    def op(h_ND: Any, head_VD: Any, targets_N: Any) -> LinearLogprob:
        targets_N = targets_N.astype(jnp.int32)
        return xla.linear_logprob(h_ND, head_VD, targets_N, chunk_tokens=4, chunk_vocab=32)


@pytest.mark.slow
class TestPallasTPU(LinearLogprobCases):
    """Interpreted, with the tiles of a chip."""

    op = staticmethod(partial(linear_logprob, implementation="pallas_tpu"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        h_ND, head_VD = truth.normal(0, 600, 8), truth.normal(1, 1100, 8)
        self.check(h_ND, head_VD, jnp.arange(600) + 450, "float32")

    @pytest.mark.parametrize(
        ("of_h", "of_head"), [("float32", "bfloat16"), ("bfloat16", "float32")]
    )
    def test_operands_of_two_types_meet_in_the_wider_one(self, of_h: str, of_head: str) -> None:
        h_ND, head_VD = truth.normal(0, 40, 16, dtype=of_h), truth.normal(1, 300, 16, dtype=of_head)
        targets_N = jnp.arange(40)

        def loss(h_ND: Any, head_VD: Any, implementation: str) -> jax.Array:
            return linear_logprob(h_ND, head_VD, targets_N, implementation=implementation)[0].sum()

        ours, theirs = (
            jax.grad(loss, (0, 1))(h_ND, head_VD, name) for name in ("pallas_tpu", "xla")
        )
        for found, wanted, dtype in zip(ours, theirs, (of_h, of_head), strict=True):
            # As exact as the type that the gradient is rounded to, not that of the other operand.
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            np.testing.assert_allclose(
                truth.float64(found), truth.float64(wanted), rtol=tolerance, atol=tolerance
            )


class TestPallasTPUSmallTiles(LinearLogprobCases):
    @staticmethod
    def op(h_ND: Any, head_VD: Any, targets_N: Any) -> LinearLogprob:
        tile = SMALL_TPU_TILE if head_VD.shape[0] < truth.LARGE_VOCAB else tpu.BY_CHIP
        return pallas_tpu.linear_logprob(h_ND, head_VD, targets_N.astype(jnp.int32), tile=tile)


@pytest.mark.slow
class TestPallasGPU(LinearLogprobCases):
    """Interpreted, with the tiles of a chip."""

    op = staticmethod(partial(linear_logprob, implementation="pallas_gpu"))

    def test_default_tiles_that_do_not_divide(self) -> None:
        """More tokens and more vocabulary than one default tile holds."""
        h_ND, head_VD = truth.normal(0, 600, 8), truth.normal(1, 1100, 8)
        self.check(h_ND, head_VD, jnp.arange(600) + 450, "float32")


class TestPallasGPUSmallTiles(LinearLogprobCases):
    @staticmethod
    def op(h_ND: Any, head_VD: Any, targets_N: Any) -> LinearLogprob:
        tile = SMALL_GPU_TILE if head_VD.shape[0] < truth.LARGE_VOCAB else gpu.BY_CHIP
        return pallas_gpu.linear_logprob(h_ND, head_VD, targets_N.astype(jnp.int32), tile=tile)


WRONG_SHAPES = [
    (((2, 3, 8), (9, 8), (2, 3)), "h_ND is float32.* flatten batch and time"),
    (((4, 8), (9, 7), (4,)), "h_ND has width 8 but the head has width 7"),
    (((4, 8), (8,), (4,)), r"head_VD is float32\[8\]"),
    (((4, 8), (9, 8), (5,)), r"targets_N has shape \[5\] but \[4\]"),
    (((4, 8), (9, 8), (4, 1)), r"targets_N has shape \[4, 1\] but \[4\]"),
]


def test_wrong_shapes_are_refused() -> None:
    for shapes, message in WRONG_SHAPES:
        h_ND, head_VD, targets_N = map(jnp.zeros, shapes)
        with pytest.raises(ValueError, match=f"^linear_logprob: {message}"):
            linear_logprob(h_ND, head_VD, targets_N.astype(jnp.int32))


def test_targets_of_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets_N is float32 but must be integer token ids"):
        linear_logprob(jnp.zeros((4, 8)), jnp.zeros((9, 8)), jnp.zeros(4))


def test_an_unknown_implementation_is_refused() -> None:
    arguments = jnp.zeros((4, 8)), jnp.zeros((9, 8)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"linear_logprob has no implementation 'c'.*reference"):
        linear_logprob(*arguments, implementation="c")
