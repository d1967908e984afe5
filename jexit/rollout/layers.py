"""Weights as a step of decoding wants them: a few rows, and layers whose number is data.

On accelerators XLA reads a layer's part of the stacked weights where they lie. On CPUs it copies
the part out first, which takes longer than the products with it. There every layer's weights become
arrays of their own, in the order that suits a few rows, and a branch a layer reads them. That copy
serves all batches of a model and goes when the model's arrays do. XLA copies what a branch returns:
activations of a few rows, never caches.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, Float, Int
from jexit.kernels.dispatch import target
from jexit.model.block import Block
from jexit.model.lora import StackedLinear
from jexit.model.transformer import Transformer, logits_of

Layers: TypeAlias = tuple[tuple[nnx.GraphDef, nnx.State], ...]  # a block each, split


@functools.partial(jax.jit, static_argnames="graphdef")
def apart(graphdef: nnx.GraphDef, states: tuple[nnx.State, ...]) -> Layers:
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
    """`apart` of the newest model, kept for as long as every array of that model lives."""

    def __init__(self) -> None:
        self._model: tuple[nnx.GraphDef, list[weakref.ref]] | None = None
        self._layers: Layers = ()

    def of(self, graphdef: nnx.GraphDef, states: tuple[nnx.State, ...]) -> Layers:
        """What was kept if these are the same arrays, else a new copy instead of it."""
        arrays = jax.tree.leaves(states)
        if not self._holds(graphdef, arrays):
            self._forget()  # first: two copies need not fit
            self._layers = apart(graphdef, states)
            self._model = graphdef, [weakref.ref(array, self._forget) for array in arrays]
        return self._layers

    def _holds(self, graphdef: nnx.GraphDef, arrays: list[Array]) -> bool:
        if self._model is None:
            return False
        known_graphdef, known = self._model
        return known_graphdef == graphdef and [id(ref()) for ref in known] == list(map(id, arrays))

    def _forget(self, _: weakref.ref | None = None) -> None:
        self._model, self._layers = None, ()


KEPT = Copy()


def at_layer(
    layer: Int[Array, ""],
    blocks: Block,
    layers: Layers | None,
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
    logits_VB = jnp.einsum("VD,BD->VB", head_VD, h_BD, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(logits_VB).T


def on_cpu() -> bool:
    """Whether XLA compiles for CPUs, which want weights apart."""
    return target().platform == "cpu"
