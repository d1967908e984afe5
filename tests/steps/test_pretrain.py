"""The pretraining step on parts of different lengths, against the same rows in one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jexit.steps.pretrain import PretrainBatch, make_pretrain_step
from jexit.steps.state import new_state


def batch_of(rows, length, seed):
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(0, 11, (rows, length)).astype(np.int32)
    weight_BT = rng.integers(0, 2, (rows, length)).astype(np.float32)
    return PretrainBatch(tokens_BT, weight_BT, rng.integers(0, 3, (rows, length)).astype(np.int32))


def padded(part, length):
    """With columns that have no weight and no group."""
    return jax.tree.map(lambda leaf: np.pad(leaf, ((0, 0), (0, length - leaf.shape[1]))), part)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_parts_are_as_good_as_one_batch(make_split, micro_batches):
    split = make_split(full=True)
    optimizer = optax.sgd(1.0)
    step = make_pretrain_step(
        split, optimizer, exit_loss=0.3, groups=("one", "two"), micro_batches=micro_batches
    )
    short, long = batch_of(4, 7, seed=0), batch_of(2, 12, seed=1)
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), padded(short, 12), long)

    def update(*parts):
        state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
        state, metrics = step(state, parts, jax.random.key(0))
        return state.trainable, metrics

    made, metrics = update(short, long)
    wanted, known = update(whole)
    assert metrics["tokens"] == 4 * 6 + 2 * 11
    for name in known.keys() - {"tokens"}:
        np.testing.assert_allclose(metrics[name], known[name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), made, wanted)
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), made, split.trainable))
