"""The heads' phase of calibration: the loss written out, and a trunk that does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jexit
from jexit.config import OptimConfig, SFTConfig
from jexit.model.policies import Full, Prescribed
from jexit.model.transformer import logits_of, run
from jexit.steps.completions import pad_completions
from jexit.steps.lens import make_exit_states, make_lens_step
from jexit.steps.optim import make_optimizer
from jexit.steps.state import new_state, parameter_labels

EXITS, LAYERS = (1, 2), 3


def rows():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 11, size=n).tolist() for n in (3, 5, 1, 4)]
    completions = [rng.integers(0, 11, size=n).tolist() for n in (6, 2, 9, 4)]
    return pad_completions(prompts, completions, 0)


def states_of(split, batch):
    """(the states of a batch, its positions whose pass could leave)."""
    states = make_exit_states(split)(split.trainable, split.fixed, batch)
    return states, np.flatnonzero(batch.action_BC).astype(np.int32)


def update(split, config, batch, optimizer=None, *, steps=1):
    """Steps on every position of a batch at once."""
    optimizer = optimizer or optax.sgd(1.0)
    step = make_lens_step(split, optimizer, config)
    state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
    states, position_V = states_of(split, batch)
    for _ in range(steps):
        state, metrics = step(state, split.fixed, states, position_V)
    return state, metrics


def by_hand(split, trainable, batch, sharpness):
    """(KL, cross-entropy) [E], means over action positions, from whole soft-maxes.

    An exit's logits come from a pass in which everybody leaves there.
    """
    student = split.student(trainable)
    last = run(student, batch.tokens_BT, policy=Full(), **batch.layout)
    t = jax.nn.log_softmax(logits_of(last.hidden_BTD, student.head_VD))
    mask = batch.action_BC / batch.action_BC.sum()
    kls, entropies = [], []
    for exit_index, exit_layer in enumerate(EXITS):
        shape = batch.tokens_BT.shape
        left = run(
            student, batch.tokens_BT, policy=Prescribed(np.full(shape, exit_layer)),
            **batch.layout, hazards=True,
        )  # fmt: skip
        s = jax.nn.log_softmax(logits_of(left.hidden_BTD, student.head_VD))
        kl_BC = batch.window(jnp.sum(jnp.exp(t) * (t - s), -1)[..., None])[..., 0]
        full = run(
            student, batch.tokens_BT, policy=Full(), **batch.layout, hazards=True
        )  # fmt: skip
        z_BC = batch.window(full.hazard_logits_BTE)[..., exit_index]
        target = jax.lax.stop_gradient(1.0 - jnp.tanh(sharpness * kl_BC / 2))
        h = jax.nn.sigmoid(z_BC)
        entropies.append(jnp.sum(mask * -(target * jnp.log(h) + (1 - target) * jnp.log(1 - h))))
        kls.append(jnp.sum(mask * kl_BC))
    return jnp.stack(kls), jnp.stack(entropies)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_loss_and_gradient(make_split, full):
    split, batch = make_split(full=full, continuation="linear"), rows()
    config = SFTConfig(exit_coef=0.7, sharpness=2.0)

    def loss(trainable):
        kls, entropies = by_hand(split, trainable, batch, 2.0)
        return 0.7 * jnp.mean(entropies), (kls, entropies)

    (value, (kls, entropies)), gradient = jax.value_and_grad(loss, has_aux=True)(split.trainable)
    state, metrics = update(split, config, batch)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4)
    assert float(metrics["kl/exits"]) == pytest.approx(float(jnp.mean(kls)), rel=1e-4)
    assert float(metrics["loss/exit"]) == pytest.approx(float(jnp.mean(entropies)), rel=1e-4)
    for index, layer in enumerate(EXITS):
        assert float(metrics[f"kl/exit_{layer}"]) == pytest.approx(float(kls[index]), rel=1e-4)

    labels = parameter_labels(split.student(split.trainable), full=full)
    moved = jax.tree.map(lambda old, new: old - new, split.trainable, state.trainable)

    def compare(label, found, truth):
        if label.startswith("exit"):
            np.testing.assert_allclose(found, truth, atol=1e-4 * (1 + np.abs(truth).max()))
            assert np.any(truth)
        else:
            assert not np.any(found), f"{label} has a gradient"

    jax.tree.map(compare, labels, moved, gradient)


def test_positions_count_as_often_as_they_are_drawn(make_split):
    """A step on some positions is that on a batch of them, whatever else is remembered."""
    split, batch = make_split(continuation="linear"), rows()
    states, position_V = states_of(split, batch)
    drawn_M = np.asarray([*position_V[:5], *position_V[:2], *position_V[7:8]])
    here = jax.tree.map(lambda values: values[drawn_M], states)
    optimizer = optax.sgd(1.0)
    step = make_lens_step(split, optimizer, SFTConfig())
    found, wanted = (
        step(new_state(jax.tree.map(jnp.copy, split.trainable), optimizer), split.fixed, *given)[0]
        for given in ((states, drawn_M), (here, np.arange(len(drawn_M))))
    )
    jax.tree.map(np.testing.assert_array_equal, found.trainable, wanted.trainable)


def test_all_but_the_heads_stays_bit_for_bit(make_split):
    split, batch = make_split(continuation="linear"), rows()
    labels = parameter_labels(split.student(split.trainable), full=False)
    optim = OptimConfig(lora_lr=0.0, full_lr=0.0, exit_lr=1e-2)
    state, first = update(split, SFTConfig(), batch, make_optimizer(optim, 30, labels))
    state, last = update(split, SFTConfig(), batch, make_optimizer(optim, 30, labels), steps=30)
    assert float(last["loss/exit"]) < 0.8 * float(first["loss/exit"])
    for depth in (1, LAYERS):
        policy = jexit.Prescribed(np.full(batch.tokens_BT.shape, depth))
        before, after = (
            jexit.forward(split.student(trainable), batch.tokens_BT, policy=policy).logits_BTV
            for trainable in (split.trainable, state.trainable)
        )
        assert np.array_equal(before, after), depth


def test_hidden_layers_of_the_heads_learn_at_their_share_of_the_rate(make_split):
    split, batch = make_split(), rows()
    labels = parameter_labels(split.student(split.trainable), full=False)

    def moved(share):
        optim = OptimConfig(lora_lr=0.0, exit_lr=1e-2, exit_hidden=share)
        state, _ = update(split, SFTConfig(), batch, make_optimizer(optim, 10, labels))
        return jax.tree.map(jnp.subtract, state.trainable["exits"], split.trainable["exits"])

    whole, half, none = (moved(share) for share in (1.0, 0.5, 0.0))
    for name, change in whole.items():
        share = 1.0 if name in ("w2", "b2") else 0.5
        np.testing.assert_allclose(half[name], share * change, rtol=1e-3, atol=1e-6)
        assert jnp.any(change) and bool(jnp.any(none[name])) == (name in ("w2", "b2")), name
