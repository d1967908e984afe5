"""The random model and the tokens that most tests here run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_model

from jexit.model.transformer import Transformer


@pytest.fixture(scope="session")
def model() -> Transformer:
    return random_model()


@pytest.fixture(scope="session")
def tokens_BT() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 31, (3, 8)))


@pytest.fixture(scope="session")
def depth_BT() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).choice([1, 2, 4, 5], (3, 8)))
