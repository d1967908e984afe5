"""Grouped-query attention with the projections of every layer stacked."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, Bool, Float, HiddenBTD, PRNGKey
from jexit.model.layers import RMSNorm, apply_rope
from jexit.model.lora import LoRA, StackedLinear
from jexit.presets import Architecture


class KeysValues(NamedTuple):
    """Keys (rotated) and values of one layer, each [B, S, K, H]."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]


class Attention(nnx.Module):
    """Projections q, k, v, o; QKV bias in Qwen2, query and key norms in Qwen3."""

    def __init__(self, arch: Architecture, lora: LoRA | None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        query = (arch.query_heads, arch.head_dim)
        key = (arch.kv_heads, arch.head_dim)
        width = (arch.width,)

        def linear(
            name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], use_bias: bool
        ) -> StackedLinear:
            adapter = lora if lora and name in lora.targets else None
            return StackedLinear(
                arch.layers,
                inputs,
                outputs,
                use_bias=use_bias,
                lora=adapter,
                dtype=dtype,
                rngs=rngs,
            )

        self.q = linear("q", width, query, arch.qkv_bias)
        self.k = linear("k", width, key, arch.qkv_bias)
        self.v = linear("v", width, key, arch.qkv_bias)
        self.o = linear("o", query, width, False)
        shape = (arch.layers, arch.head_dim)
        norm = {"eps": arch.rms_norm_eps, "dtype": dtype}
        self.q_norm = RMSNorm(*shape, **norm) if arch.qk_norm else None
        self.k_norm = RMSNorm(*shape, **norm) if arch.qk_norm else None

    def queries(
        self, x_BTD: HiddenBTD, cos: Array, sin: Array, *, adapters: bool, key: PRNGKey | None
    ) -> Float[Array, "B T N H"]:
        """Normed and rotated queries of the block's normed input."""
        q_BTNH = self.q(x_BTD, adapters=adapters, dropout_key=key)
        if self.q_norm is not None:
            q_BTNH = self.q_norm(q_BTNH)
        return apply_rope(q_BTNH, cos, sin)

    def keys_values(
        self, x_BTD: HiddenBTD, cos: Array, sin: Array, *, adapters: bool, key: PRNGKey | None
    ) -> KeysValues:
        """Normed and rotated keys, and values, of the block's normed input."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        k_BTKH = self.k(x_BTD, adapters=adapters, dropout_key=keys[0])
        v_BTKH = self.v(x_BTD, adapters=adapters, dropout_key=keys[1])
        if self.k_norm is not None:
            k_BTKH = self.k_norm(k_BTKH)
        return KeysValues(apply_rope(k_BTKH, cos, sin), v_BTKH)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    kv: KeysValues,
    mask_BTS: Bool[Array, "B T S"],
    *,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """softmax(q·k / sqrt(H)) · v over the keys that `mask_BTS` allows.

    A query with no key allowed gets finite values that nobody reads. The named implementation of
    `jax.nn.dot_product_attention` runs or raises.
    """
    return jax.nn.dot_product_attention(
        q_BTNH, kv.keys, kv.values, mask=mask_BTS[:, None], implementation=implementation
    )
