"""The decode cache against attention over whole sequences, and its bucket sizes."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.model.attention import KeysValues
from jexit.model.cache import SMALLEST_CACHE, Cache, cache_bucket, prompt_bucket

LAYERS, PROMPTS, SAMPLES, LENGTH, HEADS, KV_HEADS, WIDTH = 3, 2, 3, 5, 6, 2, 4


@pytest.fixture(scope="module")
def kv():
    shape = (LAYERS, PROMPTS, LENGTH, KV_HEADS, WIDTH)
    return KeysValues(*(jax.random.normal(jax.random.key(i), shape) for i in range(2)))


def test_attention_over_the_cache_equals_attention_over_the_sequence(kv):
    """One query a row, over the prompt and a token written after it; grouped queries, a mask."""
    rows = PROMPTS * SAMPLES
    slot = LENGTH + 1  # slot LENGTH stays empty: rows of unequal age leave such holes
    cache = Cache.of_prompts(kv, 12, SAMPLES)
    assert cache.slots == 12
    new = KeysValues(
        *(jax.random.normal(jax.random.key(i), (rows, 1, KV_HEADS, WIDTH)) for i in (5, 6))
    )
    cache = cache.written(jnp.asarray(1), jnp.asarray(slot), new).grown(20)
    q_BNH = jax.random.normal(jax.random.key(9), (rows, HEADS, WIDTH))
    mask_BS = (jnp.arange(20) < LENGTH) & (jax.random.uniform(jax.random.key(2), (rows, 20)) < 0.7)
    mask_BS = mask_BS.at[:, slot].set(True)
    for layer in range(LAYERS):
        whole = []
        for part, written in zip(kv, new, strict=True):
            full = jnp.zeros((rows, 20, KV_HEADS, WIDTH))
            full = full.at[:, :LENGTH].set(jnp.repeat(part[layer], SAMPLES, axis=0))
            whole.append(full.at[:, slot].set(written[:, 0] if layer == 1 else 0.0))
        truth = jax.nn.dot_product_attention(
            q_BNH[:, None], *whole, mask=mask_BS[:, None, None], implementation="xla"
        )[:, 0]
        found = cache.attend(jnp.asarray(layer), q_BNH, mask_BS)
        np.testing.assert_allclose(found, truth, atol=1e-6)


def test_prompt_buckets_hold_the_prompt_with_little_padding_in_few_sizes():
    sizes = set()
    for length in range(1, 4097):
        bucket = prompt_bucket(length)
        sizes.add(bucket)
        assert bucket >= length and (bucket <= 16 or bucket - length < max(16, bucket / 4))
    assert len(sizes) <= 32


def test_cache_buckets_at_least_double_until_the_last():
    most = 3000
    slots = [cache_bucket(1, most)]
    while slots[-1] < most:
        slots.append(cache_bucket(slots[-1] + 1, most))
    assert slots[0] == SMALLEST_CACHE and len(slots) <= 8
    assert slots[-1] == prompt_bucket(most) and slots[-1] - most < most / 4
    assert all(after >= 2 * before or after == slots[-1] for before, after in pairwise(slots))
