"""Grouped-query attention: the projections of all layers, and interchangeable implementations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, Float, HiddenBTD, MaskBT, PRNGKey, SegmentBT
from jexit.config import LoRA
from jexit.errors import UserError
from jexit.kernels.dispatch import target
from jexit.model.layers import RMSNorm, apply_rope
from jexit.model.lora import projection
from jexit.model.sharded_attention import over_mesh
from jexit.model.splash import splash_attention
from jexit.presets import Architecture

# The platform that an implementation is written for; the others run anywhere.
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
# Positions from which `auto` takes splash attention on a TPU.
SPLASH_FROM = 2048
# Text n · BRANCHES + b, with b > 0, attends to itself and to text n · BRANCHES, its prompt.
BRANCHES = 1 << 12


class KeysValues(NamedTuple):
    """The keys, after rotary embedding, and the values of one layer, each [B, S, K, H]."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]


class Attention(nnx.Module):
    """The q, k, v and o projections of all layers, with the architecture's biases and norms.

    In the methods, `cos` and `sin` come from `rope_table`, `adapters=False` omits LoRA, and `key`
    draws the dropout of LoRA (None: no dropout).
    """

    def __init__(self, arch: Architecture, lora: LoRA | None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        query = (arch.query_heads, arch.head_dim)
        key = (arch.kv_heads, arch.head_dim)
        width, bias = (arch.width,), arch.qkv_bias
        linear = functools.partial(projection, lora, layers=arch.layers, dtype=dtype, rngs=rngs)
        self.q = linear("q", inputs=width, outputs=query, use_bias=bias)
        self.k = linear("k", inputs=width, outputs=key, use_bias=bias)
        self.v = linear("v", inputs=width, outputs=key, use_bias=bias)
        self.o = linear("o", inputs=query, outputs=width)
        norm = functools.partial(
            RMSNorm, arch.layers, arch.head_dim, eps=arch.rms_norm_eps, dtype=dtype
        )
        self.q_norm = norm() if arch.qk_norm else None
        self.k_norm = norm() if arch.qk_norm else None

    def queries(
        self, x_BTD: HiddenBTD, cos: Array, sin: Array, *, adapters: bool, key: PRNGKey | None
    ) -> Float[Array, "B T N H"]:
        """Returns the queries: `x_BTD` after projection, norm (if any) and rotary embedding."""
        q_BTNH = self.q(x_BTD, adapters=adapters, dropout_key=key)
        if self.q_norm is not None:
            q_BTNH = self.q_norm(q_BTNH)
        return apply_rope(q_BTNH, cos, sin)

    def keys_values(
        self, x_BTD: HiddenBTD, cos: Array, sin: Array, *, adapters: bool, key: PRNGKey | None
    ) -> KeysValues:
        """Returns keys (after norm, if any, and rotary embedding) and values, projected from x."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        k_BTKH = self.k(x_BTD, adapters=adapters, dropout_key=keys[0])
        v_BTKH = self.v(x_BTD, adapters=adapters, dropout_key=keys[1])
        if self.k_norm is not None:
            k_BTKH = self.k_norm(k_BTKH)
        return KeysValues(apply_rope(k_BTKH, cos, sin), v_BTKH)


def check_attention(name: str) -> None:
    """Raises UserError if the current platform cannot run the attention implementation `name`."""
    needs, found = PLATFORMS.get(name), target().platform
    if needs is not None and needs != found:
        raise UserError(
            f"config.model.attention={name} needs a {needs.upper()}, but the platform is {found}; "
            "set config.model.attention=auto, which picks an implementation that runs there"
        )


def choose_attention(name: str, length: int) -> str:
    """Resolves `auto` for sequences of `length` positions; returns any other name unchanged.

    `auto` means `splash` on TPUs from 2,048 positions on, and `xla` otherwise. At that length `xla`
    would need over 4·N·T² bytes per sequence for the attention scores of N query heads and T
    positions (0.8 GB for Qwen3-4B, and 3.2 GB at 4,096 positions). The limit of 2,048 is based on
    the compiler's memory estimates, not on measured times.
    """
    if name != "auto":
        return name
    return "splash" if target().platform == "tpu" and length >= SPLASH_FROM else "xla"


def attend(
    q_BTNH: Float[Array, "B T N H"],
    kv: KeysValues,
    valid_BT: MaskBT | None = None,
    *,
    segment_BT: SegmentBT | None = None,
    branches: bool = False,
    implementation: str = "xla",
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q·k / sqrt(H)) · v over the valid keys at or before each query.

    Queries and keys cover the same positions; to decode one query per row over a cache, use
    `Cache.attend`. `valid_BT` is False at padding, which must be on the right for cuDNN; outputs at
    padding are finite but meaningless. If a row packs several texts, `segment_BT` contains the
    number of each position's text and replaces `valid_BT`; a query then attends only to the text
    that contains it. With `branches`, text n·BRANCHES is a common prefix to which the
    texts n·BRANCHES + b later in the row (0 < b < BRANCHES) attend as well.

    `implementation` is `xla`, `cudnn` (NVIDIA GPUs, 16-bit floats), `splash` (TPUs, no branches)
    or `auto` (see `choose_attention`). Raises UserError for an unknown name, or if the platform,
    the dtype or `branches` is not supported. `interpret` runs `splash` anywhere, very slowly.
    """
    chosen = choose_attention(implementation, q_BTNH.shape[1])
    if chosen == "xla":
        if segment_BT is not None:
            mask = _visible(segment_BT, branches)
        else:
            mask = None if valid_BT is None else valid_BT[:, None, None]
        return jax.nn.dot_product_attention(
            q_BTNH, *kv, mask=mask, is_causal=True, implementation="xla"
        )
    seen_BT = valid_BT if segment_BT is None else segment_BT
    if chosen == "splash":
        if branches:
            raise UserError(
                f"splash attention (config.model.attention={implementation}) does not support "
                "texts that share a prefix; give each text its own copy of the prefix, or set "
                "config.model.attention=xla"
            )
        if not interpret:
            check_attention(chosen)
        return over_mesh(
            functools.partial(splash_attention, interpret=interpret), q_BTNH, *kv, seen_BT
        )
    if chosen == "cudnn":
        check_attention(chosen)
        return over_mesh(functools.partial(_cudnn, branches=branches), q_BTNH, *kv, seen_BT)
    raise UserError(
        f"attention has no implementation {implementation!r}; use auto, xla, cudnn or splash"
    )


def _visible(segment_BT: Array, branches: bool) -> Array:
    """Returns a mask [B, 1, T, S] that is True where the key is in the same text as the query.

    With `branches`, the mask is also True where the key is in the common prefix (text n·BRANCHES)
    of the query's text.
    """
    query_BNTS, key_BNTS = segment_BT[:, None, :, None], segment_BT[:, None, None, :]
    same_BNTS = query_BNTS == key_BNTS
    if not branches:
        return same_BNTS
    return same_BNTS | (query_BNTS // BRANCHES * BRANCHES == key_BNTS)


def _cudnn(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    seen_BT: Array | None,
    *,
    branches: bool,
) -> Array:
    """Runs cuDNN's causal flash attention.

    `seen_BT` is a boolean mask of valid positions, the numbers of the texts packed into a row, or
    None if all positions are valid. Raises UserError unless the dtype is a 16-bit float.
    """
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            "config.model.attention=cudnn supports only bfloat16 and float16, but the dtype is "
            f"{q_BTNH.dtype}; set config.model.dtype=bfloat16 or config.model.attention=xla"
        )
    mask_BNTS = length_B = None
    if seen_BT is not None and seen_BT.dtype != jnp.bool_:
        mask_BNTS = _visible(seen_BT, branches)
    elif seen_BT is not None:
        length_B = jnp.sum(seen_BT, axis=1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=mask_BNTS,
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        is_causal=True,
        implementation="cudnn",
    )
