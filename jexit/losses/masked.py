"""Sums and means over masked positions; NaN and infinity at positions with mask 0 are ignored."""

from __future__ import annotations

import jax.numpy as jnp

from jexit.axes import Array, Float


def masked_sum(values: Float[Array, "*A"], mask: Array, axis: int | None = None) -> Array:
    """Returns Σ values · mask over `axis` (None: all axes)."""
    return jnp.sum(jnp.where(mask != 0, values * mask, 0.0), axis=axis)


def masked_mean(values: Float[Array, "*A"], mask: Array, axis: int | None = None) -> Array:
    """Returns Σ values · mask / Σ mask over `axis` (None: all axes), or 0 where Σ mask is 0."""
    weight = jnp.sum(mask, axis=axis)
    return masked_sum(values, mask, axis) / jnp.maximum(weight, 1e-9)
