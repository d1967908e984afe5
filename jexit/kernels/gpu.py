"""Code shared by the GPU kernels: the loop over tiles, tile sizes for Hopper, and masked access.

The kernels are written in Triton. A tile of logits has the shape [tokens, vocabulary], so that
reductions over the vocabulary stay within a few threads. Each piece of the output head is read once
and multiplied by all sets of hidden states, such as student and teacher, of a tile of tokens.

To compute statistics, each program loops over the vocabulary. If there are too few tokens to fill
the chip, several programs share the vocabulary, and their results are merged afterwards. To compute
gradients, the vocabulary is cut into chunks. A kernel recomputes a chunk's logits and writes the
gradient with respect to them, which XLA multiplies by the head and the hidden states. No sum is
atomic, so repeated runs give identical results.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jexit.kernels import dispatch, tiles

# The value of logits beyond the vocabulary: finite, so that 0 · (difference of two) is 0.
MASKED = -1e30
SMALLEST = 16  # size of an axis of a matrix product on tensor cores
MULTIPROCESSORS = 132  # of an H100 or H200
VOCAB_CHUNK = 2048  # columns of logits whose gradient is held at a time


class GpuTile(NamedTuple):
    """The sizes of a tile of logits, all powers of two; None means a size chosen for the chip."""

    tokens: int | None = None
    vocab: int | None = None
    width: int | None = None  # per step of the matrix product
    warps: int | None = None
    stages: int | None = None  # of the pipeline of loads


BY_CHIP = GpuTile()

# For each size of a number in bytes: the largest number of sets, and the tile for it. The sums of
# all sets, the statistics and one set's temporaries share a multiprocessor's 65,536 registers. With
# these tiles the compiler spills nothing, or few bytes outside of the innermost loop (for 8 sets or
# ragged widths). Bfloat16 keeps 64 tokens, the fewest for Hopper's matrix product. Float32 products
# do not use tensor cores, which would round their operands.
TILES = {
    2: (
        (2, GpuTile(128, 128, 64, 8, 3)),
        (4, GpuTile(64, 128, 64, 8, 2)),
        (8, GpuTile(64, 64, 64, 8, 2)),
    ),
    4: (
        (1, GpuTile(128, 128, 32, 8, 2)),
        (2, GpuTile(64, 64, 32, 8, 2)),
        (8, GpuTile(32, 64, 32, 8, 2)),
    ),
}
MAX_SETS = 8


class Set(NamedTuple):
    """One set of logits in a tile: the product of one array of hidden states and one output head.

    `hidden` and `head` are positions in `GpuOperands.hidden` and `GpuOperands.heads`.
    """

    hidden: int
    head: int = 0
    at: tuple[int, ...] = ()  # index into the leading axes of the hidden states


class GpuOperands(NamedTuple):
    """The arrays that an op reads, and the sets of logits that it computes from them.

    Attributes:
      hidden: arrays of hidden states, each [N, D] or [E, N, D].
      heads: output heads, each [V, D], with the same vocabulary.
      sets: the sets of logits that are computed for every tile of tokens and vocabulary.
      rows: a pytree of arrays [N] with one number per token, such as targets.
    """

    hidden: tuple[jax.Array, ...]
    heads: tuple[jax.Array, ...]
    sets: tuple[Set, ...]
    rows: Any = ()


class Blocks(NamedTuple):
    """The data of one tile of T tokens × C vocabulary entries, as loaded by a kernel.

    Attributes:
      logits: one float32 array [T, C] for each set of logits; columns beyond the vocabulary are
        −1e30.
      rows: the pytree `GpuOperands.rows`, with the tile's part of each array as [T, 1].
      index: the vocabulary index of each entry, int32 [T, C].
    """

    logits: tuple[jax.Array, ...]
    rows: Any
    index: jax.Array


def statistics(
    of_tile: Callable[[Blocks], Any],
    merge: Callable[[Any, Any], Any],
    neutral: Any,
    operands: GpuOperands,
    tile: GpuTile,
) -> Any:
    """Computes `of_tile` on every tile of logits and merges the results over the vocabulary.

    `of_tile` returns a pytree of arrays [T, 1] for the T tokens of a tile; the arrays in the result
    are [N]. `merge` combines two such pytrees; the left one comes first in the vocabulary.
    `neutral` is a pytree of numbers that change nothing when merged with other statistics.
    """
    layout = _GpuLayout.of(operands, tile)
    tokens, vocab_tiles = layout.tile.tokens, layout.grid[1]
    share = pl.cdiv(vocab_tiles, _splits(*layout.grid))
    splits = pl.cdiv(vocab_tiles, share)
    numbers, treedef = jax.tree.flatten(neutral)

    def statistics_kernel(*refs: Any) -> None:
        token_tile, split = pl.program_id(0), pl.program_id(1)
        start = token_tile * tokens

        def step(vocab_tile: jax.Array, total: Any) -> Any:
            return merge(total, of_tile(layout.blocks(refs, start, vocab_tile)))

        first = split * share
        total = lax.fori_loop(
            first,
            jnp.minimum(first + share, vocab_tiles),
            step,
            jax.tree.map(lambda number: jnp.full((tokens, 1), number, _dtype(number)), neutral),
        )
        outs = refs[layout.inputs :]
        for out, array in zip(outs, jax.tree.leaves(total), strict=True):
            _store(out, lax.squeeze(array, (1,)), (start,), at=(split,))

    shapes = [jax.ShapeDtypeStruct((splits, layout.tokens), _dtype(n)) for n in numbers]
    parts = layout.call(statistics_kernel, operands, (layout.grid[0], splits), shapes)
    return _merge_all(jax.tree.unflatten(treedef, parts), merge, splits)


def gradients(
    dlogits: Callable[[Blocks], jax.Array],
    operands: GpuOperands,
    tile: GpuTile,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the gradients with respect to the first hidden states and the first output head.

    `dlogits` returns the gradient with respect to a tile's logits [T, C], with zeros for tokens
    that the loss masks out. The gradient of the hidden states is float32 [N, D]. The gradient of
    the head has the dtype `head_dtype` and is None if `head_dtype` is None.
    """
    tokens, vocab = operands.hidden[0].shape[0], operands.heads[0].shape[0]

    def of_chunk(start: jax.Array | int, size: int, *arguments: Any) -> tuple[jax.Array, jax.Array]:
        *hidden, rows = arguments
        heads = tuple(tiles.slice_head(head_VD, start, size) for head_VD in operands.heads)
        chunk = GpuOperands(tuple(hidden), heads, operands.sets, rows)
        return _dlogits(dlogits, chunk, start, tile), heads[0]

    arguments = (*operands.hidden, operands.rows)
    chunks = tiles.Chunks(tokens, min(VOCAB_CHUNK, vocab))
    return tiles.gradients(of_chunk, arguments, operands.heads[0], chunks, head_dtype)


