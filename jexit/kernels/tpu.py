"""Code shared by the TPU kernels: the loop over tiles, tile sizes by chip, and masked products.

A tile of logits has the shape [vocabulary, tokens]. The vocabulary lies along the sublanes, so that
reductions over it are plain vector operations, and a statistic with one number per token is a row
of lanes.

The kernels for the statistics and for the gradient of the hidden states loop over the vocabulary
inside each tile of tokens, so that the head is read once per tile of tokens. The kernel for the
gradient of the head loops over the tokens inside each tile of the vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jexit.kernels import dispatch
from jexit.kernels.chips import chip
from jexit.kernels.tiles import product

LANES = 128
# Logits of rows beyond the vocabulary: finite, so that 0 · (difference of two) is 0.
MASKED = -1e30


VMEM_SHARE = 0.75  # of a core's VMEM, for blocks and temporaries; the compiler uses the rest
VOCAB_TILES = (512, 256, 128)
TOKEN_TILES = (1024, 512, 256, 128)


class TpuTile(NamedTuple):
    """The sizes of a tile of logits in tokens and vocabulary entries; None: chosen for the chip."""

    tokens: int | None = None  # a multiple of 128
    vocab: int | None = None  # a multiple of 16, or the whole vocabulary


BY_CHIP = TpuTile()


class TpuOperands(NamedTuple):
    """The arrays that an op reads; inside a kernel, the blocks of these arrays for one tile.

    Attributes:
      hidden: arrays of hidden states, each [N, D] or [E, N, D]; inside a kernel, references.
      heads: output heads, each [V, D], with the same vocabulary; inside a kernel, references.
      rows: a pytree of arrays [N] with one number per token; inside a kernel, rows of lanes [1, T].
      start: the index of the first vocabulary entry of the block.
      vocab: the size of the whole vocabulary.
    """

    hidden: tuple[Any, ...]
    heads: tuple[Any, ...]
    rows: Any = ()
    start: jax.Array | int = 0
    vocab: int = 0

    def logits(self, h_TD: jax.Array, head: int = 0) -> jax.Array:
        """Returns the logits [C, T] of a tile: head number `head` times the hidden states `h_TD`.

        Logits beyond the vocabulary are −1e30, whatever the head's block contains there.
        """
        z_CT = product(self.heads[head][...], h_TD, (1, 1))
        return jnp.where(self.index(z_CT.shape) < self.vocab, z_CT, MASKED)

    def index(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns the int32 vocabulary index of each entry of a tile with the shape [C, …]."""
        return self.start + lax.broadcasted_iota(jnp.int32, shape, 0)


