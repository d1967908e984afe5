"""The copy of a model's weights that decoding on CPUs reads, a block a layer."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.model.policies import Full
from jexit.rollout import layers, rollout
from jexit.rollout.layers import Copy, apart, at_layer
from tolerances import LOGITS


@pytest.fixture
def copies(monkeypatch) -> list:
    """A `Copy` of its own for the engine, and a note of each time that it really copies."""
    made = []

    def counted(graphdef, states):
        made.append(graphdef)
        return apart(graphdef, states)

    monkeypatch.setattr(layers, "apart", counted)
    monkeypatch.setattr("jexit.rollout.engine.KEPT", Copy())
    return made


def complete(split: tuple) -> np.ndarray:
    asked = {"policy": Full(), "max_new_tokens": 8, "eos_ids": (), "pad_id": 0, "key": 0}
    return rollout(split, [[5, 9, 2]], temperature=0.0, **asked).tokens_BT


def test_a_layer_by_its_number_gives_what_its_stacked_weights_give(model):
    graphdef, *states = nnx.split(model)
    h_BD = jax.random.normal(jax.random.key(0), (3, model.arch.width))

    def product(block, h_BD):
        return block.mlp(h_BD, adapters=True, dropout_key=None)

    taken = apart(graphdef, tuple(states))
    for layer in range(model.arch.layers):
        number = jnp.int32(layer)
        wanted = at_layer(number, model.blocks, None, product, h_BD)
        made = jax.jit(lambda n: at_layer(n, model.blocks, taken, product, h_BD))(number)
        np.testing.assert_allclose(made, wanted, atol=LOGITS)


def test_weights_are_copied_once_for_many_batches(model, copies):
    split = nnx.split(model)
    first = complete(split)
    np.testing.assert_array_equal(complete(split), first)
    assert len(copies) == 1


def test_new_values_are_copied_anew(model, copies):
    graphdef, state = nnx.split(model)
    before = complete((graphdef, state))
    negated = jax.tree.map(lambda leaf: -leaf, state)
    after = complete((graphdef, negated))
    assert len(copies) == 2
    assert (before != after).any()
    np.testing.assert_array_equal(complete((graphdef, state)), before)


def test_the_copy_goes_with_the_first_of_its_arrays(model):
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.copy(leaf) for leaf in leaves]
    copy = Copy()
    kept = copy.of(graphdef, (jax.tree.unflatten(tree, leaves),))
    assert copy.of(graphdef, (jax.tree.unflatten(tree, leaves),)) is kept
    del leaves[-1]
    gc.collect()
    assert copy._layers == ()