def _dlogits(
    dlogits: Callable[[Blocks], jax.Array],
    operands: GpuOperands,
    start: jax.Array | int,
    tile: GpuTile,
) -> jax.Array:
    """Returns the gradient [N, chunk] with respect to the logits of one chunk of the vocabulary.

    `start` is the first vocabulary index of the chunk. XLA then multiplies the result by the hidden
    states and by the head, so the result has the wider of the two dtypes.
    """
    layout = _GpuLayout.of(operands, tile)

    def gradient_kernel(*refs: Any) -> None:
        *refs, start_1, dz_NC = refs
        token_tile, vocab_tile = pl.program_id(0), pl.program_id(1)
        at = token_tile * layout.tile.tokens, vocab_tile * layout.tile.vocab
        blocks = layout.blocks(refs, at[0], vocab_tile, start_1[0])
        _store(dz_NC, dlogits(blocks).astype(dz_NC.dtype), at)

    dtype = jnp.promote_types(operands.hidden[0].dtype, operands.heads[0].dtype)
    shape = jax.ShapeDtypeStruct((layout.tokens, layout.vocab), dtype)
    start_1 = jnp.asarray(start, jnp.int32)[None]
    return layout.call(gradient_kernel, operands, layout.grid, shape, start_1)


class _GpuLayout(NamedTuple):
    """The division of an op's operands into tiles, and their order in a kernel call."""

    tile: GpuTile
    tokens: int
    vocab: int
    sets: tuple[Set, ...]
    heads: int
    rows: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, operands: GpuOperands, tile: GpuTile) -> "_GpuLayout":
        tokens, vocab = operands.hidden[0].shape[-2], operands.heads[0].shape[0]
        pairs = zip(tile, choose_tile(operands), strict=True)
        tile = GpuTile(*(chosen if fixed is None else fixed for fixed, chosen in pairs))
        rows = jax.tree.structure(operands.rows)
        return cls(tile, tokens, vocab, operands.sets, len(operands.heads), rows)

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of tiles along the tokens and along the vocabulary."""
        return pl.cdiv(self.tokens, self.tile.tokens), pl.cdiv(self.vocab, self.tile.vocab)

    @property
    def inputs(self) -> int:
        return len(self.sets) + self.heads + self.rows.num_leaves

    def blocks(
        self,
        refs: tuple[Any, ...],
        token: jax.Array,
        vocab_tile: jax.Array,
        start: jax.Array | int = 0,
    ) -> Blocks:
        """Loads, inside a kernel, the part of the operands that belongs to one tile.

        `token` is the first token of the tile, `vocab_tile` the position of the tile along the
        vocabulary, and `start` the vocabulary index of the first row of the heads.
        """
        rows = [
            _load(ref, (token,), (self.tile.tokens,))[:, None]
            for ref in refs[len(self.sets) + self.heads : self.inputs]
        ]
        column = vocab_tile * self.tile.vocab
        shape = (self.tile.tokens, self.tile.vocab)
        index_TC = column + lax.broadcasted_iota(jnp.int32, shape, 1)
        logits = self._logits(refs, token, column)
        if self.vocab % self.tile.vocab:
            logits = tuple(jnp.where(index_TC < self.vocab, z_TC, MASKED) for z_TC in logits)
        return Blocks(logits, jax.tree.unflatten(self.rows, rows), start + index_TC)

    def _logits(
        self, refs: tuple[Any, ...], token: jax.Array, column: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Returns the float32 logits [T, C] of every set, in the order of `sets`, for one tile.

        The tile begins at the token `token` and at row `column` of the heads.
        """
        tokens, vocab, width = self.tile[:3]
        logits: dict[int, jax.Array] = {}
        for head, head_ref in enumerate(refs[len(self.sets) :][: self.heads]):
            own = [i for i, set_ in enumerate(self.sets) if set_.head == head]

            def step(k: jax.Array, sums: Any, head_ref: Any = head_ref, own: Any = own) -> Any:
                head_CK = _load(head_ref, (column, k * width), (vocab, width))
                out = []
                for i, sum_TC in zip(own, sums, strict=True):
                    h_TK = _load(refs[i], (token, k * width), (tokens, width))
                    out.append(sum_TC + tiles.product(h_TK, head_CK, (1, 1)))
                return tuple(out)

            zeros = tuple(jnp.zeros((tokens, vocab), jnp.float32) for _ in own)
            sums = lax.fori_loop(0, pl.cdiv(head_ref.shape[1], width), step, zeros)
            logits |= zip(own, sums, strict=True)
        return tuple(logits[i] for i in range(len(self.sets)))

    def call(
        self,
        kernel: Callable[..., None],
        operands: GpuOperands,
        grid: tuple[int, int],
        out_shape: Any,
        *more: jax.Array,
    ) -> Any:
        """Runs the kernel over a grid of programs, each of which can read every array in full.

        `more` are arrays that the kernel gets after the operands. On a CPU the kernel is
        interpreted, for tests. Raises NotImplementedError on platforms other than CPUs and Hopper
        GPUs.
        """
        hidden = [operands.hidden[set_.hidden] for set_ in self.sets]
        arrays = (*operands.heads, *jax.tree.leaves(operands.rows), *more)

        def hidden_spec(h: jax.Array, at: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((*[None] * len(at), *h.shape[-2:]), lambda *_: (*at, 0, 0))

        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[
                *(hidden_spec(h, set_.at) for h, set_ in zip(hidden, self.sets, strict=True)),
                *[pl.BlockSpec()] * len(arrays),
            ],
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tile.warps, num_stages=self.tile.stages
            ),
            interpret=_interpreted(),
        )(*hidden, *arrays)


