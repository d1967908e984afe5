"""NaN and infinity are found wherever they lie."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jexit.io.finite import _PIECE, all_finite, not_finite


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, _PIECE - 1, _PIECE, 2 * _PIECE + 4])
def test_one_entry_is_enough(dtype, value, place):
    array = np.ones(2 * _PIECE + 5, dtype)
    assert all_finite(array)
    array[place] = value
    assert not all_finite(array)


def test_every_shape_is_looked_at():
    assert all_finite(np.zeros((0, 4))) and all_finite(np.float32(3.0).reshape(()))
    assert not all_finite(np.asarray(np.nan)) and all_finite(np.arange(5))
    view = np.ones((3, 5), np.float32).T
    view[4, 2] = np.inf
    assert not all_finite(view)


def test_arrays_on_devices_are_named():
    arrays = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan]), "step": jnp.int32(7)}
    assert not_finite(arrays) == ["b"]
    assert not_finite({}) == []
