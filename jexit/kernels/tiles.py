"""Walks over chunks of tokens and tiles of the vocabulary, for the chunked XLA implementations.

Token chunks are strided (chunk i takes tokens i, i + n, i + 2n, …), so that tokens sharded over
devices stay where they are: each chunk holds an equal share of every device's rows. The vocabulary
is cut into equal tiles and one smaller last tile, so that the head is neither padded nor masked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Partial = TypeVar("Partial")

# Sizes in float32 logits, measured on two CPU cores with 1 MiB of L2 each. A tile of statistics is
# read a few times and dropped: it should stay in cache. A tile of a gradient enters a second matrix
# product; with a whole row of the vocabulary in it nothing is computed twice, which is worth more
# than cache as long as the rows are enough to keep the product busy.
STATISTICS_TILE = 1 << 22
STATISTICS_VOCAB = 1024
GRADIENT_TILE = 1 << 23
GRADIENT_MIN_ROWS = 32
HEAD_GRADIENT_MIN_VOCAB = 128


class Chunks(NamedTuple):
    """Size of one tile of logits: tokens × vocabulary."""

    tokens: int
    vocab: int


def statistics_chunks(tokens: int, vocab: int, sets: int) -> Chunks:
    """Tile for statistics alone, with `sets` hidden states a token."""
    chunk_vocab = min(vocab, STATISTICS_VOCAB)
    return Chunks(_clip(STATISTICS_TILE // (sets * chunk_vocab), tokens), chunk_vocab)


def gradient_chunks(tokens: int, vocab: int, sets: int) -> Chunks:
    """Tile for statistics and the gradient to the hidden states: whole rows where they fit."""
    rows = GRADIENT_TILE // vocab
    if rows < min(tokens, GRADIENT_MIN_ROWS):
        return statistics_chunks(tokens, vocab, sets)
    return Chunks(_clip(rows, tokens), vocab)


def head_gradient_chunks(tokens: int, vocab: int) -> Chunks:
    """Tile for the gradient to the head: all tokens at once where they fit.

    Then a tile's part of the head's gradient is complete, and written once.
    """
    chunk_vocab = max(GRADIENT_TILE // max(tokens, 1), HEAD_GRADIENT_MIN_VOCAB)
    chunk_vocab = _clip(chunk_vocab, vocab)
    return Chunks(_clip(GRADIENT_TILE // chunk_vocab, tokens), chunk_vocab)


def override(chunks: Chunks, tokens: int | None, vocab: int | None) -> Chunks:
    """`chunks` with the sizes that a caller has fixed."""
    return Chunks(chunks.tokens if tokens is None else tokens, vocab or chunks.vocab)


def _clip(value: int, most: int) -> int:
    return max(1, min(value, most))


def slice_head(head_VD: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """Rows `start … start + size − 1` of the head."""
    return lax.dynamic_slice_in_dim(head_VD, start, size)


def product(
    left: jax.Array, right: jax.Array, contract: tuple[int, int], dtype: Any = None
) -> jax.Array:
    """Matrix product in float32 accumulation over axis `contract[0]` and `contract[1]`.

    Operands of two types meet in the wider one, or in `dtype`. Float32 operands are multiplied as
    such: accelerators would otherwise round them to bfloat16 or TF32 on the way.
    """
    dtype = dtype or jnp.promote_types(left.dtype, right.dtype)
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def logits(h: jax.Array, head_CD: jax.Array) -> jax.Array:
    """Float32 logits [..., C] of hidden states [..., D]."""
    return product(h, head_CD, (h.ndim - 1, 1))


def first_index_of(max_N1: jax.Array, z_NC: jax.Array, start: jax.Array | int) -> jax.Array:
    """Smallest vocabulary index whose logit equals the row's maximum (vectorises, arg-max not)."""
    index_C = start + jnp.arange(z_NC.shape[-1], dtype=jnp.int32)
    return jnp.where(z_NC == max_N1, index_C, jnp.iinfo(jnp.int32).max).min(-1)