def _interpreted() -> bool:
    platform, kind = dispatch.target()
    if platform == "cpu":
        return True
    if platform not in ("gpu", "cuda"):
        raise NotImplementedError(dispatch.WRONG_PLATFORM.format("Hopper GPUs", platform.upper()))
    if not any(name in kind for name in ("H100", "H200", "H800", "H20")):
        raise NotImplementedError(dispatch.WRONG_PLATFORM.format("Hopper GPUs", kind))
    return False


def choose_tile(operands: GpuOperands) -> GpuTile:
    """Returns the tile from `TILES` for these operands, reduced in size for smaller arrays.

    Raises NotImplementedError if there are more sets of logits than the registers can hold.
    """
    sets = len(operands.sets)
    if sets > MAX_SETS:
        raise NotImplementedError(
            f"{sets} sets of hidden states do not fit the registers, which hold {MAX_SETS}"
        )
    table = TILES[4 if jnp.result_type(*operands.hidden, *operands.heads).itemsize == 4 else 2]
    tile = next(tile for most, tile in table if sets <= most)
    width = max(h.shape[-1] for h in operands.hidden)
    tokens, vocab = operands.hidden[0].shape[-2], operands.heads[0].shape[0]
    return tile._replace(
        tokens=min(tile.tokens, _power(tokens)),
        vocab=min(tile.vocab, _power(vocab)),
        width=min(tile.width, _power(width)),
    )


