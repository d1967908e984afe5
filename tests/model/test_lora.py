"""Adapters against the dense weights that they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import random_model

import jexit
from jexit.config import PROJECTIONS, LoRA
from jexit.model.exits import ExitParam
from jexit.model.lora import LoRAParam, StackedLinear, merge_adapters
from jexit.model.transformer import run
from tolerances import LOGITS

ALL = LoRA(rank=3, alpha=5.0, dropout=0.4, targets=PROJECTIONS)


def small_model(family="qwen3", **options):
    return random_model(family, layers=3, exit_layers=(1, 2), **options)


@pytest.fixture(scope="module", params=[pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
def adapted(request):
    return small_model(request.param, lora=ALL)


@pytest.fixture
def bare(adapted):
    """The same base weights and heads in a model that has no adapters."""
    return small_model(adapted.arch.family)


def projections(model):
    attention, mlp = model.blocks.attn, model.blocks.mlp
    for name in PROJECTIONS:
        yield name, getattr(attention, name, None) or getattr(mlp, name)


def test_fresh_adapters_change_nothing_but_learn():
    """Of A and B only B starts at zero; and only the named projections have them."""
    rngs = nnx.Rngs(0)
    linear = StackedLinear(2, (8,), (4,), lora=ALL, dtype=jnp.float32, rngs=rngs)
    assert not linear.lora_b[...].any() and linear.lora_a[...].all()
    for target in PROJECTIONS:
        model = small_model(lora=dataclasses.replace(ALL, targets=(target,)))
        have = {name for name, linear in projections(model) if linear.lora_a is not None}
        assert have == {target}


def test_without_adapters_it_is_the_teacher_exactly(adapted, bare, tokens_BT):
    teacher = jexit.forward(adapted, tokens_BT, adapters=False)
    base = jexit.forward(bare, tokens_BT)
    np.testing.assert_array_equal(teacher.logits_BTV, base.logits_BTV)
    student = jexit.forward(adapted, tokens_BT)
    assert np.abs(student.logits_BTV - teacher.logits_BTV).max() > 0.1


def test_adapters_equal_dense_weights_with_the_product_folded_in(adapted, bare, tokens_BT):
    """As `merge_adapters` folds it."""
    merged = small_model(adapted.arch.family, lora=ALL)
    merge_adapters(merged)
    assert merged.lora is None
    assert not any(isinstance(leaf, LoRAParam) for _, leaf in nnx.to_flat_state(nnx.state(merged)))
    for (name, linear), (_, dense) in zip(projections(adapted), projections(bare), strict=True):
        a_LIR = np.asarray(linear.lora_a[...], np.float64).reshape(3, -1, 3)
        b_LRO = np.asarray(linear.lora_b[...], np.float64).reshape(3, 3, -1)
        update = (5.0 / 3.0 * a_LIR @ b_LRO).reshape(linear.kernel.shape)
        assert np.abs(update).max() > 0.01, name
        dense.kernel[...] = jnp.asarray(np.asarray(linear.kernel[...]) + update, jnp.float32)
        folded = dict(projections(merged))[name].kernel[...]
        np.testing.assert_allclose(folded, dense.kernel[...], rtol=1e-5, atol=1e-5)
    depth_BT = np.random.default_rng(1).choice([*bare.exit_layers, 3], tokens_BT.shape)
    policy = jexit.Prescribed(depth_BT)
    found = jexit.forward(adapted, tokens_BT, policy=policy)
    truth = jexit.forward(bare, tokens_BT, policy=policy)
    np.testing.assert_allclose(found.logits_BTV, truth.logits_BTV, atol=LOGITS)
    np.testing.assert_allclose(found.hazard_logits_BTE, truth.hazard_logits_BTE, atol=LOGITS)


def test_dropout_acts_in_training_only(tokens_BT):
    graphdef, state = nnx.split(small_model(lora=ALL))

    @functools.partial(jax.jit, static_argnames="adapters")
    def hidden(key=None, adapters=True):
        model = nnx.merge(graphdef, state)
        return run(model, tokens_BT, dropout_key=key, adapters=adapters).hidden_BTD

    quiet = hidden()
    np.testing.assert_array_equal(quiet, hidden())
    first, second = hidden(jax.random.key(0)), hidden(jax.random.key(1))
    assert np.abs(first - quiet).max() > 0.05 and np.abs(first - second).max() > 0.05
    np.testing.assert_array_equal(first, hidden(jax.random.key(0)))
    # The teacher has no adapters, hence no dropout.
    np.testing.assert_array_equal(hidden(jax.random.key(0), adapters=False), hidden(adapters=False))


def test_dropout_is_unbiased_and_spares_the_base_projection():
    linear = StackedLinear(1, (8,), (4,), lora=ALL, dtype=jnp.float32, rngs=nnx.Rngs(0))
    linear.lora_b[...] = jax.random.normal(jax.random.key(1), linear.lora_b.shape)
    graphdef, state = nnx.split(linear)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))
    x = jax.random.normal(jax.random.key(2), (8,))
    keys = jax.random.split(jax.random.key(3), 20_000)
    dropped = np.asarray(jax.vmap(lambda key: layer(x, dropout_key=key))(keys))
    spread = dropped.std(0)
    assert (spread > 0.1).all()
    error = np.abs(dropped.mean(0) - np.asarray(layer(x)))
    assert (error < 4.5 * spread / np.sqrt(len(keys))).all()
    # Of the eight inputs a share of 0.4 is dropped: 0.6⁸ of the draws drop none.
    scale = ALL.scale * np.asarray(layer.lora_b[...]).T @ np.asarray(layer.lora_a[...]).T / 0.6
    none_dropped = np.asarray(layer(x, adapters=False)) + scale @ np.asarray(x)
    share = (np.abs(dropped - none_dropped).max(-1) < 1e-4).mean()
    assert abs(share - 0.6**8) < 0.004


def test_adapters_and_heads_are_float32_over_bfloat16_weights(tokens_BT):
    model = small_model(lora=ALL, dtype=jnp.bfloat16)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        trained = isinstance(leaf, LoRAParam | ExitParam)
        assert leaf[...].dtype == (jnp.float32 if trained else jnp.bfloat16)
    out = jexit.forward(model, tokens_BT)
    assert out.logits_BTV.dtype == out.hazard_logits_BTE.dtype == jnp.float32
    # The residual entering the exit is bfloat16, what the head makes of it is not rounded to that.
    z = np.asarray(out.hazard_logits_BTE)
    assert (z != np.asarray(z.astype(jnp.bfloat16), np.float32)).mean() > 0.9


def test_a_transposed_kernel_projects_the_same():
    for inputs, outputs in (((6,), (4, 3)), ((4, 3), (6,))):
        linear = StackedLinear(
            2, inputs, outputs, use_bias=True, lora=LoRA(rank=2, alpha=3.0), dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        state = jax.tree.map(lambda leaf: leaf[1] + 0.1, nnx.state(linear))
        one, transposed = (nnx.merge(nnx.graphdef(linear), state) for _ in range(2))
        transposed.transpose()
        assert transposed.kernel.shape == (*outputs, *inputs)
        x = jax.random.normal(jax.random.key(1), (5, 1, *inputs))
        np.testing.assert_allclose(transposed(x), one(x), rtol=1e-6, atol=1e-6)