def over_tokens(function: Callable[..., Any], arguments: tuple[Any, ...], chunk: int) -> Any:
    """Applies `function` to chunks of `arguments` (pytrees with the tokens as first axis).

    Returns what it returns, joined again along the first axis.
    """
    tokens = _tokens(arguments)
    if tokens <= chunk:
        return function(*arguments)
    out = lax.map(lambda parts: function(*parts), _split(arguments, tokens, chunk))
    return _join(out, tokens)


def over_tokens_summing(
    function: Callable[..., tuple[Any, jax.Array]], arguments: tuple[Any, ...], chunk: int
) -> tuple[Any, jax.Array]:
    """As `over_tokens`, for a function that also returns an array to add up over chunks."""
    tokens = _tokens(arguments)
    if tokens <= chunk:
        return function(*arguments)

    def step(total: jax.Array, parts: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        out, part = function(*parts)
        return total + part, out

    chunks = _split(arguments, tokens, chunk)
    shape = jax.eval_shape(function, *jax.tree.map(lambda part: part[0], chunks))[1]
    total, out = lax.scan(step, jnp.zeros(shape.shape, shape.dtype), chunks)
    return _join(out, tokens), total


def _tokens(arguments: tuple[Any, ...]) -> int:
    return jax.tree.leaves(arguments)[0].shape[0]


def _split(tree: Any, tokens: int, chunk: int) -> Any:
    """Arrays [N, …] as [steps, rows, …]: as few padded rows as that number of steps allows."""
    steps = -(-tokens // chunk)
    rows = -(-tokens // steps)

    def split(array: jax.Array) -> jax.Array:
        missing = steps * rows - tokens
        array = jnp.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1))
        return array.reshape(rows, steps, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _join(tree: Any, tokens: int) -> Any:
    def join(parts: jax.Array) -> jax.Array:
        return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])[:tokens]

    return jax.tree.map(join, tree)


def over_vocab(
    tile: Callable[[jax.Array | int, int], Partial],
    merge: Callable[[Partial, Partial], Partial],
    vocab: int,
    chunk: int,
) -> Partial:
    """Merges `tile(start, size)` over the vocabulary, in order."""
    chunk = min(chunk, vocab)
    full, rest = divmod(vocab, chunk)
    total = tile(0, chunk)
    if full > 1:
        total = lax.fori_loop(
            1, full, lambda i, partial: merge(partial, tile(i * chunk, chunk)), total
        )
    if rest:
        total = merge(total, tile(full * chunk, rest))
    return total


def add(left: Partial, right: Partial) -> Partial:
    """Sum of two pytrees, for `over_vocab`."""
    return jax.tree.map(jnp.add, left, right)


def head_gradient(
    tile: Callable[[jax.Array | int, int], tuple[jax.Array, jax.Array]],
    head_VD: jax.Array,
    chunk: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Gradient to hidden states and head from `tile(start, size)` → (dh_ND, dhead_CD).

    Returns `dh_ND` in float32, summed over tiles, and `dhead_VD` in `dtype`, put together of them.
    """
    vocab = head_VD.shape[0]
    chunk = min(chunk, vocab)
    full, rest = divmod(vocab, chunk)

    def put(dhead_VD: jax.Array, dhead_CD: jax.Array, start: jax.Array | int) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(dhead_VD, dhead_CD.astype(dtype), start, 0)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dh_ND, dhead_CD = tile(i * chunk, chunk)
        return carry[0] + dh_ND, put(carry[1], dhead_CD, i * chunk)

    dh_ND, dhead_CD = tile(0, chunk)
    if chunk == vocab:
        return dh_ND, dhead_CD.astype(dtype)
    carry = (dh_ND, put(jnp.zeros(head_VD.shape, dtype), dhead_CD, 0))
    if full > 1:
        carry = lax.fori_loop(1, full, step, carry)
    if rest:
        dh_ND, dhead_CD = tile(full * chunk, rest)
        carry = (carry[0] + dh_ND, put(carry[1], dhead_CD, full * chunk))
    return carry
