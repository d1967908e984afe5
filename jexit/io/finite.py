"""Checks for NaN and infinity in weights, when they are read and when they are written."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array

_PIECE = 1 << 18  # entries per check, so that no second array of the full size is made


def all_finite(array: np.ndarray) -> bool:
    """Returns whether `array` contains neither NaN nor infinity."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[at : at + _PIECE]).all() for at in range(0, flat.size, _PIECE))


def not_finite(named: Mapping[str, jax.Array]) -> list[str]:
    """Returns the names of the arrays in `named` that contain NaN or infinity."""
    finite = jax.device_get(_finite(dict(named)))
    return [name for name in named if not finite[name]]


@jax.jit
def _finite(named: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), named)
