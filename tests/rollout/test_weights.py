"""The copy of a model's weights that decoding on CPUs reads, a block a layer."""

import concurrent.futures
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.model.policies import Full
from jexit.rollout import rollout, weights
from jexit.rollout.weights import Copy, apart


@pytest.fixture
def copies(monkeypatch) -> list:
    """A `Copy` of its own for the engine, and a note of each time that it really copies."""
    made = []

    def counted(graphdef, states):
        made.append(graphdef)
        return apart(graphdef, states)

    monkeypatch.setattr(weights, "apart", counted)
    monkeypatch.setattr("jexit.rollout.engine.KEPT", Copy())
    return made


def complete(split: tuple) -> np.ndarray:
    asked = {"policy": Full(), "max_new_tokens": 8, "eos_ids": (), "pad_id": 0, "key": 0}
    return rollout(split, [[5, 9, 2]], temperature=0.0, **asked).tokens_BT


def test_weights_are_copied_once_for_many_batches_and_anew_for_new_values(model, copies):
    graphdef, state = nnx.split(model)
    before = complete((graphdef, state))
    np.testing.assert_array_equal(complete((graphdef, state)), before)
    assert len(copies) == 1
    after = complete((graphdef, jax.tree.map(lambda leaf: -leaf, state)))
    assert len(copies) == 2 and (before != after).any()
    np.testing.assert_array_equal(complete((graphdef, state)), before)
    # Arrays that can change in place are not kept.
    state = jax.tree.map(lambda leaf: np.array(leaf), state)
    np.testing.assert_array_equal(complete((graphdef, state)), before)
    jax.tree.map(lambda leaf: np.negative(leaf, out=leaf), state)
    np.testing.assert_array_equal(complete((graphdef, state)), after)


def test_the_copy_goes_with_the_first_of_its_arrays(model):
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.copy(leaf) for leaf in leaves]
    copy = Copy()
    kept = copy.of(graphdef, (jax.tree.unflatten(tree, leaves),))
    assert copy.of(graphdef, (jax.tree.unflatten(tree, leaves),)) is kept
    del leaves[-1]
    gc.collect()
    assert copy._kept is None


def test_two_threads_with_two_models_each_get_their_own(model, monkeypatch):
    """Even when one is interrupted between copying and keeping."""
    graphdef, state = nnx.split(model)
    negated = jax.tree.map(lambda leaf: -leaf, state)
    copy = Copy()
    wanted = [apart(graphdef, (each,)) for each in (state, negated)]

    def slow(graphdef, states):
        made = apart(graphdef, states)
        time.sleep(0.2)
        return made

    monkeypatch.setattr(weights, "apart", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda each: copy.of(graphdef, (each,)), (state, negated)))
    made += [copy.of(graphdef, (each,)) for each in (state, negated)]
    for found, known in zip(made, wanted * 2, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found[0][1], known[0][1])
