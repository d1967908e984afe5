"""Reinforcement, calibration and evaluation, end to end, on a small random model."""

import dataclasses
import json
import xml.etree.ElementTree

import numpy as np
import pytest

import jexit
from jexit.config import BEST_METRICS
from jexit.errors import UserError
from jexit.evaluation.accuracy import text_means
from jexit.kernels.chips import CHIPS, Chip
from jexit.loops.penalties import PATIENCE, FailureWatch
from jexit.loops.stage import Stage
from jexit.loops.trainer import Collapsed, Diverged, Interrupted
from jexit.main import dispatch
from small_runs import (
    assert_same_model,
    make_config,
    measured,
    metrics,
    parameters,
    run,
    stop_after,
)

RL_METRICS = {
    *("loss", "reward/mean", "reward/verifier", "accuracy", "depth/mean", "depth/fraction"),
    *("depth/p10", "depth/p90", "exit/1", "exit/2", "exit/3", "kl/teacher", "entropy/tokens"),
    *("entropy/depth", "completion/length", "completion/truncated", "advantage/std"),
    *("groups/zero_std", "sampler_gap", "tokens_per_second", "step_seconds", "lr/lora", "lr/exit"),
    "grad_norm",
}
# Steps that are large enough to make things worse.
LARGE = {"optim__lora_lr": 0.3, "optim__exit_lr": 0.3, "optim__full_lr": 0.3}
# Checkpoints after steps 2, 4 and 5, of which the best makes the model.
BEST = {
    "steps": 5,
    "checkpoint__every": 2,
    "checkpoint__keep": 1,
    "checkpoint__keep_best": 1,
    "checkpoint__final": "best",
    **LARGE,
}
BEST_BY = {"rl": "val/reward", "sft": "-loss", "pretrain": "-loss/text"}


def best_settings(command):
    settings = BEST | {"checkpoint__best_metric": BEST_BY[command], "rl__temperature": 0.7}
    if command == "pretrain":
        settings |= {"pretrain__layers": 3, "pretrain__width": 16, "pretrain__mlp_width": 24}
    return settings


@pytest.fixture(scope="module")
def rl_run(model_dir, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("rl") / "run"
    run("rl", model_dir, workdir, **best_settings("rl"))
    return workdir


def test_an_rl_run_leaves_everything_that_a_run_promises(rl_run, model_dir):
    rows = list(map(json.loads, (rl_run / "metrics.jsonl").read_text().splitlines()))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert set(rows[0]) >= RL_METRICS
    assert not {"mfu", "model_flops"} & set(rows[0])  # nobody says what a CPU's peak is
    for row in rows:
        assert all(map(np.isfinite, row.values()))
        # The trainer's teacher-forced log-probabilities are the sampler's.
        assert row["sampler_gap"] < 1e-4
        assert row["lr/lora"] == row["lr/exit"] == pytest.approx(0.3)
        assert row["depth/fraction"] == pytest.approx(row["depth/mean"] / 3, rel=1e-5)
        assert sum(row[f"exit/{layers}"] for layers in (1, 2, 3)) == pytest.approx(1.0, abs=1e-5)
    samples = list(map(json.loads, (rl_run / "samples.jsonl").read_text().splitlines()))
    assert {sample["step"] for sample in samples} == {1, 3, 5}
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["depths"])
        assert sample["depths"][0] == 3 and set(sample["depths"]) <= {1, 2, 3}
    plots = list((rl_run / "plots").glob("*.svg"))
    assert plots
    for plot in plots:
        assert xml.etree.ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert "Where tokens leave" in (rl_run / "report.html").read_text()
    assert list((rl_run / "tensorboard").iterdir())
    assert json.loads((rl_run / "config.json").read_text())["rl"]["rollouts"] == 2
    assert [result["problems"] for result in measured(rl_run)] == [6, 6]

    trained, tokenizer = jexit.load(rl_run)
    generation = jexit.generate(trained, tokenizer, ["sum 372"], max_new_tokens=4)
    assert generation.depths[0][0] == 3
    before, after = parameters(model_dir), parameters(rl_run)
    for name, value in before.items():
        same = np.array_equal(value, after[name])
        assert same == (not name.startswith("exits.")), name
    assert np.abs(after["blocks.attn.q.lora_b"]).max() > 0


