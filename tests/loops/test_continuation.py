"""Calibration of a linear continuation, end to end, on a small random model."""

import jax
import numpy as np
import pytest

import jexit
from jexit.loops.trainer import Interrupted
from small_runs import metrics, parameters, run, stop_after

SETTINGS = {
    "exits__continuation": "linear",
    "sft__lens_steps": 2,
    "sft__pool": 24,
    "sft__generate_batch": 12,
    "steps": 2,
    "checkpoint__every": 1,
}
TOKENS = jax.random.randint(jax.random.key(0), (3, 20), 0, 10)


def logits(directory, depth):
    model, _ = jexit.load(directory)
    policy = jexit.Prescribed(np.full(TOKENS.shape, depth))
    return jexit.forward(model, TOKENS, policy=policy).logits_BTV


@pytest.fixture(scope="module")
def both_phases(model_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("linear") / "run"
    run("sft", model_dir, workdir, **SETTINGS)
    return workdir


@pytest.fixture(scope="module")
def frozen_phase(model_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("frozen") / "run"
    run("sft", model_dir, workdir, **SETTINGS | {"steps": 0, "sft__lens_steps": 3})
    return workdir


def test_the_frozen_phase_leaves_the_full_depth_bit_for_bit(frozen_phase, model_dir):
    assert np.array_equal(logits(frozen_phase, 3), logits(model_dir, 3))
    for depth in (1, 2):
        assert np.abs(logits(frozen_phase, depth) - logits(model_dir, depth)).max() > 0.01
    trained, base = parameters(frozen_phase), parameters(model_dir)
    moved = {name for name in base if not np.array_equal(trained[name], base[name])}
    assert moved and all(name.startswith("exits.") for name in moved)


def test_the_fit_brings_exits_closer_to_the_last_layer(frozen_phase, model_dir, tmp_path):
    """In nats at the first step, before the heads have learnt, on the same batch."""
    frozen = SETTINGS | {"exits__continuation": "frozen", "steps": 0, "sft__lens_steps": 1}
    run("sft", model_dir, tmp_path, **frozen)
    fitted, lens = metrics(frozen_phase)[0], metrics(tmp_path)[0]
    for name in ("kl/exit_1", "kl/exit_2"):
        assert fitted[name] < 0.75 * lens[name]


def test_a_run_stopped_at_any_step_ends_like_one_that_was_not(
    both_phases, model_dir, tmp_path, monkeypatch
):
    """Between the phases, where the heads get moments of their own, and after that."""
    for step in (1, 2):
        stop_after(monkeypatch, step=step)
        with pytest.raises(Interrupted):
            run("sft", model_dir, tmp_path / "run", **SETTINGS)
        monkeypatch.undo()
    run("sft", model_dir, tmp_path / "run", **SETTINGS)
    assert metrics(tmp_path / "run") == metrics(both_phases)
    first, second = parameters(both_phases), parameters(tmp_path / "run")
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    assert any(name.startswith("blocks.continuation") for name in first)


def test_the_continuation_is_fitted_once(frozen_phase, both_phases, tmp_path):
    """Adapters have learnt with it: neither the heads' phase nor another run fits it anew."""
    run("sft", both_phases, tmp_path, **SETTINGS)
    fit, first, second = map(parameters, (frozen_phase, both_phases, tmp_path))
    names = [name for name in fit if name.startswith("blocks.continuation")]
    assert names and any(fit[name].any() for name in names)
    for name in names:
        np.testing.assert_array_equal(first[name], fit[name], err_msg=name)
        np.testing.assert_array_equal(second[name], fit[name], err_msg=name)


def test_low_rank_maps_are_fitted(model_dir, tmp_path):
    run("sft", model_dir, tmp_path, **SETTINGS | {"exits__continuation_rank": 3})
    trained = parameters(tmp_path)
    assert trained["blocks.continuation.reduce.kernel"].shape == (3, 16, 3)
    assert trained["blocks.continuation.update.kernel"].shape == (3, 3, 16)
    assert np.abs(trained["blocks.continuation.update.kernel"][1:]).max() > 0


def test_too_few_trajectories_for_a_fit_are_one_sentence(model_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.sft\.pool gives trajectories for 1 prompts.* at least 2"
    ):
        run("sft", model_dir, tmp_path, **SETTINGS | {"sft__pool": 1})
    assert not (tmp_path / "model").exists()
