"""Exit heads and the depth law: the one place that turns hazards into a distribution of depths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Float, Int
from jexit.model.layers import rms_norm


class ExitParam(nnx.Param):
    """A parameter of an exit head: float32, with its own learning rate."""


class ExitHeads(nnx.Module):
    """The heads of all E exits: z = w2 · relu(W1 · norm(h) + b1) + b2, or linear; float32.

    `norm` is an RMS norm with its own scale, or the identity. The bias b2 starts low so that a
    fresh head almost never leaves. Source: arXiv:2603.21376, exit heads.
    """

    def __init__(
        self,
        exits: int,
        width: int,
        *,
        kind: str = "mlp",
        norm: str = "rms",
        bias: float = -4.0,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.kind, self.norm, self.eps = kind, norm, eps
        self.scale = ExitParam(jnp.ones((exits, width))) if norm == "rms" else None
        hidden = 2 * width if kind == "mlp" else width
        if kind == "mlp":
            init = jax.random.normal(rngs.params(), (exits, width, hidden))
            self.w1 = ExitParam(init * width**-0.5)
            self.b1 = ExitParam(jnp.zeros((exits, hidden)))
        else:
            self.w1 = self.b1 = None
        self.w2 = ExitParam(jax.random.normal(rngs.params(), (exits, hidden)) * 0.1 * hidden**-0.5)
        self.b2 = ExitParam(jnp.full((exits,), bias))

    def __call__(self, h: Float[Array, "*A D"], exit_index: Int[Array, ""]) -> Float[Array, "*A"]:
        """Hazard logits z [...] (float32) of exit `exit_index` on the residuals h [..., D]."""

        def pick(parameter: ExitParam) -> Array:
            return jax.lax.dynamic_index_in_dim(parameter[...], exit_index, 0, keepdims=False)

        x = h.astype(jnp.float32)
        if self.scale is not None:
            x = rms_norm(x, pick(self.scale), self.eps)
        if self.w1 is not None:
            x = jax.nn.relu(x @ pick(self.w1) + pick(self.b1))
        return x @ pick(self.w2) + pick(self.b2)


def log_hazards(
    hazard_logits: Float[Array, "*A E"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    min_hazard: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, "*A E"], Float[Array, "*A E"]]:
    """(log hazard, log(1 − hazard)) with hazard = m + (1 − m)·σ(z / temperature), m = min_hazard.

    The floor m keeps every exit explored; m = 0 and temperature 1 give the plain σ(z). All in log
    space and differentiable everywhere.
    """
    z = hazard_logits.astype(jnp.float32) / temperature
    log_rest = jnp.log1p(-jnp.asarray(min_hazard, jnp.float32))
    log_floor = jnp.log(jnp.asarray(min_hazard, jnp.float32))
    leave = jnp.logaddexp(log_floor, log_rest + jax.nn.log_sigmoid(z))
    return leave, log_rest + jax.nn.log_sigmoid(-z)


def depth_log_law(
    hazard_logits: Float[Array, "*A E"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    min_hazard: Float[Array, ""] | float = 0.0,
) -> Float[Array, "*A E1"]:
    """Log-probability of each exit and, last, of never leaving: [..., E + 1].

    log P(e) = log hazard_e + Σ_{j<e} log(1 − hazard_j);  log P(E) = Σ_j log(1 − hazard_j).
    Teacher targets, student loss, sampler and RL all use this function.
    """
    leave, stay = log_hazards(hazard_logits, temperature=temperature, min_hazard=min_hazard)
    return law_of_log_hazards(leave, stay)


def law_of_log_hazards(
    leave: Float[Array, "*A E"], stay: Float[Array, "*A E"]
) -> Float[Array, "*A E1"]:
    """The depth law from log hazards and log complements, when they do not come from logits."""
    stayed = jnp.cumsum(stay, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(stayed[..., :1]), stayed[..., :-1]], axis=-1)
    return jnp.concatenate([leave + before, stayed[..., -1:]], axis=-1)


def exit_index_of_depth(
    depth: Int[Array, "*A"], exit_layers: tuple[int, ...], layers: int
) -> Int[Array, "*A"]:
    """Exit index e of each depth (E for the full depth); depths must be an exit or `layers`."""
    return jnp.searchsorted(jnp.asarray((*exit_layers, layers)), depth).astype(jnp.int32)


def depth_of_exit_index(
    exit_index: Int[Array, "*A"], exit_layers: tuple[int, ...], layers: int
) -> Int[Array, "*A"]:
    """Depth (layer count) of each exit index; index E is the full depth."""
    return jnp.asarray(np.asarray((*exit_layers, layers), np.int32))[exit_index]


def depth_log_prob(
    depth: Int[Array, "*A"],
    hazard_logits: Float[Array, "*A E"],
    exit_layers: tuple[int, ...],
    layers: int,
    *,
    temperature: Float[Array, ""] | float = 1.0,
    min_hazard: Float[Array, ""] | float = 0.0,
) -> Float[Array, "*A"]:
    """log P(depth) under the depth law of the hazards."""
    law = depth_log_law(hazard_logits, temperature=temperature, min_hazard=min_hazard)
    index = exit_index_of_depth(depth, exit_layers, layers)
    return jnp.take_along_axis(law, index[..., None], axis=-1)[..., 0]


def depth_entropy(log_law: Float[Array, "*A E1"]) -> Float[Array, "*A"]:
    """Entropy of the depth in nats, −Σ P log P, with 0·log 0 = 0."""
    safe = jnp.where(jnp.isfinite(log_law), log_law, 0.0)
    return -jnp.sum(jnp.exp(log_law) * safe, axis=-1)
