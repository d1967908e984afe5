"""What the TPU kernels share: the walk over tiles, their sizes by chip, products, masks.

A tile of logits is held as [vocabulary, tokens]: the vocabulary lies along the sublanes, so that
reductions over it are plain vector operations, and a statistic of the tokens is a row of lanes.

Statistics and the gradient to the hidden states go over the vocabulary inside each tile of tokens,
so that a tile of tokens reads the head once; the gradient to the head goes over the tokens inside
each tile of the vocabulary.
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


VMEM_SHARE = 0.75  # of a core's, for blocks and temporaries; the rest is the compiler's
VOCAB_TILES = (512, 256, 128)
TOKEN_TILES = (1024, 512, 256, 128)


class Tile(NamedTuple):
    """Tokens and vocabulary entries of a tile of logits; None leaves the choice to the chip."""

    tokens: int | None = None  # a multiple of 128
    vocab: int | None = None  # a multiple of 16, or the whole vocabulary


BY_CHIP = Tile()


class Operands(NamedTuple):
    """What an op reads: arrays outside of a kernel, blocks of them inside.

    Attributes:
      hidden: sets of hidden states, [N, D] or [E, N, D]; references inside.
      heads: output heads [V, D]; all have one vocabulary; references inside.
      rows: pytree of arrays [N]; rows of lanes [1, T] inside.
      start: number of the first vocabulary entry of the block.
      vocab: size of the whole vocabulary.
    """

    hidden: tuple[Any, ...]
    heads: tuple[Any, ...]
    rows: Any = ()
    start: jax.Array | int = 0
    vocab: int = 0

    def logits(self, h_TD: jax.Array, head: int = 0) -> jax.Array:
        """Logits [C, T]; rows beyond the vocabulary, whatever the head holds there, are masked."""
        z_CT = product(self.heads[head][...], h_TD, (1, 1))
        return jnp.where(self.index(z_CT.shape) < self.vocab, z_CT, MASKED)

    def index(self, shape: tuple[int, ...]) -> jax.Array:
        """Number of the vocabulary entry at each place of a tile [C, …]."""
        return self.start + lax.broadcasted_iota(jnp.int32, shape, 0)


def statistics(
    of_tile: Callable[[Operands], Any],
    merge: Callable[[Any, Any], Any],
    operands: Operands,
    tile: Tile,
) -> Any:
    """Merges `of_tile` over the vocabulary: a pytree of arrays [k, T] there, [k, N] here."""
    layout = _Layout.of(operands, tile)
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
    dlogits: Callable[[Operands], jax.Array],
    operands: Operands,
    tile: Tile,
    head_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients to the first hidden states, float32, and the first head, in `head_dtype`.

    `dlogits` gives the gradient to a tile's logits [C, T] and zeros for tokens that are masked out;
    entries beyond the vocabulary are masked here.
    """
    dh_ND = _to_hidden(dlogits, operands, tile)
    return dh_ND, None if head_dtype is None else _to_head(dlogits, operands, tile, head_dtype)


def check_covers(operands: Operands) -> None:
    """Raises NotImplementedError for what the kernels, those of the gradients too, do not hold."""
    for array in (*operands.hidden, *operands.heads):
        if dispatch.target().platform == "tpu" and array.shape[-1] % LANES:
            width = array.shape[-1]
            raise NotImplementedError(
                f"XLA copies a head whose width is not a multiple of {LANES}, got {width}"
            )
    choose_tile(operands, token_sums=1)
    choose_tile(operands, vocab_sums=1)


def _product_dtype(operands: Operands) -> jnp.dtype:
    return jnp.promote_types(operands.hidden[0].dtype, operands.heads[0].dtype)


def _masked(dlogits: Callable[[Operands], jax.Array], blocks: Operands) -> jax.Array:
    dz_CT = dlogits(blocks)
    return jnp.where(blocks.index(dz_CT.shape) < blocks.vocab, dz_CT, 0)


