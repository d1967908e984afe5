"""Training steps on eight devices give one device's losses and parameters."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_model
from steps import toy

from jexit.config import EngineSize, ExitSettings, LoRA, RLConfig, SFTConfig
from jexit.dist import make_mesh, place_parameters, place_rows, use_mesh
from jexit.loops.packing import Lengths, PackedShapes
from jexit.model.policies import Sample
from jexit.rollout import rollout
from jexit.steps.completions import pack_completions, pad_completions
from jexit.steps.exit_heads import ExitStates, make_exit_states, make_lens_step
from jexit.steps.optim import apply_gradients
from jexit.steps.rl import Penalties, RLBatch, make_rl_step
from jexit.steps.sft import make_sft_step
from jexit.steps.state import FixedParams, new_state, split_model
from tolerances import GRADIENT, relative_error

SLOW = pytest.mark.slow
WIDTH = 32
ON_MESHES = pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 2, 2), id="all"),
        pytest.param((8, 1, 1), id="data", marks=SLOW),
        pytest.param((1, 8, 1), id="fsdp", marks=SLOW),
        pytest.param((1, 1, 8), id="tensor, beyond the key heads", marks=SLOW),
    ],
)


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=SLOW)], ids=["lora", "full"]
)
def split(request):
    """As in Qwen3-4B, key/value heads are fewer than the largest tensor axis.

    With adapters, skipped layers are linear.
    """
    model = random_model(
        exit_layers=(1, 2),
        exit_head=ExitSettings(continuation="frozen" if request.param else "linear"),
        lora=None if request.param else LoRA(rank=2, alpha=4.0, targets=("q", "k", "o", "down")),
        vocab_size=48,
        width=WIDTH,
        layers=3,
        query_heads=8,
        kv_heads=4,
        head_dim=8,
        mlp_width=64,
    )
    return split_model(model, full=request.param)


def texts(rows):
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 48, n).tolist() for n in random.integers(2, 7, rows)]
    return prompts, [random.integers(0, 48, n).tolist() for n in random.integers(2, 12, rows)]


def sft_update(split, micro_batches):
    batch = place_rows(pad_completions(*texts(16), 0))
    config = SFTConfig(samples=2, explore=0.3, target="teacher")
    optimizer = optax.adam(1e-2)
    step = make_sft_step(split, optimizer, config, micro_batches=micro_batches)
    return step(toy.start(split, optimizer), split.fixed, batch, jax.random.key(0))


def rl_update(split, micro_batches):
    config = RLConfig(rollouts=4, max_new_tokens=12, kl_loss_coef=0.1, depth_entropy_coef=0.1)
    random = np.random.default_rng(1)
    prompts, _ = texts(4)
    asked, made = [prompts[row // 4] for row in range(16)], texts(16)[1]
    length_J = np.array([len(ids) for ids in made])
    number_J = np.arange(16) // 4
    lengths = Lengths(np.array([len(ids) for ids in asked]), number_J, length_J)
    packed = PackedShapes(8, micro_batches, WIDTH, 20).fit(lengths)
    size = dataclasses.astuple(packed.shape)
    rows = pack_completions(asked, made, 0, row_of=packed.row_of_J, shape=size, prompt_of=number_J)
    arrays = (
        length_J.astype(np.int32),
        random.choice([1, 2, 3], (16, 12)).astype(np.int32),
        -random.random((16, 12)).astype(np.float32),
        -random.random((16, 12)).astype(np.float32),
        random.normal(size=16).astype(np.float32),
        np.zeros(16, bool),
    )
    batch = place_rows(RLBatch(rows, *arrays))
    optimizer = optax.adam(1e-2)
    step = make_rl_step(split, optimizer, config, micro_batches=micro_batches)
    state = toy.start(split, optimizer)
    return step(state, split.fixed, batch, Penalties(0.5, 0.1), jax.random.key(0))


def placed(split):
    return split._replace(
        trainable=place_parameters(split.trainable),
        fixed=FixedParams(*place_parameters(split.fixed)),
    )


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=SLOW), 2])
@ON_MESHES
@pytest.mark.parametrize(
    "update", [pytest.param(sft_update, marks=SLOW), rl_update], ids=["sft", "rl"]
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(split, update, sizes, micro_batches):
    alone, metrics_alone = update(split, micro_batches)
    with use_mesh(make_mesh(*sizes)):
        before = placed(split)
        spread, metrics_spread = update(before, micro_batches)
    for name, value in metrics_alone.items():
        assert float(metrics_spread[name]) == pytest.approx(float(value), rel=2e-4, abs=1e-6), name
    for one, many, old in zip(
        *map(jax.tree.leaves, (alone.trainable, spread.trainable, before.trainable)), strict=True
    ):
        assert relative_error(np.asarray(many), np.asarray(one)) < GRADIENT
        assert len(many.sharding.device_set) == 8
        assert many.sharding.is_equivalent_to(old.sharding, many.ndim)
    if sizes[1] * sizes[2] > 1:
        for tree in (spread.trainable, spread.opt_state):
            assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))


@ON_MESHES
def test_the_heads_on_a_mesh_are_those_on_one_device(split, sizes):
    """What the exits say, stored by position, and a step on some of these positions."""

    def update(split):
        batch = place_rows(pad_completions(*texts(16), 0))
        place_M = np.random.default_rng(2).permutation(batch.action_BC.size).astype(np.int32)
        states = ExitStates.empty(split, batch.action_BC.size - 8)  # the last have no place
        add = make_exit_states(split, 2.0)
        key = jax.random.key(1)
        states = add(states, split.trainable, split.fixed, batch, place_M, key)
        optimizer = optax.adam(1e-2)
        step = make_lens_step(split, optimizer, SFTConfig())
        state = toy.start(split, optimizer)
        return states, step(state, split.fixed, states, np.arange(0, 64, 3))

    kept, (alone, metrics_alone) = update(split)
    with use_mesh(make_mesh(*sizes)):
        spread_states, (spread, metrics_spread) = update(placed(split))
    for one, many in zip(*map(jax.tree.leaves, (kept, spread_states)), strict=True):
        np.testing.assert_allclose(np.asarray(many), np.asarray(one), rtol=1e-3, atol=1e-4)
    for name in ("loss", "kl/exits"):
        assert float(metrics_spread[name]) == pytest.approx(float(metrics_alone[name]), rel=2e-4)
    for one, many in zip(*map(jax.tree.leaves, (alone, spread)), strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            assert relative_error(np.asarray(many), np.asarray(one)) < GRADIENT


@ON_MESHES
def test_all_devices_skip_an_update_that_one_of_them_cannot_take(split, sizes):
    def last_entry_overflows(updates, _):
        *others, last = jax.tree.leaves(updates)
        broken = last.at[(-1,) * last.ndim].set(jnp.inf)
        return jax.tree.unflatten(jax.tree.structure(updates), [*others, broken])

    optimizer = optax.chain(optax.adam(1e-2), optax.stateless(last_entry_overflows))
    with use_mesh(make_mesh(*sizes)):
        before = placed(split).trainable
        update = jax.jit(lambda state, gradients: apply_gradients(state, optimizer, gradients, 1.0))
        after, metrics = update(new_state(before, optimizer), before)
    assert float(metrics["skipped"]) == 1 and np.isfinite(float(metrics["grad_norm"]))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after.trainable), strict=True):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


@SLOW
@pytest.mark.parametrize("count", [8, 7])
@ON_MESHES
def test_rollouts_on_a_mesh_are_those_of_one_device(split, sizes, count):
    """Also with more rows than a shard's pool takes, and prompts that do not divide over shards."""
    prompts, _ = texts(count)

    def roll(split):
        return rollout(
            split.decodable(split.trainable),
            prompts,
            policy=Sample(),
            max_new_tokens=10,
            temperature=0.8,
            eos_ids=[3],
            pad_id=0,
            key=5,
            samples_per_prompt=2,
            size=EngineSize(rows=3, tick_rows=2),
        )

    alone = roll(split)
    with use_mesh(make_mesh(*sizes)):
        spread = roll(placed(split))
    np.testing.assert_array_equal(spread.tokens_BT, alone.tokens_BT)
    np.testing.assert_array_equal(spread.depths_BT, alone.depths_BT)
    np.testing.assert_allclose(spread.logprobs_BT, alone.logprobs_BT, atol=1e-4)


def test_no_weight_is_gathered_whole_by_fsdp(split):
    """A layer at a time: the stack of all layers must not travel at once."""
    with use_mesh(make_mesh(1, 8, 1)):
        ready = placed(split)
        batch = pad_completions(*texts(16), 0)
        optimizer = optax.sgd(1e-2)
        step = make_sft_step(ready, optimizer, SFTConfig(samples=1))
        state = toy.start(ready, optimizer)
        text = step.lower(state, ready.fixed, batch, jax.random.key(0)).compile().as_text()
    stacks = {
        leaf.shape
        for tree in (ready.fixed.frozen, ready.trainable)
        for leaf in jax.tree.leaves(tree["blocks"])
        if leaf.ndim > 2
    }
    found = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    shapes = {tuple(map(int, dims.split(","))) for dims in found}
    assert len(stacks) >= 4 and shapes, "the test has lost sight of weights or collectives"
    assert not stacks & shapes
