"""Layer weights in the form that decoding needs: few rows, and a layer index that is data.

On accelerators, a step slices one layer out of the stacked weights. On TPUs the slice is fused into
the matrix products; on Hopper GPUs XLA copies it out before cuBLAS reads it. On CPUs such a copy
takes longer than the product. There each layer's weights become separate arrays, laid out for few
rows, and a switch with one branch per layer selects them. This copy serves all batches of a model
and is freed with the model's arrays. XLA copies what a branch returns, so branches return
activations of a few rows and never caches.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from flax import nnx

from jexit.axes import Array, Float, Int
from jexit.kernels.dispatch import target
from jexit.kernels.tiles import product
from jexit.model.block import Block
from jexit.model.lora import StackedLinear
from jexit.model.transformer import Transformer, logits_of

LayerWeights: TypeAlias = tuple[tuple[nnx.GraphDef, nnx.State], ...]  # a block each, split


@functools.partial(jax.jit, static_argnames="graphdef")
def apart(graphdef: nnx.GraphDef, states: tuple[nnx.State, ...]) -> LayerWeights:
    """A block for each layer, with kernels that lie as few rows want them."""
    model: Transformer = nnx.merge(graphdef, *states)
    blocks_def, stacked = nnx.split(model.blocks)

    def one(layer: int) -> tuple[nnx.GraphDef, nnx.State]:
        block = nnx.merge(blocks_def, jax.tree.map(lambda leaf: leaf[layer], stacked))
        for _, part in nnx.iter_modules(block):
            if isinstance(part, StackedLinear):
                part.turn()
        return nnx.split(block)

    return tuple(one(layer) for layer in range(model.arch.layers))


class Copy:
    """`apart` of the newest model, kept for as long as every array of that model lives.

    Whoever trains a model has another one after every step, and a new copy when that decodes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[nnx.GraphDef, list[weakref.ref], LayerWeights] | None = None

    def of(self, graphdef: nnx.GraphDef, states: tuple[nnx.State, ...]) -> LayerWeights:
        """What was kept if these are the same arrays, else a new copy instead of it."""
        arrays = jax.tree.leaves(states)
        with self._lock:
            kept = self._kept
            if kept is not None and kept[0] == graphdef and _are(kept[1], arrays):
                return kept[2]
            kept = self._kept = None  # nothing holds the old copy: two need not fit
            layers = apart(graphdef, states)
            # Arrays that can change in place would change without their copy.
            if all(isinstance(array, jax.Array) for array in arrays):
                refs = [weakref.ref(array, self._forget) for array in arrays]
                self._kept = graphdef, refs, layers
            return layers

    def _forget(self, ref: weakref.ref) -> None:
        """When an array has gone; only of the model that it belonged to."""
        kept = self._kept
        if kept is not None and any(ref is other for other in kept[1]):
            self._kept = None


def _are(refs: list[weakref.ref], arrays: list[Array]) -> bool:
    return [id(ref()) for ref in refs] == [id(array) for array in arrays]


KEPT = Copy()


def at_layer(
    layer: Int[Array, ""],
    blocks: Block,
    layers: LayerWeights | None,
    function: Callable[..., Any],
    *operands: Any,
) -> Any:
    """`function(block, *operands)` with one layer of `blocks`; of `layers` if there are any."""
    if layers is None:
        graphdef, stacked = nnx.split(blocks)
        one = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False), stacked
        )
        return function(nnx.merge(graphdef, one), *operands)

    branches = [functools.partial(function, nnx.merge(*one)) for one in layers]
    return jax.lax.switch(layer, branches, *operands)


def head_logits(h_BD: Float[Array, "B D"], head_VD: Float[Array, "V D"]) -> Float[Array, "B V"]:
    """`logits_of` a few rows.

    CPUs take half the time for head · hᵀ, which XLA would turn round.
    """
    if not on_cpu():
        return logits_of(h_BD, head_VD)
    logits_VB = product(head_VD, h_BD, (1, 1))
    return jax.lax.optimization_barrier(logits_VB).T


def on_cpu() -> bool:
    """Whether XLA compiles for CPUs, which want weights apart."""
    return target().platform == "cpu"
