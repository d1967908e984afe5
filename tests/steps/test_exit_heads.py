"""The heads' phase of calibration: the loss written out, and a trunk that does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import toy

from jexit.config import OptimConfig, SFTConfig
from jexit.losses.sft import draw_exit_indices, target_log_hazards
from jexit.model.policies import Full, Prescribed
from jexit.steps.exit_heads import ExitStates, make_exit_states, make_lens_step
from jexit.steps.optim import make_optimizer
from jexit.steps.state import parameter_labels

KEY = jax.random.key(5)


def states_of(split, batch):
    """(the states of a batch, its positions whose pass could leave)."""
    place_M = np.arange(batch.action_BC.size, dtype=np.int32)
    states = stored(split, batch, ExitStates.empty(split, place_M.size), place_M)
    return states, np.flatnonzero(batch.action_BC).astype(np.int32)


def stored(split, batch, states, place_M):
    add = make_exit_states(split, 2.0)
    return add(states, split.trainable, split.fixed, batch, place_M, KEY)


def labels_of(split, *, full=False):
    return parameter_labels(split.student(split.trainable), full=full)


def full_depth_kl(student, batch):
    """KL(last layer ‖ exit) [B, C, E] at full depth; everybody leaves at an exit in its pass."""
    t, _ = toy.whole(student, batch, Full())
    said = [
        toy.whole(student, batch, Prescribed(np.full(batch.tokens_BT.shape, layer)))[0]
        for layer in toy.EXITS
    ]
    return jnp.stack([jnp.sum(jnp.exp(t) * (t - s), -1) for s in said], axis=-1)


def drawn(split, batch):
    """[B, C]: which half of the positions runs all layers first, and the others' depths."""
    half_key, depth_key = jax.random.split(KEY)
    hazards = target_log_hazards(full_depth_kl(split.student(split.trainable), batch), 2.0)
    exits_BC = draw_exit_indices(depth_key, *hazards, samples=1, explore=0.0)[0]
    depth_BC = np.asarray([*toy.EXITS, toy.LAYERS])[exits_BC]
    half_BC = np.asarray(jax.random.bernoulli(half_key, 0.5, depth_BC.shape))
    for part_BC in (half_BC, ~half_BC):
        assert (depth_BC < toy.LAYERS)[batch.action_BC & part_BC].any()
    return half_BC, depth_BC


def by_hand(split, trainable, batch, half_BC, drawn_BC):
    """(KL, hazard logits) [B, C, E], one position at a time, from whole soft-maxes.

    A position runs all layers, or leaves at an exit; of the others, those in its half run all
    layers, and the rest have the depths that are drawn.
    """
    student, layers = split.student(trainable), toy.LAYERS
    kls, logits = [], []
    for c in range(drawn_BC.shape[1]):
        stays_BC = half_BC == half_BC[:, c : c + 1]
        found = []
        for depth in (layers, *toy.EXITS):
            depth_BC = jnp.where(stays_BC, layers, drawn_BC).at[:, c].set(depth)
            policy = Prescribed(batch.input_depths(depth_BC, layers))
            found.append(toy.whole(student, batch, policy))
        t, *said = (log_BCV[:, c] for log_BCV, _ in found)
        kls.append(jnp.stack([jnp.sum(jnp.exp(t) * (t - s), -1) for s in said], axis=-1))
        logits.append(batch.window(found[0][1].hazard_logits_BTE)[:, c])
    return jnp.stack(kls, axis=1), jnp.stack(logits, axis=1)


def test_states_are_those_of_a_position_that_stays_among_others_that_left():
    split, batch = toy.make_split(continuation="linear"), toy.rows()
    depths = drawn(split, batch)
    kl_BCE, z_BCE = jax.jit(lambda params: by_hand(split, params, batch, *depths))(split.trainable)
    states, position_V = states_of(split, batch)
    heads = split.student(split.trainable).exits
    for e in range(len(toy.EXITS)):
        z_N = heads(states.residual_NED[:, e], jnp.int32(e))
        np.testing.assert_allclose(
            z_N[position_V], z_BCE[..., e].reshape(-1)[position_V], rtol=1e-4, atol=1e-4
        )
    truth_VE = kl_BCE.reshape(-1, len(toy.EXITS))[position_V]
    np.testing.assert_allclose(states.kl_NE[position_V], truth_VE, rtol=1e-3, atol=1e-5)
    alone_BCE = full_depth_kl(split.student(split.trainable), batch)
    alone_VE = alone_BCE.reshape(-1, len(toy.EXITS))[position_V]
    assert np.abs(alone_VE - truth_VE).max() > 0.01  # the others' depths matter


