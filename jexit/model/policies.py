"""Halting policies: the rule by which a token leaves, as data that the model is given.

A policy answers two questions. `start` gives each token's depth before any layer has run (L when it
is decided on the way). `leaves` says, at an exit, which tokens leave now, from the hazard logits.
`of` picks the policy of single tokens while decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jexit.axes import Array, Bool, Float, Int, PRNGKey
from jexit.errors import UserError
from jexit.model.exits import log_hazards


@runtime_checkable
class Policy(Protocol):
    """What the model asks of a halting policy; shapes are [B, T] or [B]."""

    reads_hazards: ClassVar[bool]
    leaves_early: ClassVar[bool]  # False: every token runs all layers

    def start(self, shape: tuple[int, ...], layers: int) -> Int[Array, "*A"]: ...

    def leaves(
        self, hazard_logits: Float[Array, "*A"], key: PRNGKey | None
    ) -> Bool[Array, "*A"]: ...

    def of(self, row_B: Int[Array, "B"], index_B: Int[Array, "B"]) -> Policy: ...


def _policy(cls: type) -> type:
    """Makes a frozen dataclass that is a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


class _NeverOnTheWay:
    """Shared by the policies whose depths are known beforehand."""

    reads_hazards: ClassVar[bool] = False
    leaves_early: ClassVar[bool] = True

    def leaves(self, hazard_logits: Array, key: PRNGKey | None) -> Array:
        return jnp.zeros(hazard_logits.shape, bool)


class _Uniform:
    """Shared by the policies that treat every position alike and decide on the way."""

    reads_hazards: ClassVar[bool] = True
    leaves_early: ClassVar[bool] = True

    def start(self, shape: tuple[int, ...], layers: int) -> Array:
        return jnp.full(shape, layers, jnp.int32)

    def of(self, row_B: Array, index_B: Array) -> Policy:
        return self


@_policy
class Full(_NeverOnTheWay):
    """Every token runs every layer."""

    leaves_early: ClassVar[bool] = False

    def start(self, shape: tuple[int, ...], layers: int) -> Array:
        return jnp.full(shape, layers, jnp.int32)

    def of(self, row_B: Array, index_B: Array) -> Policy:
        return self


@_policy
class Prescribed(_NeverOnTheWay):
    """Each token runs the given number of layers; values outside 1 … L are clipped to it.

    In `forward` one column an input position; in `generate` column i is for the pass that produces
    generated token i, and column 0 is ignored because the last prompt position runs full depth.
    """

    depth_BT: Int[Array, "B T"]

    def start(self, shape: tuple[int, ...], layers: int) -> Array:
        depth = jnp.asarray(self.depth_BT, jnp.int32)
        if depth.shape != shape:
            raise UserError(
                f"Prescribed has depths of shape {depth.shape} for tokens of shape {shape}; give "
                "one depth a token"
            )
        return jnp.clip(depth, 1, layers)

    def of(self, row_B: Array, index_B: Array) -> Prescribed:
        return Prescribed(jnp.asarray(self.depth_BT).at[row_B, index_B].get(mode="clip"))


@_policy
class Sample(_Uniform):
    """Leaves with the probability that the exit's hazard gives, as the depth law has it.

    hazard = min_hazard + (1 − min_hazard)·σ(z / temperature).
    """

    temperature: Float[Array, ""] | float = 1.0
    min_hazard: Float[Array, ""] | float = 0.0

    def leaves(self, hazard_logits: Array, key: PRNGKey | None) -> Array:
        if key is None:
            raise UserError("Sample draws depths at random and needs a PRNG key; pass key=")
        log_leave, _ = log_hazards(
            hazard_logits, temperature=self.temperature, min_hazard=self.min_hazard
        )
        uniform = jax.random.uniform(key, hazard_logits.shape, minval=1e-12)
        return jnp.log(uniform) < log_leave


@_policy
class Threshold(_Uniform):
    """Leaves at the first exit whose hazard σ(z) exceeds `hazard`."""

    hazard: Float[Array, ""] | float = 0.5

    def leaves(self, hazard_logits: Array, key: PRNGKey | None) -> Array:
        return jax.nn.sigmoid(hazard_logits) > self.hazard


@functools.singledispatch
def law_settings(policy: Policy) -> dict[str, Array | float]:
    """Temperature and floor with which the depth law scores what this policy did."""
    return {"temperature": 1.0, "min_hazard": 0.0}


@law_settings.register
def _(policy: Sample) -> dict[str, Array | float]:
    return {"temperature": policy.temperature, "min_hazard": policy.min_hazard}
