"""The heads' phase of calibration: the loss written out, and a trunk that does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import toy

from jexit.config import OptimConfig, SFTConfig
from jexit.model.policies import Full, Prescribed
from jexit.steps.exit_heads import make_exit_states, make_lens_step
from jexit.steps.optim import make_optimizer
from jexit.steps.state import parameter_labels


def states_of(split, batch):
    """(the states of a batch, its positions whose pass could leave)."""
    states = make_exit_states(split)(split.trainable, split.fixed, batch)
    return states, np.flatnonzero(batch.action_BC).astype(np.int32)


def labels_of(split, *, full=False):
    return parameter_labels(split.student(split.trainable), full=full)


def by_hand(split, trainable, batch, sharpness):
    """(KL, cross-entropy) [E], means over action positions, from whole soft-maxes.

    An exit's logits come from a pass in which everybody leaves there.
    """
    student = split.student(trainable)
    t, full = toy.whole(student, batch, Full())
    mask = batch.action_BC / batch.action_BC.sum()
    kls, entropies = [], []
    for exit_index, exit_layer in enumerate(toy.EXITS):
        s, _ = toy.whole(student, batch, Prescribed(np.full(batch.tokens_BT.shape, exit_layer)))
        kl_BC = jnp.sum(jnp.exp(t) * (t - s), -1)
        z_BC = batch.window(full.hazard_logits_BTE)[..., exit_index]
        target = jax.lax.stop_gradient(1.0 - jnp.tanh(sharpness * kl_BC / 2))
        h = jax.nn.sigmoid(z_BC)
        entropies.append(jnp.sum(mask * -(target * jnp.log(h) + (1 - target) * jnp.log(1 - h))))
        kls.append(jnp.sum(mask * kl_BC))
    return jnp.stack(kls), jnp.stack(entropies)


@pytest.mark.parametrize(
    "full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "full"]
)
def test_loss_and_gradient(full):
    split, batch = toy.make_split(full=full, continuation="linear"), toy.rows()

    def loss(trainable):
        kls, entropies = by_hand(split, trainable, batch, 2.0)
        return 0.7 * jnp.mean(entropies), (kls, entropies)

    wanted = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (kls, entropies)), gradient = wanted(split.trainable)
    step = make_lens_step(split, toy.DESCENT, SFTConfig(exit_coef=0.7, sharpness=2.0))
    taken, metrics = toy.taken_off(step, split, *states_of(split, batch))
    for name, truth in (
        ("loss", value),
        ("kl/exits", jnp.mean(kls)),
        ("loss/exit", jnp.mean(entropies)),
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
