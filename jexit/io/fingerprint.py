"""Checksums of arrays, which are the same for any number of devices and hosts."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the number of bytes per entry


def digests(named: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Returns a 32-bit digest of all bits of each array in `named`, by name.

    The digest of an array on devices is Σ_i bits_i · (2i + 1) modulo 2³², where bits_i is entry i,
    in row-major order, as an unsigned integer. This sum is exact in any order, so it does not
    depend on how the array is sharded, and no host needs another host's shards. The digest of a
    NumPy array is the CRC-32 of its bytes.
    """
    on_device = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array)}
    found = jax.device_get(_device_digests(on_device))
    return {
        name: int(found[name])
        if name in found
        else zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
        for name, leaf in named.items()
    }


def fingerprint(params: Any) -> str:
    """Returns a hash of a pytree's array names, shapes, dtypes and values, as 8 hex digits."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    total = hashlib.sha256()
    for name, digest in digests(named).items():
        total.update(f"{name} {named[name].shape} {named[name].dtype} {digest}".encode())
    return total.hexdigest()[:8]


@jax.jit
def _device_digests(named: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(_digest, named)


def _digest(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):  # without a reshape, which would gather a divided array
        stride = math.prod(leaf.shape[axis + 1 :]) & 0xFFFFFFFF
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
