"""Sums and means over masked positions that padding cannot poison."""

from __future__ import annotations

import jax.numpy as jnp

from jexit.axes import Array, Float


def masked_sum(values: Float[Array, "*A"], mask: Array, axis: int | None = None) -> Array:
    """Σ values · mask; a NaN or infinity where the mask is 0 contributes nothing."""
    return jnp.sum(jnp.where(mask != 0, values * mask, 0.0), axis=axis)


def masked_mean(values: Float[Array, "*A"], mask: Array, axis: int | None = None) -> Array:
    """Σ values · mask / Σ mask, and 0 where the mask is empty."""
    weight = jnp.sum(mask, axis=axis)
    return masked_sum(values, mask, axis) / jnp.maximum(weight, 1e-9)
