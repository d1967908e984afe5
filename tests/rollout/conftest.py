"""Small random models that decode in milliseconds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.model.lora import LoRA
from jexit.model.transformer import Transformer
from jexit.presets import Architecture

EXITS = (1, 2, 4)


def make_model(
    family: str = "qwen3", *, lora: bool = True, max_positions: int = 512
) -> Transformer:
    """Five layers, grouped queries, exit heads that leave often and differ between tokens."""
    arch = Architecture(
        family=family,
        vocab_size=61,
        width=24,
        layers=5,
        query_heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=40,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tied=family == "qwen3",
        max_positions=max_positions,
    )
    adapter = LoRA(rank=3, alpha=6.0, targets=("q", "v", "down")) if lora else None
    model = Transformer(arch, exit_layers=EXITS, lora=adapter, rngs=nnx.Rngs(0))

    def spread(path, value):
        # Zeros (biases, lora_b) and ones (norms) would hide a parameter that is not applied.
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return value + 0.3 * jax.random.normal(jax.random.key(seed), value.shape, value.dtype)

    state = jax.tree_util.tree_map_with_path(spread, nnx.state(model))
    nnx.update(model, state)
    model.exits.b2[...] = jnp.asarray([-0.5, 0.0, 0.5])
    # Logits that neither are flat nor put everything on one token.
    head = model.embed.embedding if model.head is None else model.head.kernel
    head[...] = head[...] * 2.0
    return model


@pytest.fixture(scope="session")
def model() -> Transformer:
    return make_model()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 60, length).tolist() for length in (3, 11, 6)]


@pytest.fixture(scope="session")
def build():
    """`make_model`, for tests that need another one."""
    return make_model
