"""Early exits by the confidence of the exit's own prediction, a baseline for trained exit heads.

The confidence of an exit is the largest probability of its next-token distribution (CALM's softmax
rule; Schuster et al. 2022, arXiv:2207.07061, section 3.5). The rule needs no training, but it
computes the full logits at every exit that a token reaches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jexit.axes import Array, Float, Int
from jexit.model.exits import ExitParam, maps_to_end
from jexit.model.transformer import Transformer, logits_of


class ConfidenceHeads(nnx.Module):
    """Exit heads that return the logit of the exit's confidence instead of a hazard logit.

    With z = log(p / (1 − p)) for the confidence p, a token leaves under `Threshold(X)` where p > X.
    A linear continuation, if the model has one, is applied before the prediction.
    """

    def __init__(self, model: Transformer) -> None:
        self.norm, self.embed, self.head = model.final_norm, model.embed, model.head
        continuation, maps = model.blocks.continuation, None
        if continuation is not None:
            maps = maps_to_end(continuation, model.exit_layers, model.arch.layers)
        self.map = None if maps is None else ExitParam(maps[0])
        self.shift = None if maps is None else ExitParam(maps[1])

    def __call__(self, h: Float[Array, "*A D"], exit_index: Int[Array, ""]) -> Float[Array, "*A"]:
        """Returns float32 logits [...] of the confidence at one exit, for residuals h [..., D].

        `exit_index` is the index of the exit in the model's `exit_layers`.
        """
        if self.map is not None and self.shift is not None:
            h = h + (h @ self.map[exit_index] + self.shift[exit_index]).astype(h.dtype)
        head_VD = (self.embed.embedding if self.head is None else self.head.kernel)[...]
        logits = logits_of(self.norm(h), head_VD)
        logprob = jnp.max(jax.nn.log_softmax(logits), axis=-1)
        return logprob - jnp.log(-jnp.expm1(jnp.minimum(logprob, -1e-12)))


def is_confidence(policy: str) -> bool:
    return policy.startswith("confidence:")


def confident(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the model `parts`, with its exit heads replaced by `ConfidenceHeads`.

    Argument and result are models as `nnx.split` returns them: (graphdef, *states).
    """
    model: Transformer = nnx.merge(*parts)
    model.exits = ConfidenceHeads(model)
    return nnx.split(model)
