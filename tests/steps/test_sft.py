"""The calibration step against a loss written out with materialised logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import toy

from jexit.config import SFTConfig
from jexit.model.exits import depth_log_prob
from jexit.model.policies import Full, Prescribed
from jexit.steps.sft import make_sft_step


def by_hand(split, trainable, batch, depth_BC, direction):
    """KL and −log P(d), averaged over action positions, from whole log-soft-maxes."""
    student, teacher = split.student(trainable), split.teacher(split.trainable)
    policy = Prescribed(batch.input_depths(depth_BC, toy.LAYERS))
    s, result = toy.whole(student, batch, policy)
    t = jax.lax.stop_gradient(toy.whole(teacher, batch, Full(), adapters=False)[0])
    forward, backward = jnp.sum(jnp.exp(s) * (s - t), -1), jnp.sum(jnp.exp(t) * (t - s), -1)
    kl = {
        "student_teacher": forward,
        "teacher_student": backward,
        "jeffreys": forward + backward,
    }[direction]
    z = batch.window(result.hazard_logits_BTE)
    exit_loss = -depth_log_prob(depth_BC, z, toy.EXITS, toy.LAYERS)
    mask = batch.action_BC / batch.action_BC.sum()
    return jnp.sum(mask * kl), jnp.sum(mask * exit_loss)


def draw(monkeypatch, exits_of):
    """Draws what a function makes of the target hazards [B, C, E], the same for every sample."""
    monkeypatch.setattr(
        "jexit.steps.sft.draw_exit_indices",
        lambda _, leave_BCE, *__, samples, **___: jnp.stack([exits_of(leave_BCE)] * samples),
    )


@pytest.mark.parametrize(
    ("direction", "full", "detached"),
    [
        ("student_teacher", False, True),
        pytest.param("jeffreys", True, False, marks=pytest.mark.slow),
        pytest.param("teacher_student", False, False, marks=pytest.mark.slow),
        pytest.param("student_teacher", True, True, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient(monkeypatch, direction, full, detached):
    """Heads that are detached teach the trunk nothing."""
    split, attached = (toy.make_split(full=full, detached=cut) for cut in (detached, False))
    batch = toy.rows()
    shape = batch.completion_tokens_BC.shape
    exits_BC = jnp.asarray(np.random.default_rng(1).integers(0, 3, size=shape), jnp.int32)
    draw(monkeypatch, lambda _: exits_BC)
    # In full fine-tuning a student that has moved away from its teacher.
    moved = jax.tree.map(lambda x: x * 1.1, split.trainable) if full else split.trainable

    def losses(trainable):
        return by_hand(attached, trainable, batch, exits_BC + 1, direction)

    values = jax.jit(lambda trainable: (losses(trainable), jax.jacrev(losses)(trainable)))
    (kl, exit_loss), (of_kl, of_exit) = values(moved)
    gradient = jax.tree.map(lambda a, b: a + 0.7 * b, of_kl, of_exit)
    if detached:
        gradient = of_kl | {"exits": jax.tree.map(lambda b: 0.7 * b, of_exit["exits"])}
        assert max(float(jnp.abs(b).max()) for b in jax.tree.leaves(of_exit["blocks"])) > 1e-3
    config = SFTConfig(samples=1, direction=direction, exit_coef=0.7)
    step = make_sft_step(split, toy.DESCENT, config)
    student = split._replace(trainable=moved)
    found, metrics = toy.taken_off(step, student, batch, jax.random.key(0))
    assert float(metrics["kl/teacher"]) == pytest.approx(float(kl), rel=1e-4)
    assert float(metrics["loss/exit"]) == pytest.approx(float(exit_loss), rel=1e-4)
    toy.assert_close(found, gradient, rtol=2e-3, atol=2e-5)


SHARPNESS = 3.0


def targets_by_hand(split, batch, target):
    """Target hazards [B, C, E], from passes in which every token leaves at the same exit."""
    student, teacher = split.student(split.trainable), split.teacher(split.trainable)
    last = (student, True) if target == "own" else (teacher, False)
    exits = (teacher, False) if target == "teacher" else (student, True)

    def law(model, adapters, policy):
        return np.float64(toy.whole(model, batch, policy, adapters=adapters)[0])

    t, found = law(*last, Full()), []
    for layer in toy.EXITS:
        e = law(*exits, Prescribed(np.full(batch.tokens_BT.shape, layer)))
        found.append(1 - np.tanh(SHARPNESS * np.sum(np.exp(t) * (t - e), -1) / 2))
    return np.stack(found, -1)


@pytest.mark.parametrize(
    "target",
    ["student", *(pytest.param(name, marks=pytest.mark.slow) for name in ("teacher", "own"))],
)
def test_heads_learn_the_targets_and_depths_are_drawn_from_them(monkeypatch, target):
    """A fifth of the draws is uniform."""
    split, batch = toy.make_split(), toy.rows()
    config = SFTConfig(
        samples=300, explore=0.2, target=target, sharpness=SHARPNESS, exit_loss="expected"
    )
    action_BC = np.asarray(batch.action_BC)
    target_NE = targets_by_hand(split, batch, target)[action_BC]
    assert target_NE.min() < 0.2 and target_NE.max() > 0.8
    first_N, second_N = target_NE.T
    law_NX = np.stack([first_N, (1 - first_N) * second_N, (1 - first_N) * (1 - second_N)], -1)
    _, metrics = toy.taken_off(
        make_sft_step(split, toy.DESCENT, config), split, batch, jax.random.key(0)
    )
    for layer, share in zip((*toy.EXITS, toy.LAYERS), law_NX.mean(0), strict=True):
        wanted = 0.8 * share + 0.2 / 3
        assert float(metrics[f"exit/{layer}"]) == pytest.approx(wanted, abs=0.02), layer

    exits_BC = np.random.default_rng(1).integers(0, 3, size=action_BC.shape)
    draw(monkeypatch, lambda _: jnp.asarray(exits_BC, jnp.int32))
    config = dataclasses.replace(config, samples=1)
    _, metrics = toy.taken_off(
        make_sft_step(split, toy.DESCENT, config), split, batch, jax.random.key(0)
    )
    policy = Prescribed(batch.input_depths(exits_BC + 1, toy.LAYERS))
    _, result = toy.whole(split.student(split.trainable), batch, policy)
    z_NE = np.float64(batch.window(result.hazard_logits_BTE))[action_BC]
    each_NE = target_NE * np.logaddexp(0, -z_NE) + (1 - target_NE) * np.logaddexp(0, z_NE)
    reached_NE = np.arange(2) <= exits_BC[action_BC][:, None]
    truth = np.sum(each_NE * reached_NE) / len(each_NE)
    assert float(metrics["loss/exit"]) == pytest.approx(truth, rel=1e-3)


@pytest.mark.slow
def test_calibration_lowers_the_exit_loss():
    """This model's distributions hardly differ, so the heads have all there is to learn.

    With what draws of the student's depths are expected to cost; that of given depths is above.
    """
    split, batch, optimizer = toy.make_split(), toy.rows(), optax.adam(1e-2)
    config = SFTConfig(samples=2, explore=0.3, target="student", exit_loss="expected")
    step, state = make_sft_step(split, optimizer, config), toy.start(split, optimizer)
    exits = []
    for index in range(40):
        state, metrics = step(state, split.fixed, batch, jax.random.key(index))
        exits.append(float(metrics["loss/exit"]))
    # The exit loss is a cross-entropy: it cannot fall under the entropy of its targets.
    assert np.mean(exits[-10:]) < 0.9 * np.mean(exits[:5])


@pytest.mark.slow
def test_micro_batches_add_up_to_the_whole(monkeypatch):
    """Rows of different lengths, weighted by their tokens; draws made a function of the targets."""
    split, batch = toy.make_split(), toy.rows()
    draw(monkeypatch, lambda leave: (jnp.abs(leave[..., 0]) * 997).astype(jnp.int32) % 3)
    config = SFTConfig(samples=2, target="student")
    (once, metrics_once), (parts, metrics_parts) = (
        toy.taken_off(
            make_sft_step(split, toy.DESCENT, config, micro_batches=count),
            split, batch, jax.random.key(0),
        )
        for count in (1, 4)
    )  # fmt: skip
    toy.assert_close(parts, once, rtol=1e-4, atol=1e-6)
    for name, value in metrics_once.items():
        assert float(metrics_parts[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert len({float(metrics_once[f"exit/{layer}"]) for layer in (1, 2, 3)}) > 1


@pytest.mark.slow
def test_dropout_follows_the_key(monkeypatch):
    """Of a student whose depths are drawn the same."""
    split, batch = toy.make_split(dropout=0.5), toy.rows()
    draw(monkeypatch, lambda leave: jnp.full(leave.shape[:2], 1))
    step = make_sft_step(split, toy.DESCENT, SFTConfig(samples=1))
    once, again, other = (
        toy.taken_off(step, split, batch, jax.random.key(key))[0] for key in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, once, again)
    for found, another in zip(jax.tree.leaves(once), jax.tree.leaves(other), strict=True):
        assert not np.allclose(found, another)
