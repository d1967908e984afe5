"""The copy of a model's weights that decoding on CPUs reads, a block a layer."""

import concurrent.futures
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.model.lora import LoRAParam
from jexit.model.policies import Full
from jexit.rollout import rollout, weights
from jexit.rollout.weights import Copy, apart


@pytest.fixture
def copies(monkeypatch) -> list:
    """A `Copy` of its own for the engine, and a note of each time that it really copies."""
    made = []

    def counted(graphdef, states, **settings):
        made.append(graphdef)
        return apart(graphdef, states, **settings)

    monkeypatch.setattr(weights, "apart", counted)
    monkeypatch.setattr("jexit.rollout.engine.KEPT", Copy())
    return made


def complete(split: tuple, **settings) -> np.ndarray:
    asked = {"policy": Full(), "max_new_tokens": 8, "eos_ids": (), "pad_id": 0, "key": 0}
    return rollout(split, [[5, 9, 2]], temperature=0.0, **asked, **settings).tokens_BT


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


def test_the_teacher_and_the_student_have_copies_of_their_own(model, copies):
    split, texts = nnx.split(model), []
    for adapters in (True, False, True):
        texts.append(complete(split, adapters=adapters))
    assert len(copies) == 3
    np.testing.assert_array_equal(texts[0], texts[2])
    assert (texts[0] != texts[1]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_into_float32_kernels(model, dtype):
    """The other precisions would round the adapters away, and the teacher has none."""

    def cast(leaf):
        return leaf if isinstance(leaf, LoRAParam) else leaf.replace(leaf[...].astype(dtype))

    def layer(graphdef, state, adapters):
        made = nnx.merge(*apart(graphdef, (state,), adapters=adapters)[2])
        return made.mlp.down, made.attn.k

    graphdef, state = nnx.split(model)
    state = jax.tree.map(cast, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    base, k = layer(graphdef, state, adapters=False)
    student, student_k = layer(graphdef, state, adapters=True)
    merged = base.lora_scale * jnp.tensordot(base.lora_a[...], base.lora_b[...], 1)
    np.testing.assert_array_equal(student_k.kernel[...], k.kernel[...])
    if dtype == "float32":
        assert student.lora_a is None
        np.testing.assert_allclose(student.kernel[...] - base.kernel[...], merged.T, atol=1e-6)
        assert np.abs(merged).max() > 0.01
    else:
        np.testing.assert_array_equal(student.kernel[...], base.kernel[...])
        np.testing.assert_array_equal(student.lora_a[...], base.lora_a[...])


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

    def slow(graphdef, states, **settings):
        made = apart(graphdef, states, **settings)
        time.sleep(0.2)
        return made

    monkeypatch.setattr(weights, "apart", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda each: copy.of(graphdef, (each,)), (state, negated)))
    made += [copy.of(graphdef, (each,)) for each in (state, negated)]
    for found, known in zip(made, wanted * 2, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found[0][1], known[0][1])
