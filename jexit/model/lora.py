"""Linear projections stacked over layers, with optional low-rank adapters (arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, PRNGKey
from jexit.config import LoRA


class LoRAParam(nnx.Param):
    """A float32 parameter of a LoRA adapter, trained while the base weights stay fixed."""


def merge_adapters(model: nnx.Module) -> None:
    """Adds each LoRA adapter of `model` to its kernel, in place, and then removes the adapters.

    A kernel W becomes W + (alpha / rank) · A · B, computed in float32.
    """
    for _, part in nnx.iter_modules(model):
        if isinstance(part, StackedLinear) and part.lora_a is not None:
            product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))
            update = part.lora_scale * product(part.lora_a[...], part.lora_b[...])
            kernel = part.kernel[...]
            part.kernel[...] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
            part.lora_a = part.lora_b = None
    model.lora = None


def projection(
    lora: LoRA | None,
    name: str,
    layers: int,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    **settings: Any,
) -> StackedLinear:
    """Returns a `StackedLinear`, with a LoRA adapter if `name` is among the targets of `lora`.

    `name` is the projection's name, such as `q` or `down`. `settings` are further arguments of
    `StackedLinear`.
    """
    adapter = lora if lora and name in lora.targets else None
    return StackedLinear(layers, inputs, outputs, lora=adapter, **settings)


class StackedLinear(nnx.Module):
    """A linear projection with the parameters of all layers, stacked on a leading axis.

    The kernel is [L, *inputs, *outputs] and the optional bias is [L, *outputs]. `__call__` expects
    the parameters of a single layer, without the axis L, as inside the scan over layers.
    """

    def __init__(
        self,
        layers: int,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        use_bias: bool = False,
        lora: LoRA | None = None,
        param: type[nnx.Param] = nnx.Param,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs = inputs, outputs
        self.transposed = False  # whether the kernel lies as [*outputs, *inputs]
        scale = math.prod(inputs) ** -0.5
        shape = (layers, *inputs, *outputs)
        self.kernel = param(jax.random.normal(rngs.params(), shape, dtype) * scale)
        self.bias = param(jnp.zeros((layers, *outputs), dtype)) if use_bias else None
        self.lora_scale = lora.scale if lora else 0.0
        self.lora_dropout = lora.dropout if lora else 0.0
        if lora is None:
            self.lora_a = self.lora_b = None
        else:
            normal_a = jax.random.normal(rngs.params(), (layers, *inputs, lora.rank))
            self.lora_a = LoRAParam(normal_a * scale)
            self.lora_b = LoRAParam(jnp.zeros((layers, lora.rank, *outputs)))

    def __call__(
        self, x: Array, *, adapters: bool = True, dropout_key: PRNGKey | None = None
    ) -> Array:
        """Projects x [..., *inputs] to [..., *outputs]; `adapters=False` omits the LoRA adapter.

        Without a `dropout_key`, there is no dropout.
        """
        axes = len(self.inputs)
        kernel = self.kernel[...].astype(x.dtype)
        if self.transposed:
            y = self._transposed_product(x, kernel)
        else:
            y = jnp.tensordot(x, kernel, axes)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if adapters and self.lora_a is not None:
            if dropout_key is not None and self.lora_dropout > 0.0:
                keep = jax.random.bernoulli(dropout_key, 1.0 - self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1.0 - self.lora_dropout), 0.0).astype(x.dtype)
            low = jnp.tensordot(x, self.lora_a[...].astype(x.dtype), axes)
            up = jnp.tensordot(low, self.lora_b[...].astype(x.dtype), 1)
            y += self.lora_scale * up
        return y

    def transpose(self) -> None:
        """Transposes the kernel of a single layer to [*outputs, *inputs].

        This makes products with few rows, as in decoding, faster on CPUs.
        """
        ahead = tuple(range(-len(self.outputs), 0))
        transposed = jnp.moveaxis(self.kernel[...], ahead, tuple(range(len(ahead))))
        self.kernel = type(self.kernel)(transposed)
        self.transposed = True

    def _transposed_product(self, x: Array, kernel: Array) -> Array:
        inputs, outputs = (tuple(range(-len(axes), 0)) for axes in (self.inputs, self.outputs))
        y = jnp.tensordot(kernel, x, (inputs, inputs))
        y = jax.lax.optimization_barrier(y)  # XLA would transpose the product back
        return jnp.moveaxis(y, tuple(range(len(outputs))), outputs)
