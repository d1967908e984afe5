"""Norms and rotary tables against formulas and against Hugging Face's."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jexit.model.layers import rms_norm, rope_inverse_frequencies, rope_table
from jexit.presets import PRESETS, Llama3Rope, Yarn

ARCH = dataclasses.replace(PRESETS["qwen3-0.6b"].architecture, head_dim=32, rope_theta=1e4)
LLAMA3 = Llama3Rope(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def test_rms_norm_is_the_formula_with_its_statistics_in_float32():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(0.0, 3.0, (5, 7, 16)), rng.normal(1.0, 0.5, 16)
    truth = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 0.1), truth, rtol=2e-5)
    # 300² overflows float16 (and the sum loses all digits in bfloat16), the float32 sum does not.
    half = rms_norm(jnp.full((4,), 300.0, jnp.float16), jnp.ones(4, jnp.float16), 0.0)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, 1.0, rtol=1e-3)


SCALINGS = [
    None,
    Yarn(factor=4.0, original_max_positions=64),
    Yarn(factor=1.0, original_max_positions=256),
    Yarn(factor=8.0, original_max_positions=4096, beta_fast=16.0, beta_slow=2.0),
    Yarn(factor=2.5, original_max_positions=512, truncate=False),
    Yarn(factor=2.5, original_max_positions=512, attention_factor=0.7),
    LLAMA3,
    dataclasses.replace(LLAMA3, factor=8.0, original_max_positions=64),
    dataclasses.replace(LLAMA3, low_freq_factor=2.5, high_freq_factor=2.75),
]


def test_frequencies_are_those_of_hugging_face():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for theta, head_dim, scaling in itertools.product((1e4, 5e6), (12, 128), SCALINGS):
        parameters = {"rope_type": "default", "rope_theta": theta}
        if scaling is not None:
            given = dataclasses.asdict(scaling)
            parameters |= {
                "rope_type": given.pop("kind"),
                "original_max_position_embeddings": given.pop("original_max_positions"),
                **{key: value for key, value in given.items() if value is not None},
            }
        config = LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=4096,
            rope_parameters=parameters,
        )
        arch = dataclasses.replace(ARCH, rope_theta=theta, head_dim=head_dim, rope_scaling=scaling)
        theirs = LlamaRotaryEmbedding(config)
        frequencies, factor = rope_inverse_frequencies(arch)
        np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
        assert factor == pytest.approx(theirs.attention_scaling)

        positions = np.asarray([[0, 1, 63, 64, 300]])
        cos, sin = theirs(torch.zeros(1, 5, 1), torch.tensor(positions))
        ours = rope_table(arch, jnp.asarray(positions))
        for found, truth in zip(ours, (cos, sin), strict=True):
            np.testing.assert_allclose(found, truth.numpy()[..., : head_dim // 2], atol=1e-4)