def _to_hidden(
    dlogits: Callable[[Operands], jax.Array], operands: Operands, tile: Tile
) -> jax.Array:
    width, dtype = operands.hidden[0].shape[-1], _product_dtype(operands)
    layout = _Layout.of(operands, tile, token_sums=1)

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
    dlogits: Callable[[Operands], jax.Array], operands: Operands, tile: Tile, dtype: jnp.dtype
) -> jax.Array:
    head_VD, product_dtype = operands.heads[0], _product_dtype(operands)
    layout = _Layout.of(operands, tile, vocab_sums=1)
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


class _Layout(NamedTuple):
    """How an op's operands are cut into blocks."""

    tile: Tile
    tokens: int
    vocab: int
    hidden: int
    heads: int
    rows: jax.tree_util.PyTreeDef

    @classmethod
    def of(
        cls, operands: Operands, tile: Tile, *, token_sums: int = 0, vocab_sums: int = 0
    ) -> "_Layout":
        tokens, vocab = operands.hidden[0].shape[-2], operands.heads[0].shape[0]
        chosen = choose_tile(operands, token_sums=token_sums, vocab_sums=vocab_sums)
        tile = Tile(tile.tokens or chosen.tokens, min(tile.vocab or chosen.vocab, vocab))
        rows = jax.tree.structure(operands.rows)
        return cls(tile, tokens, vocab, len(operands.hidden), len(operands.heads), rows)

    @property
    def padded(self) -> int:
        """Tokens, with zeros up to whole tiles."""
        return _round_up(self.tokens, self.tile.tokens)

    def example(self, operands: Operands) -> Operands:
        """Blocks of zeros, for shapes."""
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

    def blocks(self, refs: tuple[Any, ...], vocab_tile: jax.Array) -> tuple[Operands, tuple]:
        """Inside a kernel: the operands, and the references that come after theirs."""
        heads, rows = self.hidden, self.hidden + self.heads
        end = rows + self.rows.num_leaves
        blocks = Operands(
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
        operands: Operands,
        *,
        vocab_first: bool,
        products: int,
        out_specs: Any,
        out_shape: Any,
        scratch_shapes: Any = (),
    ) -> Any:
        """Runs the kernel over a parallel and an accumulating grid axis.

        `products` counts its matrix products beyond those for the logits.
        On a CPU the kernel is interpreted, which is for tests. Raises NotImplementedError on any
        other platform that is not a TPU.
        """
        platform = dispatch.target().platform
        if platform not in ("tpu", "cpu"):
            raise NotImplementedError(f"the kernel is written for TPUs, not for {platform}")
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

    def _cost(self, operands: Operands, products: int, vocab_first: bool) -> pl.CostEstimate:
        """For XLA's scheduler: the head is read once a tile of tokens, or the tokens a tile."""
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
    """What a kernel may use of the chip's VMEM."""
    return int(VMEM_SHARE * chip().vmem_mib * 2**20)


def choose_tile(operands: Operands, *, token_sums: int = 0, vocab_sums: int = 0) -> Tile:
    """The largest tile that the chip's VMEM holds, with no more rows than the chip needs.

    `token_sums` and `vocab_sums` count the float32 sums [tokens, width] and [vocab, width] that are
    held beside. Raises NotImplementedError when not even the smallest tile fits.
    """
    # Operands of two types meet in the wider one, which is then held of both.
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
            # One of two buffers is being filled; float32 products hold their parts beside.
            held = copies * size * (width * token_tile + head_width * vocab_tile)
            held += 3 * 4 * own * (token_sums * token_tile + vocab_sums * vocab_tile)
            held += 4 * (2 * sets + 6) * vocab_tile * token_tile
            if held <= vmem_limit_bytes():
                return Tile(token_tile, min(vocab_tile, vocab))
    raise NotImplementedError(
        f"{sets} hidden states of {width // sets} numbers a token do not fit "
        f"{chip().vmem_mib} MiB of VMEM in tiles of {TOKEN_TILES[-1]} tokens"
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(array: jax.Array, tile: int, axis: int) -> jax.Array:
    """With zeros up to a multiple of the tile."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % tile)
    return jnp.pad(array, widths) if any(widths[axis]) else array
