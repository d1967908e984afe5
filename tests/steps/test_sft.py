"""The calibration step against a loss written out with materialised logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jexit.config import SFTConfig
from jexit.model.exits import depth_log_prob
from jexit.model.policies import Full, Prescribed
from jexit.model.transformer import logits_of, run
from jexit.steps.completions import pad_completions
from jexit.steps.sft import make_sft_step
from jexit.steps.state import new_state


def rows():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 11, size=n).tolist() for n in (3, 5, 1, 4)]
    completions = [rng.integers(0, 11, size=n).tolist() for n in (6, 2, 9, 4)]
    return pad_completions(prompts, completions, 0)


def update(split, config, batch, *, micro_batches=1, key=0):
    optimizer = optax.sgd(1.0)
    step = make_sft_step(split, optimizer, config, micro_batches=micro_batches)
    state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
    return step(state, split.fixed, batch, jax.random.key(key))


def by_hand(split, trainable, batch, depth_BC, direction):
    """KL and −log P(d), averaged over action positions, from whole log-soft-maxes."""
    student, teacher = split.student(trainable), split.teacher(split.trainable)
    result = run(
        student,
        batch.tokens_BT,
        policy=Prescribed(batch.input_depths(depth_BC, 3)),
        **batch.layout,
        hazards=True,
    )
    taught = run(teacher, batch.tokens_BT, policy=Full(), **batch.layout, adapters=False)
    s = jax.nn.log_softmax(logits_of(result.hidden_BTD, student.head_VD))
    t = jax.lax.stop_gradient(jax.nn.log_softmax(logits_of(taught.hidden_BTD, teacher.head_VD)))
    forward, backward = jnp.sum(jnp.exp(s) * (s - t), -1), jnp.sum(jnp.exp(t) * (t - s), -1)
    kl = {
        "student_teacher": forward,
        "teacher_student": backward,
        "jeffreys": forward + backward,
    }[direction]
    z = batch.window(result.hazard_logits_BTE)
    exit_loss = -depth_log_prob(depth_BC, z, (1, 2), 3)
    mask = batch.action_BC / batch.action_BC.sum()
    return jnp.sum(mask * batch.window(kl[..., None])[..., 0]), jnp.sum(mask * exit_loss)


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student", "jeffreys"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_loss_and_gradient(make_split, monkeypatch, direction, full):
    split, batch = make_split(full=full), rows()
    shape = batch.completion_tokens_BC.shape
    depth_BC = jnp.asarray(np.random.default_rng(1).choice([1, 2, 3], size=shape), jnp.int32)
    monkeypatch.setattr(
        "jexit.steps.sft.draw_exit_indices",
        lambda *_, **__: ((depth_BC - 1)[None], None),
    )
    config = SFTConfig(samples=1, direction=direction, exit_coef=0.7)
    if full:  # a student that has moved away from its teacher
        moved = jax.tree.map(lambda x: x * 1.1, split.trainable)
    else:
        moved = split.trainable
    student = split._replace(trainable=moved)

    def loss(trainable):
        kl, exit_loss = by_hand(split, trainable, batch, depth_BC, direction)
        return kl + 0.7 * exit_loss, (kl, exit_loss)

    (_, (kl, exit_loss)), gradient = jax.value_and_grad(loss, has_aux=True)(moved)
    state, metrics = update(student, config, batch)
    assert float(metrics["kl/teacher"]) == pytest.approx(float(kl), rel=1e-4)
    assert float(metrics["loss/exit"]) == pytest.approx(float(exit_loss), rel=1e-4)
    ours = jax.tree.map(jnp.subtract, moved, state.trainable)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_detached_heads_teach_the_trunk_nothing(make_split, full):
    """Its gradient is that without an exit loss, and theirs is that of attached heads."""
    batch = rows()

    def gradients(*, detached, exit_coef):
        split = make_split(full=full, detached=detached)
        state, _ = update(split, SFTConfig(samples=1, exit_coef=exit_coef), batch)
        taken = jax.tree.map(jnp.subtract, split.trainable, state.trainable)
        heads = taken.pop("exits")
        return heads, taken

    heads, trunk = gradients(detached=True, exit_coef=0.7)
    own, attached = gradients(detached=False, exit_coef=0.7)
    _, alone = gradients(detached=False, exit_coef=0.0)
    for ours, theirs in ((heads, own), (trunk, alone)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    assert any(
        not np.allclose(a, b, rtol=0.1, atol=1e-3)
        for a, b in zip(jax.tree.leaves(attached), jax.tree.leaves(alone), strict=True)
    )


def test_calibration_lowers_the_exit_loss(make_split):
    """This model's distributions hardly differ, so the heads have all there is to learn."""
    for target in ["teacher", "student"]:
        for exit_loss in ["sampled", "expected"]:
            split, batch = make_split(), rows()
            explore = 0.3 if exit_loss == "expected" else 0.0
            config = SFTConfig(samples=2, explore=explore, target=target, exit_loss=exit_loss)
            optimizer = optax.adam(1e-2)
            step = make_sft_step(split, optimizer, config)
            state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
            exits = []
            for index in range(40):
                state, metrics = step(state, split.fixed, batch, jax.random.key(index))
                exits.append(float(metrics["loss/exit"]))
            # The exit loss is a cross-entropy: it cannot fall under the entropy of its targets.
            assert np.mean(exits[-10:]) < 0.9 * np.mean(exits[:5])


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("target", ["teacher", "student"])
def test_micro_batches_add_up_to_the_whole(make_split, monkeypatch, target, micro_batches):
    """Rows of different lengths, weighted by their tokens; draws made a function of the targets."""
    split, batch = make_split(), rows()
    monkeypatch.setattr(
        "jexit.steps.sft.draw_exit_indices",
        lambda _, leave_BCE, stay_BCE, *, samples, **__: (
            jnp.stack([(jnp.abs(leave_BCE[..., 0]) * 997).astype(jnp.int32) % 3] * samples),
            None,
        ),
    )
    config = SFTConfig(samples=2, target=target)
    once, metrics_once = update(split, config, batch)
    parts, metrics_parts = update(split, config, batch, micro_batches=micro_batches)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for name, value in metrics_once.items():
        assert float(metrics_parts[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert len({float(metrics_once[f"exit/{layer}"]) for layer in (1, 2, 3)}) > 1


def test_dropout_reaches_the_student_only(make_split):
    split, batch = make_split(dropout=0.5), rows()
    config = SFTConfig(samples=1)
    a, _ = update(split, config, batch, key=0)
    b, _ = update(split, config, batch, key=0)
    for x, y in zip(jax.tree.leaves(a.trainable), jax.tree.leaves(b.trainable), strict=True):
        np.testing.assert_array_equal(x, y)
    plain, _ = update(make_split(dropout=0.0), config, batch, key=0)
    assert any(
        not np.allclose(x, y)
        for x, y in zip(jax.tree.leaves(a.trainable), jax.tree.leaves(plain.trainable), strict=True)
    )


def test_the_window_lines_up_with_depths():
    batch = rows()
    depth_BC = (
        jnp.arange(batch.completion_tokens_BC.size, dtype=jnp.int32).reshape(
            batch.completion_tokens_BC.shape
        )
        + 100
    )
    inputs = np.asarray(batch.input_depths(depth_BC, 3))
    back = np.asarray(batch.window(jnp.asarray(inputs)[..., None])[..., 0])
    action = np.asarray(batch.action_BC)
    np.testing.assert_array_equal(back[action], np.asarray(depth_BC)[action])
    assert np.all(back[:, 0] == 3)  # the last prompt position never leaves
    total = np.asarray(batch.valid_BT).sum(1)
    for row, length in enumerate(total):
        assert np.all(inputs[row, length - 1 :] == 3)