def test_states_take_their_places_and_leave_others_alone():
    split, batch = toy.make_split(continuation="linear"), toy.rows()
    whole, position_V = states_of(split, batch)
    kept = jax.tree.map(lambda values: values[:8] + 7.0, whole)
    before = jax.tree.map(np.array, kept)
    place_M = np.full(batch.action_BC.size, 8, np.int32)
    place_M[position_V[:3]] = [5, 2, 6]
    found = stored(split, batch, kept, place_M)
    for values, old, new in zip(*map(jax.tree.leaves, (found, before, whole)), strict=True):
        wanted = np.array(old)
        wanted[[5, 2, 6]] = new[position_V[:3]]
        np.testing.assert_allclose(values, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "full"]
)
def test_loss_and_gradient(full):
    split = toy.make_split(full=full, continuation="linear")
    states, position_V = states_of(split, toy.rows())
    residual_VED, kl_VE = states.residual_NED[position_V], states.kl_NE[position_V]

    def loss(trainable):
        heads = split.student(trainable).exits
        z_VE = jnp.stack([heads(residual_VED[:, e], jnp.int32(e)) for e in range(2)], axis=1)
        h_VE = jax.nn.sigmoid(z_VE)
        costs = -(jnp.log(h_VE) + jnp.minimum(kl_VE, 2.0) / 0.1 * jnp.log(1 - h_VE)).mean(0)
        return jnp.mean(costs), (kl_VE.mean(0), costs)

    wanted = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (kls, costs)), gradient = wanted(split.trainable)
    step = make_lens_step(split, toy.DESCENT, SFTConfig(kl_tolerance=0.1))
    taken, metrics = toy.taken_off(step, split, states, position_V)
    for name, truth in (
        ("loss", value),
        ("kl/exits", jnp.mean(kls)),
        ("loss/exit", jnp.mean(costs)),
        *((f"kl/exit_{layer}", kls[index]) for index, layer in enumerate(toy.EXITS)),
    ):
        assert float(metrics[name]) == pytest.approx(float(truth), rel=1e-4), name

    def compare(label, found, truth):
        if label.startswith("exit"):
            np.testing.assert_allclose(found, truth, atol=1e-4 * (1 + np.abs(truth).max()))
            assert np.any(truth)
        else:
            assert not np.any(found), f"{label} has a gradient"

    jax.tree.map(compare, labels_of(split, full=full), taken, gradient)


def test_positions_count_as_often_as_they_are_drawn():
    """A step on some positions is that on a batch of them, whatever else is remembered."""
    split = toy.make_split(continuation="linear")
    states, position_V = states_of(split, toy.rows())
    drawn_M = np.asarray([*position_V[:5], *position_V[:2], *position_V[7:8]])
    here = jax.tree.map(lambda values: values[drawn_M], states)
    step = make_lens_step(split, toy.DESCENT, SFTConfig())
    found, wanted = (
        toy.taken_off(step, split, *given)[0]
        for given in ((states, drawn_M), (here, np.arange(len(drawn_M))))
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_heads_learn_at_their_rates_and_nothing_else_moves():
    """Hidden layers of the heads learn at a share of the output weights' rate, biases at theirs."""
    split = toy.make_split(continuation="linear")
    given = states_of(split, toy.rows())

    def learned(share, steps, bias=1.0):
        """What the first step moves, what all do, and the losses."""
        optim = OptimConfig(
            lora_lr=0.0, full_lr=0.0, exit_lr=1e-2, exit_hidden=share, exit_bias=bias
        )
        optimizer = make_optimizer(optim, 30, labels_of(split))
        step, state = make_lens_step(split, optimizer, SFTConfig()), toy.start(split, optimizer)
        moved, losses = [], []
        for _ in range(steps):
            state, metrics = step(state, split.fixed, *given)
            losses.append(float(metrics["loss/exit"]))
            moved.append(jax.tree.map(jnp.subtract, state.trainable, split.trainable))
        return moved[0]["exits"], moved[-1], losses

    whole, moved, losses = learned(1.0, 30)
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(
        lambda label, change: label.startswith("exit") or np.testing.assert_array_equal(change, 0),
        labels_of(split),
        moved,
    )
    half, *_ = learned(0.5, 1, bias=3.0)
    for name, change in whole.items():
        share = {"w2": 1.0, "b2": 3.0}.get(name, 0.5)
        np.testing.assert_allclose(half[name], share * change, rtol=1e-3, atol=1e-6)
        assert jnp.any(change), name
