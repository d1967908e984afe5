"""The cache as the pages that JAX's own paged attention kernels read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PAGE = 128  # slots; the largest that a cache is made of
LEAST_PAGE = 16


class Pages(NamedTuple):
    """Slots in pages, those of all rows and layers in one row, and where each query's are."""

    keys: jax.Array  # [K, pages, slots of a page, H]
    values: jax.Array
    table: jax.Array  # int32 [B, pages of a row]


def page_size(slots: int) -> int:
    """The largest power of two up to `PAGE` that divides the cache's slots.

    Raises NotImplementedError where that is less than a kernel's least product.
    """
    size = min(PAGE, slots & -slots)
    if size < LEAST_PAGE:
        raise NotImplementedError(f"{slots} slots do not divide into pages of {LEAST_PAGE}")
    return size


def pages_of(
    keys_KLPSH: jax.Array, values_KLPSH: jax.Array, layer: jax.Array, rows_B: jax.Array
) -> Pages:
    """Another view of the same memory: nothing is copied."""
    kv_heads, _, rows, slots, width = keys_KLPSH.shape
    size = page_size(slots)
    of_row = slots // size
    first_B = (layer * rows + rows_B) * of_row
    flat = (kv_heads, -1, size, width)
    return Pages(
        keys_KLPSH.reshape(flat),
        values_KLPSH.reshape(flat),
        (first_B[:, None] + jnp.arange(of_row)).astype(jnp.int32),
    )


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)
