"""A small random model in jexit's own terms, with nothing left at a start that hides it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jexit.model.lora import LoRA
from jexit.model.transformer import Execution, ExitHeadSettings, Transformer
from jexit.presets import Architecture

EXITS = (1, 2, 4)


def make_model(
    family: str = "qwen3",
    *,
    layers: int = 5,
    exit_layers: tuple[int, ...] = EXITS,
    exit_head: ExitHeadSettings = ExitHeadSettings(),
    lora: LoRA | None = None,
    dtype: jnp.dtype = jnp.float32,
    execution: Execution = Execution(),
) -> Transformer:
    """Grouped queries, exit heads that leave often and differ between tokens."""
    arch = Architecture(
        family=family,
        vocab_size=31,
        width=16,
        layers=layers,
        query_heads=4,
        kv_heads=2,
        head_dim=6,
        mlp_width=24,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tied=family == "qwen3",
        max_positions=128,
    )
    model = Transformer(
        arch,
        exit_layers=exit_layers,
        exit_head=exit_head,
        lora=lora,
        dtype=dtype,
        execution=execution,
        rngs=nnx.Rngs(0),
    )

    def spread(path, value):
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return value + 0.3 * jax.random.normal(jax.random.key(seed), value.shape, value.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(spread, nnx.state(model)))
    model.exits.b2[...] = jnp.linspace(-0.5, 0.5, len(exit_layers))
    return model


@pytest.fixture(scope="session", name="make_model")
def _make_model():
    return make_model


@pytest.fixture(scope="session")
def model() -> Transformer:
    return make_model()
