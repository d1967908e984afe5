"""A model small enough to enumerate, texts for it, and what a step takes off its parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from random_models import random_model

from jexit.config import ExitSettings, LoRA
from jexit.model.policies import Policy
from jexit.model.transformer import Output, Transformer, logits_of, run
from jexit.steps.completions import Completions, pad_completions
from jexit.steps.state import SplitModel, TrainState, new_state, split_model

VOCABULARY, LAYERS, EXITS = 11, 3, (1, 2)
DESCENT = optax.sgd(1.0)
_RNG = np.random.default_rng(0)
PROMPTS = [_RNG.integers(0, VOCABULARY, size=n).tolist() for n in (3, 5, 1, 4)]
COMPLETIONS = [_RNG.integers(0, VOCABULARY, size=n).tolist() for n in (6, 2, 9, 4)]


@functools.cache
def make_split(
    *,
    vocab_size: int = VOCABULARY,
    full: bool = False,
    dropout: float = 0.0,
    continuation: str = "frozen",
    detached: bool = False,
) -> SplitModel:
    """A random model of three layers whose adapters and heads are not at their start."""
    model = random_model(
        exit_layers=EXITS,
        exit_head=ExitSettings(continuation=continuation, detached=detached),
        lora=None if full else LoRA(rank=2, alpha=4.0, dropout=dropout, targets=("q", "v", "up")),
        vocab_size=vocab_size,
        layers=LAYERS,
    )
    return split_model(model, full=full)


def rows() -> Completions:
    """A row for each of the texts."""
    return pad_completions(PROMPTS, COMPLETIONS, 0)


def whole(
    model: Transformer, batch: Completions, policy: Policy, **options: Any
) -> tuple[jax.Array, Output]:
    """Whole log-distributions [B, C, V] that a completion's tokens are drawn from, and the pass."""
    out = run(model, batch.tokens_BT, policy=policy, **batch.layout, hazards=True, **options)
    return jax.nn.log_softmax(logits_of(batch.window(out.hidden_BTD), model.head_VD)), out


def start(split: SplitModel, optimizer: optax.GradientTransformation = DESCENT) -> TrainState:
    """A state that a step may take over."""
    return new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)


def taken_off(step: Any, split: SplitModel, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """(What one step of `DESCENT` takes off the parameters: the gradient; the step's metrics)."""
    state, metrics = step(start(split), split.fixed, *arguments)
    return jax.tree.map(jnp.subtract, split.trainable, state.trainable), metrics


def assert_close(found: Any, truth: Any, *, rtol: float, atol: float) -> None:
    """Of two trees, leaf by leaf."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, truth)
