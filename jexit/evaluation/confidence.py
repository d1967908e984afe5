"""Exits that leave where they are confident of their own prediction, as a baseline for exit heads.

The confidence of an exit is the largest probability of its next-token distribution (CALM's softmax
rule; Schuster et al. 2022, arXiv:2207.07061, section 3.5). It needs no training, but each exit that
a token reaches computes all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, Float, Int
from jexit.model.exits import ExitParam, maps_to_end
from jexit.model.transformer import Transformer, logits_of
from jexit.results import PolicyResult


class ConfidenceHeads(nnx.Module):
    """Exit heads with logits z = log(p / (1 − p)) of the confidence p in place of hazard logits.

    The policy `Threshold(X)` then lets a token leave where p > X. A linear continuation is applied
    before the prediction.
    """

    def __init__(self, model: Transformer) -> None:
        self.norm, self.embed, self.head = model.final_norm, model.embed, model.head
        continuation, maps = model.blocks.continuation, None
        if continuation is not None:
            maps = maps_to_end(continuation, model.exit_layers, model.arch.layers)
        self.map = None if maps is None else ExitParam(maps[0])
        self.shift = None if maps is None else ExitParam(maps[1])

    def __call__(self, h: Float[Array, "*A D"], exit_index: Int[Array, ""]) -> Float[Array, "*A"]:
        """Returns float32 logits z [...] of the confidence of exit `exit_index` for h [..., D]."""
        if self.map is not None and self.shift is not None:
            h = h + (h @ self.map[exit_index] + self.shift[exit_index]).astype(h.dtype)
        head_VD = (self.embed.embedding if self.head is None else self.head.kernel)[...]
        logits = logits_of(self.norm(h), head_VD)
        logprob = jnp.max(jax.nn.log_softmax(logits), axis=-1)
        return logprob - jnp.log(-jnp.expm1(jnp.minimum(logprob, -1e-12)))


def is_confidence(policy: str) -> bool:
    return policy.startswith("confidence:")


def logits_at_exits(result: PolicyResult, exit_layers: Sequence[int]) -> float:
    """Returns the mean number of exits per token at which all logits were computed.

    A token asks each exit up to its depth. The first token of a completion, which the prompt's last
    pass produces, asks none.
    """
    asked = sum(
        count * sum(layer <= int(depth) for layer in exit_layers)
        for depth, count in result.depth_histogram.items()
    )
    return (asked - result.problems * len(exit_layers)) / result.tokens


def confident(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the split model `parts` with `ConfidenceHeads` in place of its exit heads."""
    model: Transformer = nnx.merge(*parts)
    model.exits = ConfidenceHeads(model)
    return nnx.split(model)
