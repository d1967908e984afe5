"""Small random models that decode in milliseconds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.config import ExitSettings, LoRA
from jexit.model.transformer import Transformer
from jexit.presets import Architecture

EXITS = (1, 2, 4)


@pytest.fixture(scope="session")
def model() -> Transformer:
    """Five layers, grouped queries, exits that are often taken and that go on linearly."""
    arch = Architecture(
        family="qwen3",
        vocab_size=61,
        width=24,
        layers=5,
        query_heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=40,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tied=True,
        max_positions=512,
    )
    lora = LoRA(rank=3, alpha=6.0, targets=("q", "v", "down"))
    model = Transformer(
        arch,
        exit_layers=EXITS,
        exit_head=ExitSettings(continuation="linear"),
        lora=lora,
        rngs=nnx.Rngs(0),
    )

    def spread(path, value):
        # Zeros (biases, lora_b) and ones (norms) would hide a parameter that is not applied.
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return value + 0.3 * jax.random.normal(jax.random.key(seed), value.shape, value.dtype)

    state = jax.tree_util.tree_map_with_path(spread, nnx.state(model))
    nnx.update(model, state)
    model.exits.b2[...] = jnp.asarray([-0.5, 0.0, 0.5])
    # Logits that neither are flat nor put everything on one token.
    model.embed.embedding[...] *= 2.0
    return model


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 60, length).tolist() for length in (3, 11, 6)]
