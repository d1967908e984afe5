"""Digests see every bit and every place, and no division of an array over devices."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jexit.dist import make_mesh
from jexit.io.fingerprint import digests, fingerprint

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_)


def noise(dtype, shape=(8, 6)):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) > 0, jnp.float32).astype(dtype)


def by_hand(array) -> int:
    """Σ bits_i · (2i + 1) modulo 2³², with Python's own integers."""
    flat = np.asarray(array).reshape(-1)
    bits = flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[flat.dtype.itemsize])
    return sum(int(bit) * (2 * i + 1) for i, bit in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula(dtype):
    array = noise(dtype)
    assert digests({"a": array}) == {"a": by_hand(array)}
    assert digests({"number": jnp.int32(7)}) == {"number": 7}


@pytest.mark.parametrize("spec", [("data", None), (None, "tensor"), (("data", "fsdp"), "tensor")])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_division_changes_nothing(sizes, spec):
    array = jax.random.normal(jax.random.key(0), (8, 16), jnp.float32)
    whole = digests({"a": array}), fingerprint({"a": array})
    sharding = NamedSharding(make_mesh(*sizes), PartitionSpec(*spec))
    divided = jax.device_put(array, sharding)
    assert (digests({"a": divided}), fingerprint({"a": divided})) == whole


@pytest.mark.parametrize("place", [(0, 0), (3, 2), (7, 5)])
def test_every_bit_counts(place):
    array = np.asarray(noise(jnp.float32)).view(np.uint32)
    for bit in (0, 13, 31):
        changed = array.copy()
        changed[place] ^= np.uint32(1 << bit)
        pair = [digests({"a": jnp.asarray(x)})["a"] for x in (array, changed)]
        assert pair[0] != pair[1]


def test_places_count():
    array = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    found = {digests({"a": x})["a"] for x in (array, array[::-1], array[:, ::-1])}
    assert len(found) == 3
    same_bytes = {fingerprint({"a": array}), fingerprint({"a": array.reshape(4, 3)})}
    assert len(same_bytes | {fingerprint({"b": array})}) == 3


def test_arrays_of_the_host_keep_all_their_bits():
    values = np.asarray([np.nan, 1 / 3])  # float64, which a device would round
    assert digests({"host": values}) == {"host": zlib.crc32(values.view(np.uint8))}
