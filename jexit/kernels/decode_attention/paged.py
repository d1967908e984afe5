"""The KV cache viewed as pages, the format that JAX's paged attention kernels read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PAGE = 128  # slots of the largest page
LEAST_PAGE = 16  # slots of the smallest page


class Pages(NamedTuple):
    """The cache as pages of consecutive slots, and a table of the pages that each query reads.

    The page axis contains the pages of all layers and rows, one after another.
    """

    keys: jax.Array  # [K, pages, slots of a page, H]
    values: jax.Array
    table: jax.Array  # int32 [B, pages of a row]


def page_size(slots: int) -> int:
    """Returns the slots per page: the largest power of two up to `PAGE` that divides `slots`.

    `slots` is the number of slots per cache row. Raises NotImplementedError if pages would have
    fewer slots than `LEAST_PAGE`, the smallest size of the kernels' matrix products.
    """
    size = min(PAGE, slots & -slots)
    if size < LEAST_PAGE:
        raise NotImplementedError(
            f"the cache's {slots} slots do not divide into pages of {LEAST_PAGE}"
        )
    return size


def pages_of(
    keys_KLPSH: jax.Array, values_KLPSH: jax.Array, layer: jax.Array, rows_B: jax.Array
) -> Pages:
    """Returns the cache as pages, with a page table for one layer and the rows `rows_B`.

    The pages are a view of the cache's memory, so nothing is copied.
    """
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
    """Returns the largest divisor of `number` that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)
