"""Serial depths against figures that were counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jexit
from jexit.config import TINY_CALIBRATED_PATH, ExitSettings
from jexit.dist import make_mesh
from jexit.evaluation.serial_depth import depth_of_passes, opaque_serial_depth, serial_depth
from jexit.tasks import Attempt
from small_runs import ARCHITECTURE, random_model

X = jnp.ones((3, 8))


def depth(function, *inputs):
    return max(serial_depth(jax.make_jaxpr(function)(*inputs).jaxpr))


def looped(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, x)


def test_counts_by_hand():
    w = jnp.ones((8, 5))
    for function, wanted in [
        (lambda x: x.T[:, 1:].reshape(-1), 0),
        (lambda x: jnp.exp(x) * 2 + 1, 3),
        (lambda x: x.sum(), 5),  # 24 numbers
        (lambda x: x.sum(axis=1), 3),
        (lambda x: jnp.cumsum(x, axis=1), 3),
        (lambda x: jnp.argmax(x, axis=1), 3),
        (lambda x: x @ w, 4),  # eight products at once, and their sum
        (lambda x: jax.nn.relu(x @ w) @ w.T, 4 + 1 + 4),  # the sum of five takes three
        (lambda x: jnp.where(x > 0, x, -x), 2),
    ]:
        assert depth(function, X) == wanted
    assert depth(lambda x, y: x + jnp.exp(jnp.exp(y)), X, X) == 3
    assert serial_depth(jax.make_jaxpr(lambda x: (x, x + 1, (x + 1) * 2))(X).jaxpr) == [0, 1, 2]


def test_loops_calls_and_branches():
    def scanned(x):
        return jax.lax.scan(lambda h, _: (jnp.sin(h) * 2, None), x, length=7)[0]

    def branches(x):
        return jax.lax.cond(x.sum() > 0, lambda: jnp.sin(jnp.sin(x)), lambda: x)

    assert depth(scanned, X) == 14
    assert depth(lambda x: jax.jit(jnp.sin)(x) + 1, X) == 2
    assert depth(jax.checkpoint(lambda x: jnp.sin(x) + 1), X) == 2
    assert depth(branches, X) == 5 + 1 + 1  # it has to know which: sum, comparison, its number
    with pytest.raises(NotImplementedError, match="loop of unknown length"):
        depth(looped, X)
    with pytest.raises(NotImplementedError, match="operation custom_linear_solve"):
        depth(lambda x: jax.lax.custom_linear_solve(lambda v: 2 * v, x, lambda _, b: b / 2), X)


def test_a_layer_adds_the_same_depth_each_time():
    model, _ = jexit.load(TINY_CALIBRATED_PATH)
    by_depth = depth_of_passes(model, 64)
    assert list(by_depth) == [1, 2, 3, 4, 6, 8]
    a_layer = by_depth[2] - by_depth[1]
    assert all(by_depth[n] == by_depth[1] + (n - 1) * a_layer for n in by_depth if n < 8)
    # A head has two products and six other operations between norm and choice, where the logits
    # of the last layer need one product.
    assert by_depth[6] + 2 * a_layer - by_depth[8] == (8 + 9 + 6 - 1) - 8
    # Of its matrix products alone: two norms and q, k, scores, values, o, up, down at width 96.
    assert a_layer > 2 * 7 + 7 * 6
    longer = depth_of_passes(model, 128)
    assert 2 <= longer[2] - longer[1] - a_layer <= 3  # maximum, sum, and values of the attention


def test_a_mesh_changes_no_depth():
    model = random_model(ARCHITECTURE, 0.1, exit_layers=(1, 2))
    alone = depth_of_passes(model, 16)
    for axes in ({"data": 2}, {"fsdp": 2}, {"tensor": 2}):
        with jax.set_mesh(make_mesh(**axes)):
            assert depth_of_passes(model, 16) == alone


def test_a_continuation_is_one_map_beside_the_exit_head():
    found = {}
    for kind in ("frozen", "linear"):
        head = ExitSettings(continuation=kind)
        arch = dataclasses.replace(ARCHITECTURE, vocab_size=64)
        model = random_model(arch, 0.1, exit_layers=(1, 2), exit_head=head)
        found[kind] = depth_of_passes(model, 16)
    more = {layers: found["linear"][layers] - found["frozen"][layers] for layers in (1, 2, 3)}
    assert more == {1: 0, 2: 0, 3: 0}  # seven operations, where the head takes ten more


def test_the_mean_is_over_tokens():
    model, _ = jexit.load(TINY_CALIBRATED_PATH)
    by_depth = depth_of_passes(model, 32)
    attempts = [
        Attempt(ids=[1] * len(depths), text="", depths=depths, truncated=False)
        for depths in ([8, 1, 1], [8])
    ]
    made = opaque_serial_depth("sample", model, attempts, 32)
    assert made.mean == pytest.approx((2 * by_depth[8] + 2 * by_depth[1]) / 4)
    assert (made.full, made.by_depth["3"]) == (by_depth[8], by_depth[3])