@pytest.mark.parametrize(
    "command",
    ["rl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "pretrain"))],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not_with_its_best_checkpoint(
    command, rl_run, model_dir, tmp_path, monkeypatch
):
    """The signal's checkpoint is not due, and has no score."""
    settings, cut = best_settings(command), tmp_path / "cut"
    stop_after(monkeypatch, step=2)
    with pytest.raises(Interrupted, match="SIGTERM after step 3; the state is saved"):
        run(command, model_dir, cut, **settings)
    assert not (cut / "model").exists()
    monkeypatch.undo()
    run(command, model_dir, cut, **settings)
    whole = rl_run if command == "rl" else tmp_path / "whole"
    if command != "rl":
        run(command, model_dir, whole, **settings)
    rows = metrics(cut)
    assert rows == metrics(whole)
    assert_same_model(cut, whole)
    if command != "pretrain":
        assert measured(cut) == measured(whole)

    name = BEST_BY[command]
    seen = set().union(*rows)
    assert command == "pretrain" or set(BEST_METRICS[command]) <= seen
    sign, key = (-1 if name.startswith("-") else 1), name.lstrip("-")
    scores = {row["step"]: sign * row[key] for row in rows if key in row}
    assert sorted(scores) == ([2, 4, 5] if command == "rl" else [1, 2, 3, 4, 5])
    means = {
        last: np.mean([scores[step] for step in range(first, last + 1) if step in scores])
        for first, last in ((1, 2), (3, 4), (5, 5))
    }
    winner = max(means, key=lambda step: (means[step], step))
    kept = {path.name for path in (cut / "checkpoints").iterdir()}
    assert kept == {str(winner), "5"}
    # A run of just so many steps ends with the same parameters: schedules here are constant.
    short = settings | {"steps": winner, "checkpoint__final": "last"}
    run(command, model_dir, tmp_path / "short", **short)
    assert_same_model(cut, tmp_path / "short")


def test_a_finished_run_changes_neither_when_it_is_started_again_nor_for_another_config(
    rl_run, model_dir
):
    rows, trained, settings = metrics(rl_run), parameters(rl_run), best_settings("rl")
    run("rl", model_dir, rl_run, **settings)
    with pytest.raises(ValueError, match=r"config\.rl\.depth_coef=0\.5.* has 0\.9; choose another"):
        run("rl", model_dir, rl_run, rl__depth_coef=0.9, **settings)
    assert metrics(rl_run) == rows
    for name, value in parameters(rl_run).items():
        np.testing.assert_array_equal(value, trained[name])


def test_losses_that_are_not_finite_stop_the_run_and_name_the_last_good_checkpoint(
    model_dir, tmp_path
):
    config = make_config("rl", model_dir, steps=8, optim__max_skipped=3)
    broken = dataclasses.replace(config.rl, kl_coef=float("nan"))
    with pytest.raises(Diverged, match=r"in 3 consecutive steps .*\(last good checkpoint"):
        dispatch(dataclasses.replace(config, rl=broken), tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_run_that_collapses_stops_with_the_last_good_checkpoint(model_dir, tmp_path, monkeypatch):
    """Updates 1 and 2 are good, from the fourth on the watch says stop."""
    observe, finish, steps = FailureWatch.observe, Stage.finish, []

    def told(self, step, *args, **kwargs):
        observe(self, step, *args, **kwargs)
        self.good_step = min(step, 2)
        self.failing = PATIENCE if step >= 4 else 0
        return "text collapse: as told" if self.must_stop else ""

    def noted(self, trainer, state, before):
        steps.append(int(state.step))
        finish(self, trainer, state, before)

    monkeypatch.setattr(FailureWatch, "observe", told)
    monkeypatch.setattr(Stage, "finish", noted)
    settings = LARGE | {"checkpoint__every": 1}  # so that the programs are those of other runs
    for reason in ("text collapse: as told", "it had collapsed before it was resumed"):
        with pytest.raises(Collapsed, match=rf"stopped after step 4: {reason} \(.*/model "
                                            r"contains the model of step 2, the last"):  # fmt: skip
            run("rl", model_dir, tmp_path / "run", steps=8, checkpoint__keep=5, **settings)
    assert steps == [2, 2] and (tmp_path / "run" / "model").exists()
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    # At the last update, and with no checkpoint left that is good.
    for _ in range(2):
        with pytest.raises(Collapsed, match=r"after step 4: .*no checkpoint from before the "):
            run("rl", model_dir, tmp_path / "gone", steps=4, checkpoint__keep=1, **settings)
    assert not (tmp_path / "gone" / "model").exists()
    run("rl", model_dir, tmp_path / "on", steps=5, rl__stop_on_collapse=False, **settings)
    assert steps == [2, 2, 5]


@pytest.mark.slow
def test_a_floor_can_be_a_share_of_what_the_initial_model_has_at_full_depth(
    model_dir, tmp_path, monkeypatch, capsys
):
    """The random model is never correct, so one that is told apart by temperature stands in.

    The chip is a known one, so that the run says what share of its peak it used.
    """
    monkeypatch.setitem(CHIPS, "cpu", Chip(1, 1e9))
    accuracy, asked, original = {0.7: 0.5, 0.0: 0.8}, [], Stage._measured

    def stand_in(self, trainable, *, policy="", **decoding):
        result, made = original(self, trainable, policy=policy, **decoding)
        if policy == "full":
            asked.append(decoding)
            known = accuracy[decoding.get("temperature", 0)]
            result = result.model_copy(update={"accuracy": known})
        return result, made

    monkeypatch.setattr(Stage, "_measured", stand_in)
    config = make_config(
        "rl", model_dir, steps=2, rl__depth_coef=1.0, rl__accuracy_floor=0.9, rl__temperature=0.7,
        rl__floor_of="initial", checkpoint__every=1, checkpoint__keep_best=1, eval__problems=2,
    )  # fmt: skip
    dispatch(config, tmp_path)
    said = "The accuracy floor is 45.0% for rollouts and 72.0% for the val split"
    assert said in capsys.readouterr().out
    assert asked == [{"temperature": 0.7, "max_new_tokens": config.rl.max_new_tokens}, {}]
    dispatch(dataclasses.replace(config, steps=3), tmp_path)  # a resumed run knows its floor
    assert len(asked) == 2
    rows = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert len(rows) == 3
    for row in rows:
        assert row["depth_coef"] == 0.0
        assert -80 < row["val/reward"] < -70  # 100 a unit of accuracy under 0.72
        assert 1e6 < row["mfu"] * row["step_seconds"] * 1e9 < 1e9 and "model_flops" not in row


def test_penalties_need_a_model_that_is_ever_correct(model_dir, tmp_path):
    """A floor that is a fraction of 0 would let them act from the first update."""
    settings = {"steps": 1, "rl__accuracy_floor": 0.9, "rl__floor_of": "initial"}
    settings |= {"eval__problems": 2, "rl__depth_coef": 0.0}
    for coef, allowed in (("rl__depth_coef", False), ("rl__length_coef", False), ("", True)):
        config = make_config("rl", model_dir, **settings | ({coef: 1.0} if coef else {}))
        workdir = tmp_path / (coef or "none")
        if allowed:
            dispatch(config, workdir)
            assert len(metrics(workdir)) == 1
        else:
            with pytest.raises(UserError, match="none of 2 problems of the val split correctly"):
                dispatch(config, workdir)
            assert metrics(workdir) == []


@pytest.mark.slow
def test_a_trunk_learns_several_tasks_and_is_measured_under_its_own_distribution(
    model_dir, tmp_path, capsys
):
    """A second copy is the teacher. With a floor of 0.9 under hazards nearly all leave at once."""
    settings = {"task__name": "blend", "task__options__steps": "mixed", "batch_size": 6, "steps": 2}
    settings |= {"lora__rank": 0, "optim__full_lr": 1e-2, "rl__min_hazard": 0.9}
    run("rl", model_dir, tmp_path, **settings)
    before, after = parameters(model_dir), parameters(tmp_path)
    assert set(before) == set(after)
    assert not np.array_equal(before["blocks.mlp.up.kernel"], after["blocks.mlp.up.kernel"])
    rows = metrics(tmp_path)
    assert max(row["sampler_gap"] for row in rows) < 1e-4
    for name in ("sums", "word_problems", "tom"):
        assert 0.0 <= rows[-1][f"task/{name}/accuracy"] <= 1.0
    assert "task/tom/chain_lines" in rows[-1]

    policies, evaluated = ("full", "sample", "threshold:0.5", "fixed:2"), tmp_path / "eval"
    run("eval", tmp_path, evaluated, eval__policies=policies, exits__layers=())
    written = json.loads((evaluated / "eval.json").read_text())
    page, printed = (evaluated / "report.html").read_text(), capsys.readouterr().out
    assert "Accuracy and depth" in page and written["task"]["name"] == "sums"
    by_policy = {entry["policy"]: entry for entry in written["runs"]}
    assert list(by_policy) == list(policies)
    for policy, entry in by_policy.items():
        assert policy in page and policy in printed
        assert entry["problems"] == 6
        assert sum(entry["depth_histogram"].values()) == entry["tokens"]
        assert entry["depth_fraction"] == pytest.approx(entry["depth_mean"] / 3)
        low, high = entry["accuracy_ci95"]
        assert 0 <= low <= entry["accuracy"] <= high <= 1
        assert entry["tokens_per_second"] > 0
    assert by_policy["full"]["depth_fraction"] == 1.0
    # The first token of each of the six completions always runs every layer.
    fixed = by_policy["fixed:2"]["depth_histogram"]
    assert fixed == {"2": by_policy["fixed:2"]["tokens"] - 6, "3": 6}
    for result in (measured(tmp_path)[0], by_policy["sample"]):
        may_leave = result["tokens"] - result["problems"]
        assert result["depth_histogram"]["1"] / may_leave > 0.75


def test_generation_prints_text_with_depths(model_dir, capsys):
    run(
        "generate", model_dir, None, generate__prompts=("sum 372",), generate__max_new_tokens=5,
        generate__policy="fixed:2", exits__layers=(),
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "> sum 372" in printed
    assert "depths: 3 2 2 2 2" in printed


def test_metrics_of_texts_are_means_over_all_hosts():
    hosts = [{"step_size": (30.0, 10)}, {"step_size": (2.0, 1), "words": (9.0, 3)}, {}]
    assert text_means(hosts) == {"step_size": pytest.approx(32 / 11), "words": 3.0}
    assert text_means([{"step_size": (0.0, 0)}, {}]) == {}  # no step anywhere: no mean


def test_completions_that_the_model_has_no_positions_for_are_refused_at_the_start(
    model_dir, tmp_path
):
    for settings in ({"rl__max_new_tokens": 300}, {"eval__max_new_tokens": 300}):
        with pytest.raises(ValueError, match=r"max_new_tokens is 300 .* model's 256 positions"):
            run("rl", model_dir, tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="a run that has not finished"):
        jexit.load(tmp_path)
