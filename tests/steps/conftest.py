"""A model small enough to enumerate."""

import dataclasses

import jax
import pytest
from flax import nnx

from jexit.config import ExitSettings, LoRA
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.steps.state import split_model

ARCH = Architecture(
    family="qwen3",
    vocab_size=11,
    width=16,
    layers=3,
    query_heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tied=True,
    max_positions=64,
)


def make_split(*, vocab_size=11, full=False, dropout=0.0, continuation="frozen", detached=False):
    """A random model with exits 1 and 2 whose adapters and heads are not at their start."""
    model = Transformer(
        dataclasses.replace(ARCH, vocab_size=vocab_size),
        exit_layers=(1, 2),
        exit_head=ExitSettings(bias=-0.5, continuation=continuation, detached=detached),
        lora=None if full else LoRA(rank=2, alpha=4.0, dropout=dropout, targets=("q", "v", "up")),
        rngs=nnx.Rngs(0),
    )
    split = split_model(model, full=full)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    trainable = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), split.trainable
    )
    return split._replace(trainable=trainable)


@pytest.fixture(name="make_split", scope="session")
def _make_split():
    return make_split
