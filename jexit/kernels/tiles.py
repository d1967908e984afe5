"""Loops over chunks of tokens and tiles of the vocabulary, in plain XLA.

The vocabulary is cut into equal tiles and, if there is a remainder, one smaller last tile, so that
the head needs neither padding nor a mask.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jexit.kernels import dispatch

Partial = TypeVar("Partial")


class Chunks(NamedTuple):
    """The size of one tile of logits: tokens × vocabulary."""

    tokens: int
    vocab: int


class Requested(NamedTuple):
    """The sizes of a tile that a caller requests; None means the platform's size."""

    tokens: int | None
    vocab: int | None

    def override(self, chunks: Chunks) -> Chunks:
        """Returns `chunks` with the requested sizes."""
        tokens = chunks.tokens if self.tokens is None else self.tokens
        return Chunks(tokens, self.vocab or chunks.vocab)


class TileLimits(NamedTuple):
    """A platform's limits for a tile: the number of float32 logits, and of vocabulary entries."""

    size: int
    vocab: int


# A tile is read a few times and dropped: it should stay in cache, and its few copies should stay
# far below all logits. Measured on two CPU cores with 1 MiB of L2 each, where sizes from 2¹⁸ to 2²⁰
# are equally fast; an accelerator needs larger matrix products to fill it.
CPU_LIMITS = TileLimits(1 << 19, 512)
ACCELERATOR_LIMITS = TileLimits(1 << 22, 4096)


def _limits() -> TileLimits:
    return CPU_LIMITS if dispatch.target().platform == "cpu" else ACCELERATOR_LIMITS


def choose_chunks(tokens: int, vocab: int, sets: int) -> Chunks:
    """Returns the tile size for an op that computes `sets` logits per token and vocabulary entry.

    Every chunk of tokens reads the whole head, so a chunk contains as many tokens as fit the
    platform's limit, at least one.
    """
    chunk_vocab = min(vocab, _limits().vocab)
    return _with_tokens(chunk_vocab, tokens, sets)


def _with_tokens(chunk_vocab: int, tokens: int, sets: int) -> Chunks:
    fitting = _limits().size // (sets * chunk_vocab)
    return Chunks(max(1, min(fitting, tokens)), chunk_vocab)


