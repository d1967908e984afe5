"""The transformer block: one module with the parameters of all layers on a leading axis."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, HiddenBTD, PRNGKey
from jexit.config import ExitSettings, LoRA
from jexit.model.attention import Attention, KeysValues
from jexit.model.exits import Continuation
from jexit.model.layers import MLP, RMSNorm
from jexit.presets import Architecture


class Block(nnx.Module):
    """A transformer block: h += o(attention(norm(h))), then h += mlp(norm(h)).

    For a token that has left at an exit, `skipped` updates the residual h instead. The module is
    made with the parameters of all layers, stacked on a leading axis; its methods expect those of
    one layer, without this axis.
    """

    def __init__(
        self,
        arch: Architecture,
        lora: LoRA | None,
        exit_head: ExitSettings = ExitSettings(),
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        norm = {"eps": arch.rms_norm_eps, "dtype": dtype}
        self.attn_norm = RMSNorm(arch.layers, arch.width, **norm)
        self.attn = Attention(arch, lora, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(arch.layers, arch.width, **norm)
        self.mlp = MLP(arch, lora, dtype=dtype, rngs=rngs)
        if exit_head.continuation == "linear":
            rank = exit_head.continuation_rank
            self.continuation = Continuation(arch.layers, arch.width, rank=rank, rngs=rngs)
        else:
            self.continuation = None

    def __call__(
        self,
        h_BTD: HiddenBTD,
        cos: Array,
        sin: Array,
        attend: Callable[[Array, KeysValues], Array],
        *,
        adapters: bool = True,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[HiddenBTD, KeysValues]:
        """Runs one layer over whole sequences; returns the new residual, and the keys and values.

        The residual is [B, T, D], and keys and values are [B, T, K, H] each. `attend` maps queries
        [B, T, N, H] and `KeysValues` to the attention output [B, T, N, H], such as
        `jexit.model.attention.attend` with the remaining arguments bound. `cos` and `sin` come from
        `rope_table`. `adapters=False` omits LoRA; without a `dropout_key`, there is no dropout.
        """
        keys = [None] * 4 if dropout_key is None else list(jax.random.split(dropout_key, 4))
        x_BTD = self.attn_norm(h_BTD)
        kv = self.attn.keys_values(x_BTD, cos, sin, adapters=adapters, key=keys[0])
        q_BTNH = self.attn.queries(x_BTD, cos, sin, adapters=adapters, key=keys[1])
        mixed_BTNH = attend(q_BTNH, kv)
        return self.finish(h_BTD, mixed_BTNH, adapters=adapters, keys=(keys[2], keys[3])), kv

    def skipped(self, h: Array) -> Array:
        """Returns the residual [..., D] after this layer for a token that skips the layer."""
        return h if self.continuation is None else self.continuation(h)

    def finish(
        self,
        h_BTD: HiddenBTD,
        mixed_BTNH: Array,
        *,
        adapters: bool = True,
        keys: tuple[PRNGKey | None, PRNGKey | None] = (None, None),
    ) -> HiddenBTD:
        """Runs the rest of the block after attention, and returns the new residual [B, T, D].

        The rest is the output projection, the MLP and both residual additions. `h_BTD` is the
        residual that entered the block, and `mixed_BTNH` the output of attention. `keys` are the
        PRNG keys for the dropout of output projection and MLP (None: no dropout).
        """
        h_BTD = h_BTD + self.attn.o(mixed_BTNH, adapters=adapters, dropout_key=keys[0])
        return h_BTD + self.mlp(self.mlp_norm(h_BTD), adapters=adapters, dropout_key=keys[1])
