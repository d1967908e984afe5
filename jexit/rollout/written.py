"""Prompts that end in the beginning of a completion, whose tokens leave as the policy says."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jexit.axes import Array, Float, Int
from jexit.model.exits import depth_log_prob
from jexit.model.policies import Policy, Sample, law_settings
from jexit.model.transformer import Transformer
from jexit.rollout.state import Work
from jexit.rollout.ticks import Draws, fold_in

DEPTH_DRAW = 1  # of a written token; the number 0 is the draw of the first new one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """How many of each prompt's last tokens are its completion's, and which completion that is.

    A completion's tokens leave as `policy` says wherever they come from. The prompt before them
    runs at full depth, its last position included.
    """

    tokens_B: Int[Array, "B"]
    job_B: Int[Array, "B"]  # of all shards together
    policy: Policy

    @property
    def any_B(self) -> Array:
        """Whether the last position may leave."""
        return self.tokens_B > 0

    def halting(
        self, work: Work, draws: Draws, length_B: Int[Array, "B"], length: int
    ) -> dict[str, Any]:
        """What `jexit.model.transformer.run` is told about prompts of these lengths."""
        place_BT = jnp.arange(length) - (length_B - self.tokens_B)[:, None]
        # Column i of `Prescribed` is for the pass that produces token i of the completion.
        policy = self.policy.of(self.job_B[:, None], jnp.maximum(place_BT + 1, 0))
        keys_B = draws.keys(work, self.job_B, jnp.zeros_like(self.job_B))
        return {"policy": policy, "action_BT": place_BT >= 0, "key": fold_in(keys_B, DEPTH_DRAW)}

    def depth_log_prob(
        self, model: Transformer, depth_B: Int[Array, "B"], z_BE: Float[Array, "B E"]
    ) -> Float[Array, "B"]:
        """Of the last position's depth under the policy's law; 0 where nothing was drawn."""
        if not isinstance(self.policy, Sample):
            return jnp.zeros(depth_B.shape)
        drawn_B = depth_log_prob(
            depth_B, z_BE, model.exit_layers, model.arch.layers, **law_settings(self.policy)
        )
        return jnp.where(self.any_B, drawn_B, 0.0)
