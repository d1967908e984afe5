"""NaN and infinity are found wherever they lie."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jexit.io.finite import _PIECE, all_finite, not_finite


def test_one_entry_is_enough_in_every_shape():
    dtypes = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
    places = (0, _PIECE - 1, _PIECE, 2 * _PIECE + 4)
    for dtype, value, place in itertools.product(dtypes, (np.nan, np.inf, -np.inf), places):
        array = np.ones(2 * _PIECE + 5, dtype)
        assert all_finite(array)
        array[place] = value
        assert not all_finite(array), (dtype, value, place)
    assert all_finite(np.zeros((0, 4))) and all_finite(np.float32(3.0).reshape(()))
    assert not all_finite(np.asarray(np.nan)) and all_finite(np.arange(5))
    view = np.ones((3, 5), np.float32).T
    view[4, 2] = np.inf
    assert not all_finite(view)
    arrays = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan]), "step": jnp.int32(7)}
    assert not_finite(arrays) == ["b"] and not_finite({}) == []