def statistics(
    of_tile: Callable[[TpuOperands], Any],
    merge: Callable[[Any, Any], Any],
    operands: TpuOperands,
    tile: TpuTile,
) -> Any:
    """Computes `of_tile` on every tile of logits and merges the results over the vocabulary.

    `of_tile` returns a pytree of arrays [k, T] for the T tokens of a tile; the arrays in the result
    are [k, N]. `merge` combines two such pytrees; the left one comes first in the vocabulary.
    """
    layout = _TpuLayout.of(operands, tile)
    shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda: of_tile(layout.example(operands))))

    def kernel(*refs: Any) -> None:
        blocks, outs = layout.blocks(refs, pl.program_id(1))
        part = of_tile(blocks)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            for out, array in zip(outs, jax.tree.leaves(part), strict=True):
                out[...] = array

        @pl.when(pl.program_id(1) > 0)
        def _() -> None:
            total = merge(jax.tree.unflatten(treedef, [out[...] for out in outs]), part)
            for out, array in zip(outs, jax.tree.leaves(total), strict=True):
                out[...] = array

    def spec(leaf: jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((leaf.shape[0], layout.tile.tokens), lambda t, v: (0, t))

    def out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((leaf.shape[0], layout.padded), leaf.dtype)

    total = layout.call(
        kernel,
        operands,
        vocab_first=False,
        products=0,
        out_specs=[*map(spec, shapes)],
        out_shape=[*map(out, shapes)],
    )
    return jax.tree.unflatten(treedef, [array[:, : layout.tokens] for array in total])


def gradients(
    dlogits: Callable[[TpuOperands], jax.Array],
    operands: TpuOperands,
    tile: TpuTile,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the gradients with respect to the first hidden states and the first output head.

    `dlogits` returns the gradient with respect to a tile's logits [C, T], with zeros for tokens
    that the loss masks out; entries beyond the vocabulary are set to zero here. The gradient of the
    hidden states is float32 [N, D]. The gradient of the head has the dtype `head_dtype` and is None
    if `head_dtype` is None.
    """
    dh_ND = _to_hidden(dlogits, operands, tile)
    return dh_ND, None if head_dtype is None else _to_head(dlogits, operands, tile, head_dtype)


def check_covers(operands: TpuOperands) -> None:
    """Raises NotImplementedError if a kernel or its gradient kernels do not support the operands.

    On a TPU, widths must be multiples of 128. Everywhere, the smallest tiles must fit in VMEM.
    """
    for array in (*operands.hidden, *operands.heads):
        if dispatch.target().platform == "tpu" and array.shape[-1] % LANES:
            width = array.shape[-1]
            raise NotImplementedError(
                f"the width is {width}, but it must be a multiple of {LANES}, or XLA copies the "
                "head"
            )
    choose_tile(operands, token_sums=1)
    choose_tile(operands, vocab_sums=1)


def _product_dtype(operands: TpuOperands) -> jnp.dtype:
    return jnp.promote_types(operands.hidden[0].dtype, operands.heads[0].dtype)


def _masked(dlogits: Callable[[TpuOperands], jax.Array], blocks: TpuOperands) -> jax.Array:
    dz_CT = dlogits(blocks)
    return jnp.where(blocks.index(dz_CT.shape) < blocks.vocab, dz_CT, 0)


def _to_hidden(
    dlogits: Callable[[TpuOperands], jax.Array], operands: TpuOperands, tile: TpuTile
) -> jax.Array:
    width, dtype = operands.hidden[0].shape[-1], _product_dtype(operands)
    layout = _TpuLayout.of(operands, tile, token_sums=1)

    def kernel(*refs: Any) -> None:
        blocks, (dh_TD,) = layout.blocks(refs, pl.program_id(1))
        head_CD = blocks.heads[0][...]
        # The head's block reaches beyond the vocabulary, where memory holds anything, NaN too.
        head_CD = jnp.where(blocks.index(head_CD.shape) < blocks.vocab, head_CD, 0)
        part_TD = product(_masked(dlogits, blocks).astype(dtype), head_CD, (0, 0))

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            dh_TD[...] = part_TD

        @pl.when(pl.program_id(1) > 0)
        def _() -> None:
            dh_TD[...] += part_TD

    dh_ND = layout.call(
        kernel,
        operands,
        vocab_first=False,
        products=1,
        out_specs=pl.BlockSpec((layout.tile.tokens, width), lambda t, v: (t, 0)),
        out_shape=jax.ShapeDtypeStruct((layout.padded, width), jnp.float32),
    )
    return dh_ND[: layout.tokens]


def _to_head(
    dlogits: Callable[[TpuOperands], jax.Array],
    operands: TpuOperands,
    tile: TpuTile,
    dtype: jnp.dtype,
) -> jax.Array:
    head_VD, product_dtype = operands.heads[0], _product_dtype(operands)
    layout = _TpuLayout.of(operands, tile, vocab_sums=1)
    block = (layout.tile.vocab, head_VD.shape[1])

    def kernel(*refs: Any) -> None:
        blocks, (dhead_CD, sum_CD) = layout.blocks(refs, pl.program_id(0))
        h_TD = blocks.hidden[0][...]
        part_CD = product(_masked(dlogits, blocks).astype(product_dtype), h_TD, (1, 0))

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            sum_CD[...] = part_CD

        @pl.when(pl.program_id(1) > 0)
        def _() -> None:
            sum_CD[...] += part_CD

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _() -> None:
            dhead_CD[...] = sum_CD[...].astype(dtype)

    return layout.call(
        kernel,
        operands,
        vocab_first=True,
        products=1,
        out_specs=pl.BlockSpec(block, lambda v, t: (v, 0)),
        out_shape=jax.ShapeDtypeStruct(head_VD.shape, dtype),
        scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
    )


class _TpuLayout(NamedTuple):
    """The division of an op's operands into blocks, and their order in a kernel call."""

    tile: TpuTile
    tokens: int
    vocab: int
    hidden: int
    heads: int
    rows: jax.tree_util.PyTreeDef

    @classmethod
    def of(
        cls, operands: TpuOperands, tile: TpuTile, *, token_sums: int = 0, vocab_sums: int = 0
    ) -> "_TpuLayout":
        tokens, vocab = operands.hidden[0].shape[-2], operands.heads[0].shape[0]
        chosen = choose_tile(operands, token_sums=token_sums, vocab_sums=vocab_sums)
        tile = TpuTile(tile.tokens or chosen.tokens, min(tile.vocab or chosen.vocab, vocab))
        rows = jax.tree.structure(operands.rows)
        return cls(tile, tokens, vocab, len(operands.hidden), len(operands.heads), rows)

    @property
    def padded(self) -> int:
        """The number of tokens, rounded up to a multiple of the tokens per tile."""
        return _round_up(self.tokens, self.tile.tokens)

    def example(self, operands: TpuOperands) -> TpuOperands:
        """Returns zeros in the shapes of a tile's blocks, to infer a kernel's output shapes."""
        return operands._replace(
            hidden=tuple(
                jnp.zeros((*h.shape[:-2], self.tile.tokens, h.shape[-1]), h.dtype)
                for h in operands.hidden
            ),
            heads=tuple(
                jnp.zeros((self.tile.vocab, head.shape[1]), head.dtype) for head in operands.heads
            ),
            rows=jax.tree.map(
                lambda row: jnp.zeros((1, self.tile.tokens), row.dtype), operands.rows
            ),
            vocab=self.vocab,
        )

    def blocks(self, refs: tuple[Any, ...], vocab_tile: jax.Array) -> tuple[TpuOperands, tuple]:
        """Returns the blocks of the operands in a kernel, and the later references in `refs`.

        `refs` are all references that the kernel gets. `vocab_tile` is the position of the tile
        along the vocabulary.
        """
        heads, rows = self.hidden, self.hidden + self.heads
        end = rows + self.rows.num_leaves
        blocks = TpuOperands(
            refs[:heads],
            refs[heads:rows],
            jax.tree.unflatten(self.rows, [ref[...] for ref in refs[rows:end]]),
            vocab_tile * self.tile.vocab,
            self.vocab,
        )
        return blocks, refs[end:]

    def call(
        self,
        kernel: Callable[..., None],
        operands: TpuOperands,
        *,
        vocab_first: bool,
        products: int,
        out_specs: Any,
        out_shape: Any,
        scratch_shapes: Any = (),
    ) -> Any:
        """Runs the kernel over a grid with a parallel axis and an accumulating axis.

        If `vocab_first`, the parallel axis is the vocabulary; otherwise it is the tokens.
        `products` is the number of the kernel's matrix products besides those that compute logits.
        On a CPU the kernel is interpreted, for tests. Raises NotImplementedError on platforms other
        than TPUs and CPUs.
        """
        platform = dispatch.target().platform
        if platform not in ("tpu", "cpu"):
            raise NotImplementedError(dispatch.WRONG_PLATFORM.format("TPUs", platform.upper()))
        tokens, vocab = self.tile
        token_of, vocab_of = (1, 0) if vocab_first else (0, 1)

        def hidden_spec(h: jax.Array) -> pl.BlockSpec:
            leading, width = h.shape[:-2], h.shape[-1]
            zeros = (0,) * len(leading)
            return pl.BlockSpec((*leading, tokens, width), lambda *at: (*zeros, at[token_of], 0))

        def head_spec(head: jax.Array) -> pl.BlockSpec:
            return pl.BlockSpec((vocab, head.shape[1]), lambda *at: (at[vocab_of], 0))

        row_spec = pl.BlockSpec((1, tokens), lambda *at: (0, at[token_of]))
        rows = jax.tree.leaves(operands.rows)
        grid = (self.padded // tokens, pl.cdiv(self.vocab, vocab))
        function = pl.pallas_call(
            kernel,
            grid=grid[::-1] if vocab_first else grid,
            in_specs=[
                *map(hidden_spec, operands.hidden),
                *map(head_spec, operands.heads),
                *[row_spec] * len(rows),
            ],
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=list(scratch_shapes),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes()
            ),
            cost_estimate=self._cost(operands, products, vocab_first),
            interpret=platform == "cpu",
        )
        return function(
            *(_pad(h, tokens, -2) for h in operands.hidden),
            *operands.heads,
            *(_pad(row_N[None], tokens, 1) for row_N in rows),
        )

    def _cost(self, operands: TpuOperands, products: int, vocab_first: bool) -> pl.CostEstimate:
        """Returns an estimate of a kernel's FLOPs, exponentials and bytes for XLA's scheduler.

        If `vocab_first`, the hidden states are read once per vocabulary tile; otherwise the head is
        read once per tile of tokens. `products` is the number of matrix products besides those that
        compute logits.
        """
        hidden = sum(h.size * h.dtype.itemsize for h in operands.hidden)
        heads = sum(head.size * head.dtype.itemsize for head in operands.heads)
        token_tiles, vocab_tiles = (
            self.padded // self.tile.tokens,
            -(-self.vocab // self.tile.vocab),
        )
        width = sum(h.size // h.shape[-2] for h in operands.hidden)
        return pl.CostEstimate(
            flops=2 * self.tokens * self.vocab * (width + products * operands.heads[0].shape[1]),
            transcendentals=self.tokens * self.vocab * width // operands.hidden[0].shape[-1],
            bytes_accessed=hidden * vocab_tiles + heads
            if vocab_first
            else hidden + heads * token_tiles,
        )


def vmem_limit_bytes() -> int:
    """Returns the bytes of VMEM that a kernel may use: three quarters of a core's VMEM."""
    return int(VMEM_SHARE * chip().vmem_mib * 2**20)


def choose_tile(operands: TpuOperands, *, token_sums: int = 0, vocab_sums: int = 0) -> TpuTile:
    """Returns the largest tile that fits the chip's VMEM, with no more tokens than the chip needs.

    The chip needs 2 × `Chip.rows` hidden states, so that the products take longer than reading the
    head, and at least 128 tokens. `token_sums` and `vocab_sums` are the numbers of float32 arrays
    [tokens, width] and [vocabulary, width] in which the kernel sums a gradient. Raises
    NotImplementedError if even the smallest tile does not fit.
    """
    # Operands of two dtypes are converted to the wider one, and both are then held in it.
    size = jnp.result_type(*operands.hidden, *operands.heads).itemsize
    copies = 4 if size == 4 else 2
    sets = sum(h.size // (h.shape[-1] * h.shape[-2]) for h in operands.hidden)
    width = sum(h.size // h.shape[-2] for h in operands.hidden)  # of all sets of a token
    head_width = sum(head.shape[1] for head in operands.heads)
    own = operands.hidden[0].shape[-1]
    tokens, vocab = operands.hidden[0].shape[-2], operands.heads[0].shape[0]
    enough = max(LANES, 2 * chip().rows // sets)
    for vocab_tile in VOCAB_TILES:
        for token_tile in TOKEN_TILES:
            if token_tile > min(enough, _round_up(tokens, LANES)):
                continue
            # Each block has two buffers, one being filled; float32 products also hold their parts.
            held = copies * size * (width * token_tile + head_width * vocab_tile)
            held += 3 * 4 * own * (token_sums * token_tile + vocab_sums * vocab_tile)
            held += 4 * (2 * sets + 6) * vocab_tile * token_tile
            if held <= vmem_limit_bytes():
                return TpuTile(token_tile, min(vocab_tile, vocab))
    raise NotImplementedError(
        f"{sets} hidden states per token, each of width {width // sets}, do not fit "
        f"{chip().vmem_mib} MiB of VMEM in tiles of {TOKEN_TILES[-1]} tokens"
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(array: jax.Array, tile: int, axis: int) -> jax.Array:
    """Pads `axis` of `array` with zeros up to a multiple of `tile`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % tile)
    return jnp.pad(array, widths) if any(widths[axis]) else array
