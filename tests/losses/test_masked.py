"""Padding cannot reach a masked sum or its gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from jexit.losses.masked import masked_mean, masked_sum


def test_padding_poisons_neither_value_nor_gradient():
    values = jnp.array([1.0, 3.0, jnp.nan, jnp.inf])
    mask = jnp.array([1.0, 1.0, 0.0, 0.0])
    assert float(masked_sum(values, mask)) == 4.0
    assert float(masked_mean(values, mask)) == 2.0
    np.testing.assert_array_equal(jax.grad(masked_sum)(values, mask), [1.0, 1.0, 0.0, 0.0])


def test_empty_mask_gives_zero():
    assert float(masked_mean(jnp.array([5.0, jnp.nan]), jnp.zeros(2))) == 0.0
