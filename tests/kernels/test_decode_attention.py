"""`decode_attention`: every implementation runs the cases of `DecodeAttentionCases`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import truth

from jexit.kernels import decode_attention
from jexit.kernels.decode_attention import xla


def expected(
    q_BNH: Any, keys_KLPSH: Any, values_KLPSH: Any, layer: int, rows_B: Any, lengths_B: Any
) -> np.ndarray:
    """One head of one row after another, in float64."""
    q_BNH, keys, values = (truth.float64(part) for part in (q_BNH, keys_KLPSH, values_KLPSH))
    group = q_BNH.shape[1] // keys.shape[0]
    out_BNH = np.zeros(q_BNH.shape)
    for b, (row, length) in enumerate(zip(np.asarray(rows_B), np.asarray(lengths_B), strict=True)):
        for n in range(q_BNH.shape[1]):
            k_SH, v_SH = (part[n // group, layer, row, :length] for part in (keys, values))
            scores_S = k_SH @ q_BNH[b, n] / np.sqrt(q_BNH.shape[2])
            weights_S = np.exp(scores_S - scores_S.max())
            out_BNH[b, n] = weights_S @ v_SH / weights_S.sum()
    return out_BNH


class DecodeAttentionCases:
    """An implementation is a subclass that says how to call it, and what it takes."""

    widths = (16, 64, 128)
    dtypes = truth.DTYPES

    @staticmethod
    def op(*arguments: Any) -> jax.Array:
        raise NotImplementedError

    def check(
        self,
        *,
        batch: int = 3,
        pool: int = 5,
        heads: tuple[int, int] = (6, 2),
        layers: int = 3,
        slots: int = 64,
        width: int = 16,
        lengths: Any = (1, 17, 64),
        dtype: str = "float32",
        all_rows: bool = False,
    ) -> None:
        width = width if width in self.widths else self.widths[0]
        dtype = dtype if dtype in self.dtypes else self.dtypes[0]
        batch = pool if all_rows else batch
        lengths_B = jnp.asarray(np.resize(lengths, batch), jnp.int32)
        shape = (heads[1], layers, pool, slots, width)
        q_BNH = truth.normal(0, batch, heads[0], width, dtype=dtype)
        keys, values = truth.normal(1, *shape, dtype=dtype), truth.normal(2, *shape, dtype=dtype)
        rows_B = np.random.default_rng(3).permutation(pool)[:batch]
        rows_B = np.arange(pool) if all_rows else rows_B
        for layer in {0, layers - 1}:
            given = None if all_rows else jnp.asarray(rows_B, jnp.int32)
            out = jax.jit(self.op)(q_BNH, keys, values, layer, given, lengths_B)
            assert out.dtype == q_BNH.dtype and out.shape == q_BNH.shape
            wanted = expected(q_BNH, keys, values, layer, rows_B, lengths_B)
            truth.assert_close(out, wanted, dtype, f"layer {layer}")

    def test_rows_of_different_lengths(self) -> None:
        for all_rows in [False, True]:
            for dtype in truth.DTYPES:
                self.check(dtype=dtype, all_rows=all_rows)

    def test_several_blocks(self) -> None:
        for slots, longest in [(256, 200), (384, 384), (1024, 130)]:
            self.check(slots=slots, lengths=(longest, 1, 129))

    def test_any_grouping_of_heads(self) -> None:
        for heads in [(4, 4), (8, 1), (14, 2), (32, 8)]:
            self.check(heads=heads)

    def test_the_heads_of_real_models(self) -> None:
        for width in [64, 128]:
            self.check(width=width, heads=(8, 2), slots=128, lengths=(128, 100, 3))

    def test_one_row_of_one(self) -> None:
        self.check(batch=1, pool=1, lengths=(9,))

    def test_scores_of_thousands_lose_nothing(self) -> None:
        """The largest score wins whatever its size, in the first block or in the last."""
        width, dtype = self.widths[0], self.dtypes[0]
        keys = truth.normal(1, 1, 1, 2, 256, width, dtype=dtype)
        values = truth.normal(2, 1, 1, 2, 256, width, dtype=dtype)
        q_BNH = 4000.0 * jnp.stack([keys[0, 0, 0, :1], keys[0, 0, 1, 255:]])
        lengths_B = jnp.asarray([256, 256], jnp.int32)
        out = jax.jit(self.op)(q_BNH, keys, values, 0, jnp.arange(2), lengths_B)
        wanted = expected(q_BNH, keys, values, 0, [0, 1], [256, 256])
        truth.assert_close(out, wanted, dtype, "mixed")

    def test_slots_beyond_the_length_do_not_count(self) -> None:
        """They may hold anything that is finite, of an earlier row say."""
        width, dtype = self.widths[0], self.dtypes[0]
        q_BNH = truth.normal(0, 2, 4, width, dtype=dtype)
        keys, values = (truth.normal(i, 2, 1, 2, 256, width, dtype=dtype) for i in (1, 2))
        lengths_B = jnp.asarray([40, 150], jnp.int32)
        beyond_PS = jnp.arange(256) >= lengths_B[:, None]
        altered = (
            jnp.where(beyond_PS[None, None, :, :, None], 1e4, part).astype(dtype)
            for part in (keys, values)
        )
        clean = jax.jit(self.op)(q_BNH, keys, values, 0, jnp.arange(2), lengths_B)
        out = jax.jit(self.op)(q_BNH, *altered, 0, jnp.arange(2), lengths_B)
        np.testing.assert_array_equal(out, clean)


class TestReference(DecodeAttentionCases):
    op = staticmethod(partial(decode_attention, implementation="reference"))


class TestXla(DecodeAttentionCases):
    op = staticmethod(partial(decode_attention, implementation="xla"))

    def test_a_last_block_that_overlaps_the_one_before(self) -> None:
        self.check(slots=200, lengths=(200, 129, 128))


class TestXlaSmallBlocks(DecodeAttentionCases):
    op = staticmethod(partial(xla.decode_attention, block=16))


class TestPallasTPU(DecodeAttentionCases):
    """Interpreted."""

    widths = (128,)
    dtypes = ("bfloat16",)
    op = staticmethod(partial(decode_attention, implementation="pallas_tpu"))


class TestPallasGPU(DecodeAttentionCases):
    """Interpreted."""

    op = staticmethod(partial(decode_attention, implementation="pallas_gpu"))


def arguments(**changes: Any) -> dict[str, Any]:
    kv = jnp.zeros((2, 3, 5, 64, 16))
    defaults = {
        "q_BNH": jnp.zeros((4, 6, 16)),
        "keys_KLPSH": kv,
        "values_KLPSH": kv,
        "layer": 0,
        "rows_B": jnp.arange(4),
        "lengths_B": jnp.ones(4, jnp.int32),
    }
    return defaults | changes


WRONG_SHAPES = [
    ({"q_BNH": jnp.zeros((4, 5, 16))}, "5 query heads of 16 do not go with 2 key/value heads"),
    ({"q_BNH": jnp.zeros((4, 6, 8))}, "6 query heads of 8"),
    ({"q_BNH": jnp.zeros((4, 6, 16), jnp.int32)}, "q_BNH is int32"),
    ({"values_KLPSH": jnp.zeros((2, 3, 5, 32, 16))}, r"values_KLPSH has shape \[2, 3, 5, 32"),
    ({"rows_B": None}, r"q_BNH has shape \[4\] but \[5\]"),
    ({"rows_B": jnp.arange(3)}, r"rows_B has shape \[3\]"),
    ({"lengths_B": jnp.ones(3, jnp.int32)}, r"lengths_B has shape \[3\]"),
    ({"implementation": "cuda"}, "no implementation 'cuda'"),
]


def test_wrong_shapes_are_refused() -> None:
    for changes, message in WRONG_SHAPES:
        with pytest.raises(ValueError, match=f"^decode_attention:? .*{message}|{message}"):
            decode_attention(**arguments(**changes))


REFUSED_BY_NAME = [
    ("pallas_tpu", (2, 3, 5, 64, 64), "heads of 64 are not whole lanes"),
    ("pallas_tpu", (2, 3, 5, 64, 128), "the kernel rounds float32 to bfloat16"),
    ("pallas_gpu", (2, 3, 5, 64, 24), "heads of 24 are not a power of two"),
    ("pallas_gpu", (2, 3, 5, 72, 16), "72 slots do not divide into pages"),
]


def test_a_named_kernel_runs_or_raises() -> None:
    for implementation, shape, message in REFUSED_BY_NAME:
        kv = jnp.zeros(shape)
        changes = {"q_BNH": jnp.zeros((4, 6, shape[-1])), "keys_KLPSH": kv, "values_KLPSH": kv}
        with pytest.raises(NotImplementedError, match=message):
            decode_attention(**arguments(**changes), implementation=implementation)
