"""The decode cache against attention over whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jexit.dist import make_mesh, use_mesh
from jexit.model.attention import KeysValues
from jexit.model.cache import Cache
from jexit.model.sharded_attention import cache_heads
from jexit.presets import PRESETS

ARCH = PRESETS["qwen3-0.6b"].architecture
ARCH = dataclasses.replace(ARCH, layers=3, query_heads=6, kv_heads=2, head_dim=4)


def normal(seed: int, *shape: int) -> KeysValues:
    return KeysValues(*(jax.random.normal(jax.random.key(seed + i), shape) for i in range(2)))


def test_attention_over_the_cache_equals_attention_over_the_sequence():
    """Two prompts of unequal length in three rows, a token each written after them, one layer."""
    prompts = Cache.empty(ARCH, 4, 5, jnp.float32)
    kv = normal(0, ARCH.layers, 2, 5, ARCH.kv_heads, ARCH.head_dim)
    prompts = prompts.with_prompts(jnp.asarray([3, 1]), kv)
    cache = Cache.empty(ARCH, 5, 8, jnp.float32)
    for row, place in ((4, 3), (0, 1), (2, 3)):
        cache = cache.with_row(jnp.asarray(row), prompts, jnp.asarray(place))
    rows_B, length_B = jnp.asarray([0, 2, 4]), jnp.asarray([3, 5, 5])
    new = normal(5, 3, 1, ARCH.kv_heads, ARCH.head_dim)
    cache = cache.written(jnp.asarray(1), rows_B, length_B, new).grown(20)
    assert cache.slots == 20
    q_BNH = jax.random.normal(jax.random.key(9), (3, ARCH.query_heads, ARCH.head_dim))
    whole = []
    for part, written in zip(kv, new, strict=True):
        full_BSKH = jnp.pad(part[1][jnp.asarray([1, 0, 0])], [(0, 0), (0, 1), (0, 0), (0, 0)])
        whole.append(full_BSKH.at[jnp.arange(3), length_B].set(written[:, 0]))
    exists_BS = jnp.arange(6) <= length_B[:, None]
    truth = jax.nn.dot_product_attention(
        q_BNH[:, None], *whole, mask=exists_BS[:, None, None], implementation="xla"
    )[:, 0]
    found = cache.attend(jnp.asarray(1), rows_B, q_BNH, length_B + 1)
    np.testing.assert_allclose(found, truth, atol=1e-6)


def test_what_has_no_place_is_not_written():
    cache = Cache.empty(ARCH, 3, 8, jnp.float32)
    new = normal(5, 2, 1, ARCH.kv_heads, ARCH.head_dim)
    rows_B = jnp.asarray([2, 0])
    after = cache.written(jnp.asarray(0), rows_B, jnp.asarray([8, 3]), new)
    written_PS = np.abs(after.keys_KLPSH[:, 0]).sum((0, 3)) > 0
    assert np.argwhere(written_PS).tolist() == [[0, 3]]
    kv = normal(0, ARCH.layers, 2, 5, ARCH.kv_heads, ARCH.head_dim)
    after = cache.with_prompts(jnp.asarray([3, 1]), kv)
    assert np.argwhere(np.abs(after.values_KLPSH).sum((0, 1, 3, 4)) > 0).tolist() == [[1]]


def test_heads_are_repeated_where_devices_are_more():
    """So that each device holds the heads of its own queries."""
    for tensor, heads in ((1, 2), (2, 2), (4, 4), (8, 8)):
        with use_mesh(make_mesh(tensor=tensor)):
            assert cache_heads(8, 2) == heads
    with use_mesh(make_mesh(tensor=4)):
        assert cache_heads(6, 2) == 2, "six queries do not divide over four devices"
