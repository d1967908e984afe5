"""Small random models that decode in milliseconds."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jexit.config import ExitSettings, LoRA
from jexit.model.transformer import Transformer
from small_runs import ARCHITECTURE, random_model

EXITS = (1, 2, 4)


@pytest.fixture(scope="session")
def model() -> Transformer:
    """Five layers, grouped queries, exits that are often taken and that go on linearly."""
    arch = dataclasses.replace(
        ARCHITECTURE, vocab_size=61, width=24, layers=5, query_heads=4, kv_heads=2, mlp_width=40,
        max_positions=512,
    )  # fmt: skip
    model = random_model(
        arch,
        0.3,
        exit_layers=EXITS,
        exit_head=ExitSettings(continuation="linear"),
        lora=LoRA(rank=3, alpha=6.0, targets=("q", "v", "down")),
    )
    model.exits.b2[...] = jnp.asarray([-0.5, 0.0, 0.5])
    # Logits that neither are flat nor put everything on one token.
    model.embed.embedding[...] *= 2.0
    return model


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 60, length).tolist() for length in (3, 11, 6)]
