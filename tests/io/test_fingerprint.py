"""Digests see every bit and every place, and no division of an array over devices."""

import itertools
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


def test_the_formula_keeps_every_bit():
    noise = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_):
        array = jnp.asarray(noise > 0, jnp.float32).astype(dtype)
        assert digests({"a": array}) == {"a": by_hand(array)}
    assert digests({"number": jnp.int32(7)}) == {"number": 7}
    array = noise.view(np.uint32)
    for place, bit in itertools.product([(0, 0), (3, 2), (7, 5)], (0, 13, 31)):
        changed = array.copy()
        changed[place] ^= np.uint32(1 << bit)
        assert digests({"a": jnp.asarray(changed)}) != digests({"a": jnp.asarray(array)})
    values = np.asarray([np.nan, 1 / 3])  # float64, which a device would round
    assert digests({"host": values}) == {"host": zlib.crc32(values.view(np.uint8))}


def test_places_names_and_shapes_count_and_division_does_not():
    array = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    assert len({digests({"a": x})["a"] for x in (array, array[::-1], array[:, ::-1])}) == 3
    others = ({"a": array}, {"a": array.reshape(4, 3)}, {"b": array})
    assert len({*map(fingerprint, others)}) == 3
    array = jax.random.normal(jax.random.key(0), (8, 16), jnp.float32)
    whole = digests({"a": array}), fingerprint({"a": array})
    for sizes, spec in (
        ((8, 1, 1), ("data", None)),
        ((1, 4, 2), (None, "tensor")),
        ((2, 2, 2), (("data", "fsdp"), "tensor")),
    ):
        sharding = NamedSharding(make_mesh(*sizes), PartitionSpec(*spec))
        divided = jax.device_put(array, sharding)
        assert (digests({"a": divided}), fingerprint({"a": divided})) == whole