def slice_head(head_VD: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """Returns the rows `start … start + size − 1` of the head.

    XLA:CPU converts bfloat16 to float32 before it slices. The optimisation barrier makes the head
    depend on `start`; otherwise XLA would convert the whole head before the loop and keep the
    result in memory.
    """
    head_VD, start = lax.optimization_barrier((head_VD, jnp.asarray(start)))
    return lax.dynamic_slice_in_dim(head_VD, start, size)


def take_rows(head_VD: jax.Array, rows_N: jax.Array) -> jax.Array:
    """Returns the rows `rows_N` of the head, with indices clipped to valid ones.

    See `slice_head` for the reason for the optimisation barrier.
    """
    head_VD, rows_N = lax.optimization_barrier((head_VD, rows_N))
    return jnp.take(head_VD, rows_N, axis=0, mode="clip")


def product(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Multiplies matrices, contracting axis `contract[0]` of `left` with `contract[1]` of `right`.

    Operands of two dtypes are converted to the wider one. The sums are float32. Float32 operands
    are multiplied in full precision; by default accelerators round them to bfloat16 or TF32.
    """
    dtype = jnp.promote_types(left.dtype, right.dtype)
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def logits(h: jax.Array, head_CD: jax.Array) -> jax.Array:
    """Returns the float32 logits [..., C] of hidden states [..., D] for C rows of the head."""
    return product(h, head_CD, (h.ndim - 1, 1))


def tempered(array: jax.Array, temperature: float) -> jax.Array:
    """Divides logits, or the gradient with respect to the quotient, by the sampling temperature."""
    return array if temperature == 1.0 else array * (1.0 / temperature)


def sums_gradient_online(h_ND: jax.Array, head_VD: jax.Array, *, head_trains: bool) -> bool:
    """Returns whether an op's forward pass sums the gradient of the hidden states itself.

    It weights the rows of the head by float32 numbers, as rounding would spoil differences of large
    sums. With a bfloat16 head these products would not run at the speed of bfloat16, so the
    backward pass recomputes the logits instead, as it does if the head's gradient is needed.
    """
    return not head_trains and jnp.promote_types(h_ND.dtype, head_VD.dtype) == jnp.float32


def over_tokens(function: Callable[..., Any], arguments: tuple[Any, ...], chunk: int) -> Any:
    """Applies `function` to chunks of at most `chunk` tokens, and concatenates the results.

    `arguments` and the results are pytrees of arrays whose first axis is the tokens.
    """
    tokens = _tokens(arguments)
    if tokens <= chunk:
        return function(*arguments)
    parts = _split(arguments, tokens, chunk)
    steps = jax.tree.leaves(parts)[0].shape[0]
    out = lax.map(lambda step: function(*_pick(parts, step)), jnp.arange(steps))
    return _join(out, tokens)


def _tokens(arguments: tuple[Any, ...]) -> int:
    return jax.tree.leaves(arguments)[0].shape[0]


def _split(tree: Any, tokens: int, chunk: int) -> Any:
    """Pads arrays [N, …] with zeros to [steps · rows, …]; reshapes them to [steps, rows, …].

    N is the number of `tokens`, and rows is at most `chunk`. The number of steps is the least
    possible, and the padding the least for this number of steps.
    """
    steps = -(-tokens // chunk)
    rows = -(-tokens // steps)

    def split(array: jax.Array) -> jax.Array:
        missing = steps * rows - tokens
        array = jnp.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1))
        return array.reshape(steps, rows, *array.shape[1:])

    return jax.tree.map(split, tree)


def _pick(tree: Any, step: jax.Array) -> Any:
    """Returns chunk number `step` of the arrays that `_split` returned.

    See `slice_head` for the reason for the optimisation barrier.
    """
    tree, step = lax.optimization_barrier((tree, step))
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, step, keepdims=False), tree)


def _join(tree: Any, tokens: int) -> Any:
    return jax.tree.map(lambda parts: parts.reshape(-1, *parts.shape[2:])[:tokens], tree)


def over_vocab(
    tile: Callable[[jax.Array | int, int], Partial],
    merge: Callable[[Partial, Partial], Partial],
    vocab: int,
    chunk: int,
) -> Partial:
    """Computes `tile(start, size)` for every vocabulary tile and merges the results in order.

    `vocab` is the size of the vocabulary; `chunk` is the size of every tile but the last.
    """
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
    """Adds two pytrees of the same structure, leaf by leaf."""
    return jax.tree.map(jnp.add, left, right)


def gradients(
    dlogits: Callable[..., tuple[jax.Array, jax.Array]],
    arguments: tuple[Any, ...],
    head_VD: jax.Array,
    chunks: Chunks,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the gradients of the loss with respect to the hidden states and the head.

    Args:
      dlogits: takes `(start, size, *arguments of a chunk of tokens)` and returns two arrays: the
        gradient of the loss with respect to a tile's logits, dz_NC, and the tile's rows of the
        head. The tile has the vocabulary entries `start` … `start + size − 1`. As in the kernels,
        dz_NC is rounded to the dtype in which the logits are multiplied.
      arguments: pytrees with tokens as the first axis; the first pytree is the hidden states.
      head_VD: the output head.
      chunks: the numbers of tokens and vocabulary entries in a tile.
      head_dtype: the dtype of the head's gradient, or None to omit this gradient. Each tile of
        the head's gradient is summed over all tokens in float32 before it is written.

    Returns:
      dh_ND in float32, and dhead_VD in `head_dtype` or None.
    """
    tokens, vocab = _tokens(arguments), head_VD.shape[0]
    parts = _split(arguments, tokens, chunks.tokens)
    steps, rows = jax.tree.leaves(parts)[0].shape[:2]
    Carry = tuple[jax.Array, jax.Array | None]

    def of_tile(start: jax.Array | int, size: int, carry: Carry) -> Carry:
        def of_part(step: jax.Array, carry: Carry) -> Carry:
            dh_SND, dhead_CD = carry
            part = _pick(parts, step)
            dz_NC, head_CD = dlogits(start, size, *part)
            dz_NC = dz_NC.astype(jnp.promote_types(part[0].dtype, head_CD.dtype))
            dh_SND = dh_SND.at[step].add(product(dz_NC, head_CD, (1, 0)))
            if dhead_CD is not None:
                dhead_CD += product(dz_NC, part[0], (0, 0))
            return dh_SND, dhead_CD

        dh_SND, dhead_VD = carry
        dhead_CD = None
        if dhead_VD is not None:
            dhead_CD = jnp.zeros((size, head_VD.shape[1]), jnp.float32)
        dh_SND, dhead_CD = lax.fori_loop(0, steps, of_part, (dh_SND, dhead_CD))
        if dhead_VD is not None:
            dhead_VD = lax.dynamic_update_slice_in_dim(
                dhead_VD, dhead_CD.astype(head_dtype), start, 0
            )
        return dh_SND, dhead_VD

    chunk = min(chunks.vocab, vocab)
    full, rest = divmod(vocab, chunk)
    dh_SND = jnp.zeros((steps, rows, arguments[0].shape[1]), jnp.float32)
    carry = (dh_SND, None if head_dtype is None else jnp.zeros(head_VD.shape, head_dtype))
    carry = lax.fori_loop(0, full, lambda i, carry: of_tile(i * chunk, chunk, carry), carry)
    if rest:
        carry = of_tile(full * chunk, rest, carry)
    return _join(carry[0], tokens), carry[1]
