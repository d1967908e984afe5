"""Layer weights in the layout that decoding needs, for few rows and a dynamic layer index.

On accelerators, a decoding step slices one layer out of the stacked weights. On TPUs the slice is
fused into the matrix products; on Hopper GPUs XLA copies the slice before cuBLAS reads it. On CPUs
such a copy takes longer than the product. Each layer's weights therefore become separate arrays on
CPUs, laid out for few rows, and a switch with one branch per layer selects the arrays. In float32,
LoRA adapters are merged into them, because an adapter's two small products take as long as a large
one. These arrays serve all batches of a model and are freed with the model's arrays. XLA copies the
results of a branch, so branches return activations of a few rows and never caches.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, Float, Int
from jexit.kernels.dispatch import target
from jexit.kernels.tiles import product
from jexit.model.block import Block
from jexit.model.lora import StackedLinear, merge_adapters
from jexit.model.transformer import Transformer, logits_of

LayerWeights: TypeAlias = tuple[tuple[nnx.GraphDef, nnx.State], ...]  # one split block per layer


@functools.partial(jax.jit, static_argnames=("graphdef", "adapters"))
def apart(
    graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], *, adapters: bool = True
) -> LayerWeights:
    """Returns one `nnx.split` block per layer, with kernels laid out for products with few rows.

    With `adapters`, the kernels of a float32 model include its LoRA adapters. Kernels of a lower
    precision would lose a part of them, so there the adapters stay separate.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    if adapters and model.dtype == jnp.float32:
        merge_adapters(model)
    blocks_def, stacked = nnx.split(model.blocks)

    def one(layer: int) -> tuple[nnx.GraphDef, nnx.State]:
        block = nnx.merge(blocks_def, jax.tree.map(lambda leaf: leaf[layer], stacked))
        for _, part in nnx.iter_modules(block):
            if isinstance(part, StackedLinear):
                part.transpose()
        return nnx.split(block)

    return tuple(one(layer) for layer in range(model.arch.layers))


class Copy:
    """Caches the result of `apart` for the newest model, while all arrays of the model exist."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[tuple, list[weakref.ref], LayerWeights] | None = None

    def of(
        self, graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], *, adapters: bool = True
    ) -> LayerWeights:
        """Returns `apart(…)` of the arguments, or the cached result if they are the same."""
        arrays = jax.tree.leaves(states)
        with self._lock:
            kept = self._kept
            same = kept is not None and kept[0] == (graphdef, adapters)
            if same and [id(ref()) for ref in kept[1]] == [id(array) for array in arrays]:
                return kept[2]
            kept = self._kept = None  # free the old copy first: memory need not fit both
            layers = apart(graphdef, states, adapters=adapters)
            # NumPy arrays can change in place, which would leave a cached copy behind.
            if all(isinstance(array, jax.Array) for array in arrays):
                refs = [weakref.ref(array, self._forget) for array in arrays]
                self._kept = (graphdef, adapters), refs, layers
            return layers

    def _forget(self, ref: weakref.ref) -> None:
        """Drops the cached result when an array of its model is freed."""
        kept = self._kept
        if kept is not None and any(ref is other for other in kept[1]):
            self._kept = None


KEPT = Copy()


def at_layer(
    layer: Int[Array, ""],
    blocks: Block,
    layers: LayerWeights | None,
    function: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Returns `function(block, *operands)` for block `layer` of `layers` (None: of `blocks`).

    `blocks` contains the stacked parameters of all layers.
    """
    if layers is None:
        graphdef, stacked = nnx.split(blocks)
        one = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False), stacked
        )
        return function(nnx.merge(graphdef, one), *operands)

    branches = [functools.partial(function, nnx.merge(*one)) for one in layers]
    return jax.lax.switch(layer, branches, *operands)


def head_logits(h_BD: Float[Array, "B D"], head_VD: Float[Array, "V D"]) -> Float[Array, "B V"]:
    """Returns the float32 logits [B, V] of a few rows; see `jexit.model.transformer.logits_of`.

    On CPUs head · hᵀ takes half the time of h · headᵀ. A barrier keeps XLA from changing the order.
    """
    if not on_cpu():
        return logits_of(h_BD, head_VD)
    logits_VB = product(head_VD, h_BD, (1, 1))
    return jax.lax.optimization_barrier(logits_VB).T


def on_cpu() -> bool:
    return target().platform == "cpu"
