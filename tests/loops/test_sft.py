"""Calibration with a linear continuation, end to end, on a small random model."""

import jax
import numpy as np
import pytest

import jexit
from jexit.config import CheckpointConfig
from jexit.errors import UserError
from jexit.io.checkpoint import Checkpoints
from jexit.loops import sft, trajectories
from jexit.loops.trainer import Interrupted
from small_runs import assert_same_model, measured, metrics, parameters, run, stop_after

SETTINGS = {
    "exits__continuation": "linear",
    "sft__lens_steps": 2,
    "sft__pool": 24,
    "sft__generate_batch": 12,
    "steps": 2,
    "checkpoint__every": 1,
}
FROZEN = SETTINGS | {"steps": 0, "sft__lens_steps": 3, "batch_size": 6, "sft__completions": 3}
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
    """The heads' phase alone, with three completions of a prompt."""
    workdir = tmp_path_factory.mktemp("frozen") / "run"
    run("sft", model_dir, workdir, **FROZEN)
    return workdir


def test_the_frozen_phase_leaves_the_full_depth_bit_for_bit(frozen_phase, model_dir):
    assert np.array_equal(logits(frozen_phase, 3), logits(model_dir, 3))
    for depth in (1, 2):
        assert np.abs(logits(frozen_phase, depth) - logits(model_dir, depth)).max() > 0.01
    trained, base = parameters(frozen_phase), parameters(model_dir)
    moved = {name for name in base if not np.array_equal(trained[name], base[name])}
    assert moved and all(name.startswith("exits.") for name in moved)
    lines = next((frozen_phase / "teacher").glob("*/host-0.jsonl")).read_text().splitlines()
    assert len(lines) == 3 and lines[1].count('"prompt"') == 12


@pytest.mark.slow
def test_a_run_stopped_at_any_step_ends_like_one_that_was_not(
    both_phases, model_dir, tmp_path, monkeypatch
):
    """Between the phases, where the heads get moments of their own, and after that.

    The teacher is not asked again.
    """
    for step in (1, 2):
        stop_after(monkeypatch, step=step)
        with pytest.raises(Interrupted):
            run("sft", model_dir, tmp_path, **SETTINGS)
        monkeypatch.undo()
        monkeypatch.setattr(trajectories, "rollout", None)  # would raise when called
    run("sft", model_dir, tmp_path, **SETTINGS)
    rows = metrics(tmp_path)
    assert rows == metrics(both_phases) and {"loss", "kl/teacher", "loss/exit"} <= rows[0].keys()
    assert measured(tmp_path) == measured(both_phases)
    assert_same_model(tmp_path, both_phases)
    assert any(name.startswith("blocks.continuation") for name in parameters(tmp_path))


def test_too_few_trajectories_for_the_fit_are_refused_at_once(model_dir, tmp_path):
    with pytest.raises(UserError, match=r"config\.sft\.pool is 1 .* needs at least 2 batches of 1"):
        run("sft", model_dir, tmp_path / "run", **SETTINGS | {"sft__pool": 1, "batch_size": 1})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_fitted_continuation_needs_no_trajectories_for_a_fit(frozen_phase, tmp_path):
    few = FROZEN | {"sft__pool": 3, "batch_size": 3}
    run("sft", frozen_phase, tmp_path, **few)
    ours, theirs = parameters(tmp_path), parameters(frozen_phase)
    maps = [name for name in ours if "continuation" in name]
    assert maps and all(np.array_equal(ours[name], theirs[name]) for name in maps)


@pytest.mark.slow
def test_the_heads_begin_anew_and_only_their_checkpoints_are_ranked(
    model_dir, tmp_path, monkeypatch
):
    """The loss of the first phase is the larger one, and large is said to be good here."""
    seen, original = [], sft.make_lens_step

    def watched(*arguments):
        step = original(*arguments)

        def call(state, *rest):
            seen.append(sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(state.opt_state)))
            return step(state, *rest)

        return call

    monkeypatch.setattr(sft, "make_lens_step", watched)
    settings = SETTINGS | {"checkpoint__keep_best": 1, "checkpoint__best_metric": "loss"}
    run("sft", model_dir, tmp_path, checkpoint__final="best", **settings)
    assert seen[0] == 0 < seen[1]
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert min(losses[:2]) > max(losses[2:])
    config = CheckpointConfig(keep_best=1)
    assert Checkpoints(tmp_path, config).best_step() == 3 + int(np.argmax(losses[2:]))


@pytest.mark.slow
def test_low_rank_maps_are_fitted_on_the_data_sets_own_answers(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "rollout", None)
    settings = SETTINGS | {"exits__continuation_rank": 3, "sft__trajectories": "dataset"}
    run("sft", model_dir, tmp_path, **settings)
    trained = parameters(tmp_path)
    assert trained["blocks.continuation.reduce.kernel"].shape == (3, 16, 3)
    assert trained["blocks.continuation.update.kernel"].shape == (3, 3, 16)
    assert np.abs(trained["blocks.continuation.update.kernel"][1:]).max() > 0


@pytest.mark.slow
def test_calibration_lowers_both_parts_of_its_loss(model_dir, tmp_path):
    run(
        "sft", model_dir, tmp_path, steps=40, batch_size=8, sft__pool=8, sft__generate_batch=8,
        sft__explore=0.5, sft__exit_loss="expected", optim__lora_lr=3e-2, optim__exit_lr=3e-2,
        eval__problems=2,
    )  # fmt: skip
    rows = metrics(tmp_path)
    for name, share in (("kl/teacher", 0.7), ("loss/exit", 1.0)):
        early, late = (np.mean([row[name] for row in part]) for part in (rows[:5], rows[-5:]))
        assert late < share * early, name


@pytest.mark.slow
def test_the_fit_brings_exits_closer_to_the_last_layer_and_is_made_once(
    frozen_phase, both_phases, model_dir, tmp_path
):
    """In nats at the first step, before the heads have learnt, on the same batch.

    Adapters have learnt with it: neither the heads' phase nor another run fits it anew.
    """
    run("sft", model_dir, tmp_path / "lens", **FROZEN | {"exits__continuation": "frozen"})
    fitted, lens = metrics(frozen_phase)[0], metrics(tmp_path / "lens")[0]
    for name in ("kl/exit_1", "kl/exit_2"):
        assert fitted[name] < 0.75 * lens[name]
    run("sft", model_dir, tmp_path / "fit", **SETTINGS | {"steps": 0})
    run("sft", both_phases, tmp_path / "again", **SETTINGS)
    fit, first, second = map(parameters, (tmp_path / "fit", both_phases, tmp_path / "again"))
    names = [name for name in fit if name.startswith("blocks.continuation")]
    assert names and any(fit[name].any() for name in names)
    for name in names:
        np.testing.assert_array_equal(first[name], fit[name], err_msg=name)
        np.testing.assert_array_equal(second[name], fit[name], err_msg=name)


def test_too_few_trajectories_for_a_fit_are_one_sentence(model_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.sft\.pool is 1 \(prompts with trajectories: 1\).* at least 2"
    ):
        run("sft", model_dir, tmp_path, **SETTINGS | {"sft__pool": 1})
    assert not (tmp_path / "teacher").exists() and not (tmp_path / "config.json").exists()
