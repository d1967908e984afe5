"""Schedules and updates by hand; what is not finite is skipped whole; the continuation's norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import toy

from jexit.config import OptimConfig, SFTConfig
from jexit.steps.optim import (
    STILL,
    apply_gradients,
    make_optimizer,
    schedule,
    split_for_training,
)
from jexit.steps.sft import make_sft_step
from jexit.steps.state import new_state, parameter_labels

LABELS = {"exits": {"w1": "exit"}, "q": {"lora_a": "lora"}}


def parameters():
    return {"exits": {"w1": jnp.full(5, 0.5)}, "q": {"lora_a": jnp.full((2, 3), -2.0)}}


def gradients(value=0.1):
    return jax.tree.map(lambda x: jnp.full_like(x, value), parameters())


def adam(**settings):
    return make_optimizer(OptimConfig(**settings), 10, LABELS)


def only_moments():
    """An optimiser whose parameters stay finite and whose state does not."""

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda moment: moment * jnp.inf, state)

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.ones_like, params), update)


def one_update(state, optimizer, gradients, loss=1.0):
    step = jax.jit(lambda *args: apply_gradients(args[0], optimizer, *args[1:]), donate_argnums=0)
    return step(state, gradients, jnp.float32(loss))


def copied(tree):
    return jax.tree.map(np.array, tree)


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, copied(found), wanted)


def without_schedules(tree):
    """The tree without the states of schedules, and their counts."""
    counts = []

    def part(leaf):
        if isinstance(leaf, optax.ScaleByScheduleState):
            counts.append(int(leaf.count))
            return None
        return leaf

    def is_schedule(leaf):
        return isinstance(leaf, optax.ScaleByScheduleState)

    return jax.tree.map(part, tree, is_leaf=is_schedule), counts


def test_learning_rates_warm_up_and_fall():
    """Over four of twelve steps from a fifth of the peak, then to a tenth of it."""
    for kind, at in (
        ("constant", {6: 1.0, 8: 1.0, 12: 1.0}),
        ("linear", {6: 0.775, 8: 0.55, 12: 0.1, 20: 0.1}),
        ("cosine", {6: 0.1 + 0.45 * (1 + np.sqrt(0.5)), 8: 0.55, 12: 0.1, 20: 0.1}),
    ):
        config = OptimConfig(schedule=kind, warmup_steps=4, final_fraction=0.1)
        rate = schedule(config, 3.0, 12)
        for step, share in ({0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0} | at).items():
            assert float(rate(step)) == pytest.approx(3.0 * share), (kind, step)
    without = schedule(OptimConfig(schedule="linear", warmup_steps=0, final_fraction=0.0), 3.0, 12)
    assert [float(without(step)) for step in (0, 6, 12)] == pytest.approx([3.0, 1.5, 0.0])


def test_two_updates_are_those_of_clipped_adamw_by_hand():
    """Every kind at its own rate; biases do not decay."""
    labels = {"exits": {"w1": "exit_hidden", "w2": "exit", "b2": "exit_bias"}} | {"q": LABELS["q"]}
    params = parameters() | {"exits": {name: jnp.full(5, 0.5) for name in ("w1", "w2", "b2")}}
    config = OptimConfig(
        lora_lr=0.01, exit_lr=0.02, exit_hidden=0.5, exit_bias=3.0, b1=0.8, b2=0.9, eps=1e-3,
        weight_decay=0.1, clip_norm=1.0, schedule="linear", warmup_steps=0, final_fraction=0.0,
    )  # fmt: skip
    rates = {"w1": 0.01, "w2": 0.02, "b2": 0.06, "lora_a": 0.01}
    optimizer = make_optimizer(config, 10, labels)
    state = new_state(jax.tree.map(jnp.copy, params), optimizer)
    wanted = {"w1": 0.5, "w2": 0.5, "b2": 0.5, "lora_a": -2.0}
    mean, square = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
    for step, values in enumerate(
        ({"w1": 3.0, "w2": -1.0, "b2": 2.0, "lora_a": 0.5},  # norm 8.5, which is clipped
         {"w1": 0.1, "w2": 0.2, "b2": -0.1, "lora_a": 0.05}),
    ):  # fmt: skip
        given = {
            "exits": {name: jnp.full(5, values[name]) for name in ("w1", "w2", "b2")},
            "q": {"lora_a": jnp.full((2, 3), values["lora_a"])},
        }
        norm = np.sqrt(sum(n * values[k] ** 2 for k, n in zip(values, (5, 5, 5, 6), strict=True)))
        state, metrics = one_update(state, optimizer, given)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        for name, value in values.items():
            g = value / max(norm, 1.0)
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g * g
            m, v = mean[name] / (1 - 0.8 ** (step + 1)), square[name] / (1 - 0.9 ** (step + 1))
            decay = 0.1 * wanted[name] if name != "b2" else 0.0
            wanted[name] -= rates[name] * (1 - step / 10) * (m / (np.sqrt(v) + 1e-3) + decay)
    found = state.trainable["exits"] | state.trainable["q"]
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_an_update_that_is_not_finite_is_skipped_whole():
    for what, optimizer, given, loss in (
        ("gradient", adam(), np.nan, 1.0),
        ("loss", adam(), 0.1, np.inf),
        ("the gradient's norm", adam(), 3e38, 1.0),
        ("a moment's decay", adam(b2=np.nan), 0.1, 1.0),
        ("one learning rate", adam(lora_lr=np.inf), 0.1, 1.0),
        ("the update overflows", optax.sgd(3e38), 10.0, 1.0),
        ("the moments alone", only_moments(), 0.1, 1.0),
    ):
        state = new_state(parameters(), optimizer)
        before, _ = without_schedules((state.trainable, state.opt_state))
        before = copied(before)
        for skipped in (1, 2):
            state, metrics = one_update(state, optimizer, gradients(given), loss)
            assert int(state.skipped) == float(metrics["skipped"]) == skipped, what
            assert int(state.step) == skipped
            after, counts = without_schedules((state.trainable, state.opt_state))
            assert_same(after, before)
            if what == "gradient":  # learning rates follow the steps
                assert counts and set(counts) == {skipped}


def test_the_continuations_gradient_leaves_the_clipping_of_others_alone():
    """Adapters and heads share a norm, as without a continuation."""
    labels, params = LABELS | {"a": "continuation"}, parameters() | {"a": jnp.zeros(4)}
    optimizer, alone = make_optimizer(OptimConfig(continuation_lr=1e-5), 10, labels), adam()
    state, lone = optimizer.init(params), alone.init(parameters())
    for value, far in ((0.3, 0.0), (5.0, 1e4), (0.1, 30.0)):  # Adam sees only how they change
        given = gradients(value) | {"a": jnp.full(4, far)}
        found, state = optimizer.update(given, state, params)
        wanted, lone = alone.update(gradients(value), lone, parameters())
        assert_same({name: found[name] for name in wanted}, copied(wanted))
    assert float(jnp.abs(found["a"]).max()) > 0


def test_a_continuation_that_keeps_its_fit_has_no_gradient_and_no_moments():
    """All others learn as if it had them."""
    config = OptimConfig(lora_lr=1e-2, exit_lr=1e-2, continuation_lr=0.0)
    everything = toy.make_split(continuation="linear")
    model = everything.student(everything.trainable)
    split, labels = split_for_training(model, config, full=False)
    states = []
    for parts, of in ((split, labels), (everything, parameter_labels(model, full=False))):
        optimizer = make_optimizer(config, 10, of)
        step = make_sft_step(parts, optimizer, SFTConfig(samples=1))
        state = toy.start(parts, optimizer)
        for index in range(2):
            state, metrics = step(state, parts.fixed, toy.rows(), jax.random.key(index))
        states.append((state, float(metrics["grad_norm"])))
    (ours, norm), (theirs, larger) = states
    toy.assert_close(ours.trainable, theirs.trainable, rtol=1e-5, atol=1e-7)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), ours.trainable, split.trainable)
    assert jax.tree.leaves(moved) == [label != STILL for label in jax.tree.leaves(labels)]
    assert norm < larger
    still = split.trainable["blocks"]["continuation"]["update"]["kernel"].shape
    shapes = [[leaf.shape for leaf in jax.tree.leaves(each.opt_state)] for each in (ours, theirs)]
    assert still not in shapes[0] and shapes[1].count(still) == 2


def test_a_finite_update_is_taken_and_ends_the_count():
    """In place: the test of the outcome holds no second copy of what it replaces."""
    optimizer = adam(lora_lr=0.1)
    begin = new_state(parameters(), optimizer)
    state, _ = one_update(begin, optimizer, gradients(np.nan))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begin))
    state, metrics = one_update(state, optimizer, gradients())
    assert int(state.skipped) == float(metrics["skipped"]) == 0
    np.testing.assert_allclose(state.trainable["q"]["lora_a"], -2.1, rtol=1e-5)
