"""Digests see every bit and every place, and no division of an array over devices."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jexit.dist import make_mesh
from jexit.io.fingerprint import digests, fingerprint


def by_hand(array) -> int:
    """Σ bits_i · (2i + 1) modulo 2³², with Python's own integers."""
    flat = np.asarray(array).reshape(-1)
    bits = flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[flat.dtype.itemsize])
    return sum(int(bit) * (2 * i + 1) for i, bit in enumerate(bits)) % 2**32


def test_the_formula_holds_however_the_array_is_divided():
    noise = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_):
        array = jnp.asarray(noise > 0, jnp.float32).astype(dtype)
        assert digests({"a": array}) == {"a": by_hand(array)}
    values = np.asarray([np.nan, 1 / 3])  # float64, which a device would round
    assert digests({"host": values}) == {"host": zlib.crc32(values.view(np.uint8))}
    array = jnp.asarray(noise)
    sharding = NamedSharding(make_mesh(2, 2, 2), PartitionSpec(("data", "fsdp"), "tensor"))
    divided = jax.device_put(array, sharding)
    assert digests({"a": divided}) == {"a": by_hand(array)}
    prints = [{"a": array}, {"a": divided}, {"a": array.reshape(6, 8)}, {"b": array}]
    assert len({*map(fingerprint, prints)}) == 3