def _load(ref: Any, starts: tuple[jax.Array, ...], sizes: tuple[int, ...]) -> jax.Array:
    """Loads the tile of shape `sizes` at `starts`, with zeros beyond the end of the array.

    `starts` must be multiples of `sizes`.
    """
    mask = _mask(ref.shape, starts, sizes)
    index = (*map(pl.ds, starts, sizes),)
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0)


def _store(
    ref: Any, array: jax.Array, starts: tuple[jax.Array, ...], at: tuple[jax.Array, ...] = ()
) -> None:
    """Stores `array` at `starts`, without the entries that lie beyond the end of `ref`.

    `at` indexes the leading axes of `ref` that `array` lacks.
    """
    index = (*at, *map(pl.ds, starts, array.shape))
    plgpu.store(ref.at[index], array, mask=_mask(ref.shape[len(at) :], starts, array.shape))


def _mask(
    shape: tuple[int, ...], starts: tuple[jax.Array, ...], sizes: tuple[int, ...]
) -> jax.Array | None:
    """Returns a mask of the tile's entries inside an array; None if whole tiles fill the array.

    The array has the shape `shape`; the tile, and so the mask, has the shape `sizes`.
    """
    mask = None
    for axis, (end, start, size) in enumerate(zip(shape, starts, sizes, strict=True)):
        if end % size:
            inside = start + lax.broadcasted_iota(jnp.int32, sizes, axis) < end
            mask = inside if mask is None else mask & inside
    return mask


def _splits(token_tiles: int, vocab_tiles: int) -> int:
    """Returns the number of parts to split the vocabulary into for the least estimated time.

    The estimate is the number of waves, in which every multiprocessor runs one program, times the
    number of vocabulary tiles per program.
    """

    def time(splits: int) -> int:
        waves = pl.cdiv(token_tiles * splits, MULTIPROCESSORS)
        return waves * pl.cdiv(vocab_tiles, splits)

    return min(range(1, min(vocab_tiles, MULTIPROCESSORS) + 1), key=time)


def _merge_all(parts: Any, merge: Callable[[Any, Any], Any], count: int) -> Any:
    """Merges the `count` parts along the first axis, in order, by a tree of pairwise merges.

    The number of steps therefore grows with the logarithm of `count`.
    """
    while count > 1:
        left, right, rest = (
            jax.tree.map(lambda array, part=part: array[part], parts)
            for part in (slice(0, count - 1, 2), slice(1, None, 2), slice(count - count % 2, None))
        )
        pairs = merge(left, right)
        parts = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), pairs, rest)
        count = -(-count // 2)
    return jax.tree.map(lambda array: array[0], parts)


def _dtype(number: float) -> jnp.dtype:
    return jnp.dtype(jnp.int32 if isinstance(number, int) else jnp.float32)


def _power(size: int) -> int:
    """Returns the least power of two that is at least `size` and at least `SMALLEST` (16)."""
    return max(SMALLEST, 1 << (size - 1).bit_length())
