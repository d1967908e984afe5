"""RMS normalisation, rotary position embedding and the gated MLP."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Float, HiddenBTD, PositionsBT, PRNGKey
from jexit.config import LoRA
from jexit.model.lora import projection
from jexit.presets import Architecture, Llama3Rope, Yarn


class RMSNorm(nnx.Module):
    """An RMS norm (arXiv:1910.07467), or a stack of norms if `shape` has axes before the width."""

    def __init__(self, *shape: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Returns x / sqrt(mean(x²) + eps) · scale over the last axis, with statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale * normed.astype(x.dtype)


class MLP(nnx.Module):
    """The SwiGLU MLPs (arXiv:2002.05202) of all layers, each down(silu(gate(x)) · up(x))."""

    def __init__(self, arch: Architecture, lora: LoRA | None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, hidden = (arch.width,), (arch.mlp_width,)
        linear = functools.partial(projection, lora, layers=arch.layers, dtype=dtype, rngs=rngs)
        self.gate = linear("gate", inputs=width, outputs=hidden)
        self.up = linear("up", inputs=width, outputs=hidden)
        self.down = linear("down", inputs=hidden, outputs=width)

    def __call__(
        self, x_BTD: HiddenBTD, *, adapters: bool, dropout_key: PRNGKey | None
    ) -> HiddenBTD:
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        gate_BTF = self.gate(x_BTD, adapters=adapters, dropout_key=keys[0])
        up_BTF = self.up(x_BTD, adapters=adapters, dropout_key=keys[1])
        return self.down(jax.nn.silu(gate_BTF) * up_BTF, adapters=adapters, dropout_key=keys[2])


def rope_inverse_frequencies(arch: Architecture) -> tuple[np.ndarray, float]:
    """Returns the inverse frequencies [H/2] of the rotary embedding, and a factor for cos and sin.

    The factor for cos and sin is 1 except under YaRN. The plain inverse frequencies are θ^(−2i/H)
    for i = 0 … H/2 − 1, with θ = `rope_theta` and heads of width H (arXiv:2104.09864). The scaled
    variants divide frequencies with few turns over the original context by `factor`, keep
    frequencies with many turns, and interpolate linearly in between.
    In YaRN (arXiv:2309.00071, section 3.2) the interpolation runs from beta_slow to beta_fast turns
    and is linear in the index i; the factor for cos and sin is the checkpoint's attention factor
    or, without one, 0.1·ln(factor) + 1. In llama3 (`apply_scaling` of meta-llama/llama-models) the
    interpolation runs from low_freq_factor to high_freq_factor turns and is linear in the turns.
    """
    half = arch.head_dim // 2
    plain = arch.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = arch.rope_scaling
    if scaling is None:
        return plain.astype(np.float32), 1.0
    if isinstance(scaling, Llama3Rope):
        ramp, attention = _llama3_ramp(scaling, plain), 1.0
    else:
        ramp, attention = _yarn_ramp(arch, scaling), _yarn_attention(scaling)
    scaled = plain / scaling.factor * ramp + plain * (1.0 - ramp)
    return scaled.astype(np.float32), attention


def _llama3_ramp(scaling: Llama3Rope, plain: np.ndarray) -> np.ndarray:
    """Returns llama3's weight of each frequency, [H/2]: 0 keeps it, 1 divides it by `factor`.

    `plain` contains the inverse frequencies before scaling.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_positions * plain / (2.0 * math.pi)
    return np.clip((high - turns) / (high - low), 0.0, 1.0)


def _yarn_ramp(arch: Architecture, yarn: Yarn) -> np.ndarray:
    """Returns YaRN's weight of each frequency, [H/2]: 0 keeps it, 1 divides it by `factor`."""

    def dimension(turns: float) -> float:  # of the frequency of `turns` turns in the context
        ratio = yarn.original_max_positions / (turns * 2.0 * math.pi)
        return arch.head_dim * math.log(ratio) / (2.0 * math.log(arch.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, arch.head_dim - 1)
    return np.clip((np.arange(arch.head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)


def _yarn_attention(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1.0 else 1.0


def rope_table(
    arch: Architecture, positions_BT: PositionsBT
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Returns float32 cosines and sines [B, T, H/2] of the rotary embedding at each position.

    Both are multiplied by the second result of `rope_inverse_frequencies`.
    """
    frequencies, factor = rope_inverse_frequencies(arch)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Applies the rotary embedding given by cos and sin [B, T, H/2] to x [B, T, heads, H].

    Entry i of a head is rotated together with entry i + H/2. The result has the shape and dtype of
    x; the computation is in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
