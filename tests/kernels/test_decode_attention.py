"""`decode_attention` against float64, by every implementation; Pallas kernels interpreted."""

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


OPS = {
    name: jax.jit(partial(decode_attention, implementation=name))
    for name in ("reference", "xla", "pallas_tpu", "pallas_gpu")
} | {"xla, small blocks": jax.jit(partial(xla.decode_attention, block=16))}
every = pytest.mark.parametrize("implementation", OPS)


def covered(implementation: str, width: int, dtype: str) -> tuple[int, str]:
    """The nearest width of a head and type that an implementation takes."""
    return (128, "bfloat16") if implementation == "pallas_tpu" else (width, dtype)


def check(
    implementation: str,
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
    width, dtype = covered(implementation, width, dtype)
    batch = pool if all_rows else batch
    lengths_B = jnp.asarray(np.resize(lengths, batch), jnp.int32)
    shape = (heads[1], layers, pool, slots, width)
    q_BNH = truth.normal(0, batch, heads[0], width, dtype=dtype)
    keys, values = truth.normal(1, *shape, dtype=dtype), truth.normal(2, *shape, dtype=dtype)
    rows_B = np.random.default_rng(3).permutation(pool)[:batch]
    rows_B = np.arange(pool) if all_rows else rows_B
    for layer in {0, layers - 1}:
        given = None if all_rows else jnp.asarray(rows_B, jnp.int32)
        out = OPS[implementation](q_BNH, keys, values, layer, given, lengths_B)
        assert out.dtype == q_BNH.dtype and out.shape == q_BNH.shape
        wanted = expected(q_BNH, keys, values, layer, rows_B, lengths_B)
        truth.assert_close(out, wanted, dtype, f"layer {layer}")


@every
def test_rows_of_different_lengths_and_any_grouping_of_heads(implementation: str) -> None:
    check(implementation)
    check(implementation, dtype="bfloat16", all_rows=True)
    check(implementation, slots=384, lengths=(384, 1, 129), heads=(4, 4))  # several blocks
    check(implementation, slots=128, lengths=(128, 100, 3), heads=(14, 2), width=64)
    check(implementation, batch=1, pool=1, lengths=(9,), heads=(8, 1))
    if implementation == "xla":  # a last block that overlaps the one before
        check(implementation, slots=200, lengths=(200, 129, 128))


@every
def test_scores_of_thousands_lose_nothing(implementation: str) -> None:
    """The largest score wins whatever its size, in the first block or in the last."""
    width, dtype = covered(implementation, 16, "float32")
    keys, values = (truth.normal(i, 1, 1, 2, 256, width, dtype=dtype) for i in (1, 2))
    q_BNH = 4000.0 * jnp.stack([keys[0, 0, 0, :1], keys[0, 0, 1, 255:]])
    lengths_B = jnp.asarray([256, 256], jnp.int32)
    out = OPS[implementation](q_BNH, keys, values, 0, jnp.arange(2), lengths_B)
    wanted = expected(q_BNH, keys, values, 0, [0, 1], [256, 256])
    truth.assert_close(out, wanted, dtype, "mixed")


@every
def test_slots_beyond_the_length_do_not_count(implementation: str) -> None:
    """They may hold anything that is finite, of an earlier row say."""
    width, dtype = covered(implementation, 16, "float32")
    q_BNH = truth.normal(0, 2, 4, width, dtype=dtype)
    keys, values = (truth.normal(i, 2, 1, 2, 256, width, dtype=dtype) for i in (1, 2))
    lengths_B = jnp.asarray([40, 150], jnp.int32)
    beyond_PS = jnp.arange(256) >= lengths_B[:, None]
    altered = (
        jnp.where(beyond_PS[None, None, :, :, None], 1e4, part).astype(dtype)
        for part in (keys, values)
    )
    clean = OPS[implementation](q_BNH, keys, values, 0, jnp.arange(2), lengths_B)
    out = OPS[implementation](q_BNH, *altered, 0, jnp.arange(2), lengths_B)
    np.testing.assert_array_equal(out, clean)


def test_what_does_not_fit_is_refused() -> None:
    kv = jnp.zeros((2, 3, 5, 64, 16))
    usual = {
        "q_BNH": jnp.zeros((4, 6, 16)),
        "keys_KLPSH": kv,
        "values_KLPSH": kv,
        "layer": 0,
        "rows_B": jnp.arange(4),
        "lengths_B": jnp.ones(4, jnp.int32),
    }
    for changes, message in (
        (
            {"q_BNH": jnp.zeros((4, 5, 16))},
            "5 query heads cannot be divided evenly among 2 key/value heads",
        ),
        ({"q_BNH": jnp.zeros((4, 6, 16), jnp.int32)}, "q_BNH is int32"),
        ({"values_KLPSH": jnp.zeros((2, 3, 5, 32, 16))}, r"values_KLPSH has shape \[2, 3, 5, 32"),
        ({"rows_B": None}, r"q_BNH has shape \[4\], but the other arrays require \[5\]"),
        ({"rows_B": jnp.arange(3)}, r"rows_B has shape \[3\]"),
        ({"lengths_B": jnp.ones(3, jnp.int32)}, r"lengths_B has shape \[3\]"),
        ({"implementation": "cuda"}, "no implementation 'cuda'"),
    ):
        with pytest.raises(ValueError, match=f"^decode_attention:? .*{message}|{message}"):
            decode_attention(**usual | changes)
    for implementation, shape, message in (
        ("pallas_tpu", (2, 3, 5, 64, 64), "heads have width 64, but it must be a multiple of 128"),
        ("pallas_tpu", (2, 3, 5, 64, 128), "the cache is float32, but it must be bfloat16"),
        ("pallas_gpu", (2, 3, 5, 64, 24), "heads have width 24, but it must be a power of two"),
        ("pallas_gpu", (2, 3, 5, 72, 16), "72 slots do not divide into pages"),
    ):
        kv = jnp.zeros(shape)
        changes = {"q_BNH": jnp.zeros((4, 6, shape[-1])), "keys_KLPSH": kv, "values_KLPSH": kv}
        with pytest.raises(NotImplementedError, match=message):
            decode_attention(**usual | changes, implementation=implementation)
