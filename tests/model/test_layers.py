"""Norms and rotary tables against formulas and against Hugging Face's."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jexit.model.layers import apply_rope, rms_norm, rope_inverse_frequencies, rope_table
from jexit.presets import PRESETS, Architecture, Llama3Rope, Yarn

ARCH = Architecture(
    family="qwen3",
    vocab_size=31,
    width=64,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=32,
    mlp_width=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tied=True,
    max_positions=64,
)
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
    for theta in [1e4, 5e6]:
        for head_dim in [12, 128]:
            for scaling in SCALINGS:
                from transformers import LlamaConfig
                from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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
                arch = dataclasses.replace(
                    ARCH, rope_theta=theta, head_dim=head_dim, rope_scaling=scaling
                )
                theirs = LlamaRotaryEmbedding(config)
                frequencies, factor = rope_inverse_frequencies(arch)
                np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
                assert factor == pytest.approx(theirs.attention_scaling)

                positions = np.asarray([[0, 1, 63, 64, 300]])
                cos, sin = theirs(torch.zeros(1, 5, 1), torch.tensor(positions))
                ours = rope_table(arch, jnp.asarray(positions))
                for found, truth in zip(ours, (cos, sin), strict=True):
                    np.testing.assert_allclose(
                        found, truth.numpy()[..., : head_dim // 2], atol=1e-4
                    )


def test_rotation_makes_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 32))) for _ in range(2))

    def score(at_q, at_k):
        rotated = [
            apply_rope(x, *rope_table(ARCH, jnp.asarray([[at]])))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(jnp.vdot(*rotated))

    assert score(9, 4) == pytest.approx(score(45, 40), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_yarn_leaves_fast_frequencies_and_divides_slow_ones():
    arch = dataclasses.replace(
        PRESETS["qwen3-4b"].architecture,
        rope_scaling=Yarn(factor=4.0, original_max_positions=32_768),
    )
    plain, _ = rope_inverse_frequencies(dataclasses.replace(arch, rope_scaling=None))
    scaled, factor = rope_inverse_frequencies(arch)
    ratio = plain / scaled
    turns = 32_768 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 4.0, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-6).all()
    assert factor == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_llama3_leaves_fast_frequencies_and_divides_slow_ones():
    arch = dataclasses.replace(ARCH, head_dim=128, rope_theta=5e5)
    plain, _ = rope_inverse_frequencies(arch)
    scaled, factor = rope_inverse_frequencies(dataclasses.replace(arch, rope_scaling=LLAMA3))
    ratio = plain / scaled
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4.01], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.99], 32.0, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 3 and (ratio[between] > 1.0).all() and (ratio[between] < 32.0).all()
    assert factor == 1.0
