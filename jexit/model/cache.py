"""The KV cache: keys and values of earlier tokens, for decoding one token per row at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from jexit.axes import Array, CacheKLPSH, Float, Int
from jexit.dist import constrain
from jexit.kernels import decode_attention
from jexit.model.attention import KeysValues
from jexit.model.sharded_attention import cache_heads, decode_over_mesh, over_heads
from jexit.presets import Architecture

SMALLEST_CACHE = 128  # slots: one block of XLA's decode attention
SMALLEST_PROMPT = 16
ROW_MAJOR = Layout((0, 1, 2, 3, 4))


@struct.dataclass
class Cache:
    """The KV cache of P rows with S token slots each, for L layers: two arrays [K, L, P, S, H].

    A row contains one sequence, from slot 0 on. Keys are stored after rotary embedding. K is the
    result of `cache_heads`. The slot axis comes after the head axis, so that attention is a plain
    batched product per head.
    """

    keys_KLPSH: CacheKLPSH
    values_KLPSH: CacheKLPSH

    @property
    def slots(self) -> int:
        return self.keys_KLPSH.shape[3]

    @classmethod
    def empty(cls, arch: Architecture, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        heads = cache_heads(arch.query_heads, arch.kv_heads)
        shape = (heads, arch.layers, rows, slots, arch.head_dim)
        return cls(*(constrain(jnp.zeros(shape, dtype), "K.B..") for _ in range(2)))

    def grown(self, slots: int) -> Cache:
        """Returns the cache enlarged to `slots` token slots per row; new slots contain zeros."""
        room = [(0, 0), (0, 0), (0, 0), (0, slots - self.slots), (0, 0)]
        return jax.tree.map(lambda part: jnp.pad(part, room), self)

    def written(
        self,
        layer: Int[Array, ""],
        rows_B: Int[Array, "B"],
        slot_B: Int[Array, "B"],
        kv: KeysValues,
    ) -> Cache:
        """Returns the cache after writing B new tokens to the layer `layer`.

        `kv` contains the keys and values [B, 1, K, H] of the tokens in this layer. Token b is
        written to row `rows_B[b]`, slot `slot_B[b]`. The rows must be distinct. A token whose slot
        lies outside the cache is dropped.
        """

        def write(part_KLPSH: Array, new_B1KH: Array) -> Array:
            new_KBH = _repeated(jnp.moveaxis(new_B1KH[:, 0], 1, 0), part_KLPSH)
            return over_heads(_write, part_KLPSH, new_KBH, layer, rows_B, slot_B)

        return Cache(write(self.keys_KLPSH, kv.keys), write(self.values_KLPSH, kv.values))

    def with_prompts(self, rows_B: Int[Array, "B"], kv: KeysValues) -> Cache:
        """Returns the cache after writing the keys and values `kv` [L, B, T, K, H] of B prompts.

        Prompt b is written to row `rows_B[b]`, from slot 0 on. A prompt whose row lies outside the
        cache is dropped.
        """

        def write(part_KLPSH: Array, new_LBTKH: Array) -> Array:
            new_KLBTH = _repeated(jnp.moveaxis(new_LBTKH, 3, 0), part_KLPSH)
            slots = part_KLPSH.at[:, :, rows_B, : new_KLBTH.shape[3]]
            return slots.set(new_KLBTH, mode="drop")

        return Cache(write(self.keys_KLPSH, kv.keys), write(self.values_KLPSH, kv.values))

    def with_row(self, row: Int[Array, ""], prompts: Cache, source: Int[Array, ""]) -> Cache:
        """Returns the cache after copying a prompt: all slots of row `source` of `prompts`.

        They become the first slots of row `row`; the later slots of this row do not change.
        """

        def copied(part_KLPSH: Array, prompts_KLQTH: Array) -> Array:
            prompt = jax.lax.dynamic_slice_in_dim(prompts_KLQTH, source, 1, axis=2)
            zero = jnp.zeros((), jnp.int32)
            return jax.lax.dynamic_update_slice(part_KLPSH, prompt, (zero, zero, row, zero, zero))

        return jax.tree.map(copied, self, prompts)

    def attend(
        self,
        layer: Int[Array, ""],
        rows_B: Int[Array, "B"] | None,
        q_BNH: Float[Array, "B N H"],
        length_B: Int[Array, "B"],
    ) -> Float[Array, "B N H"]:
        """Returns softmax(q·k / sqrt(H)) · v for one query per row, in one layer.

        Query b attends to the first `length_B[b]` slots (at least 1) of row `rows_B[b]`. If
        `rows_B` is None, there is one query for each row of the cache, in order.
        """
        cache = self.keys_KLPSH, self.values_KLPSH
        return decode_over_mesh(decode_attention, q_BNH, *cache, layer, rows_B, length_B)


def token_bytes(arch: Architecture, dtype: jnp.dtype) -> int:
    """Returns the bytes per device that the keys and values of one token take in all layers."""
    mesh = jax.sharding.get_abstract_mesh()
    heads = cache_heads(arch.query_heads, arch.kv_heads)
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    here = heads // tensor if heads % tensor == 0 else heads
    return 2 * arch.layers * here * arch.head_dim * jnp.dtype(dtype).itemsize


def _write(part_KLPSH: Array, new_KBH: Array, layer: Array, rows_B: Array, slot_B: Array) -> Array:
    """Returns the keys or values `part_KLPSH` after writing B new tokens, one per row, to a layer.

    Token b goes to row `rows_B[b]`, slot `slot_B[b]`, or nowhere if the slot does not exist. The
    write goes head by head, which follows the memory order of the cache. A single write across
    heads would make TPUs change the layout of the whole cache in each layer.
    """
    heads, layers, rows, slots, width = part_KLPSH.shape
    row_KB = (jnp.arange(heads)[:, None] * layers + layer) * rows + rows_B
    lines = part_KLPSH.reshape(-1, width)
    beyond_KB = lines.shape[0] + jnp.arange(row_KB.size, dtype=jnp.int32).reshape(row_KB.shape)
    exists_B = (slot_B >= 0) & (slot_B < slots)
    line_KB = jnp.where(exists_B, row_KB * slots + slot_B, beyond_KB)
    lines = lines.at[line_KB.reshape(-1)].set(
        new_KBH.reshape(-1, width), mode="drop", unique_indices=True
    )
    # With one row, XLA may choose another order of the axes for a loop that only writes, and would
    # then copy the whole cache in each of its layers.
    return with_layout_constraint(lines.reshape(part_KLPSH.shape), ROW_MAJOR)


def _repeated(new: Array, part_KLPSH: Array) -> Array:
    """Repeats each head of `new` [heads, …] to make K heads, and casts to the cache's dtype.

    The copies of a head are adjacent.
    """
    return jnp.repeat(new, part_KLPSH.shape[0] // new.shape[0], axis=0).astype(part_KLPSH.dtype)


def bucket(size: int, least: int) -> int:
    """Rounds `size` up, so that few distinct sizes occur and few programs need compiling.

    The result is a multiple of `least`, or of p / 4 if that is larger, where p is the largest power
    of two up to `size`. There are thus at most four results between two powers of two.
    """
    quantum = max(least, (1 << size.bit_length()) >> 3)
    return -(-size // quantum) * quantum


def prompt_bucket(length: int) -> int:
    """Returns the padded length of a prompt of `length` tokens: its `bucket`, a multiple of 16."""
    return bucket(length, SMALLEST_PROMPT)


def cache_bucket(used: int, most: int) -> int:
    """Returns the slots per row to allocate if `used` are needed now and `most` at the end.

    The result is a power of two, or `prompt_bucket(most)` if that is smaller, and at least 128.
    Doubling means few compilations, and at most about twice the slots that the longest row needs.
    """
    return max(SMALLEST_CACHE, min(1 << (used - 1).bit_length(), prompt_bucket(most)))
