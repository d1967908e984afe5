"""Both stages and evaluation, end to end, on a small random model."""

import dataclasses
import json
import xml.etree.ElementTree

import numpy as np
import pytest

import jexit
from jexit.config import BEST_METRICS
from jexit.evaluation.accuracy import text_means
from jexit.loops import rl, trajectories
from jexit.loops.pressure import FailureWatch
from jexit.loops.stage import Stage
from jexit.loops.trainer import Collapsed, Diverged, Interrupted
from jexit.main import dispatch
from small_runs import make_config, metrics, parameters, run, stop_after

RL_METRICS = {
    "loss",
    "reward/mean",
    "reward/verifier",
    "accuracy",
    "depth/mean",
    "depth/fraction",
    "depth/p10",
    "depth/p90",
    "exit/1",
    "exit/2",
    "exit/3",
    "kl/teacher",
    "entropy/tokens",
    "entropy/depth",
    "completion/length",
    "completion/truncated",
    "advantage/std",
    "groups/zero_std",
    "sampler_gap",
    "tokens_per_second",
    "step_seconds",
    "lr/lora",
    "lr/exit",
    "grad_norm",
}


@pytest.fixture(scope="module")
def rl_run(model_dir, tmp_path_factory):
    """An uninterrupted RL run of four updates with a checkpoint after every second one."""
    workdir = tmp_path_factory.mktemp("rl") / "run"
    run("rl", model_dir, workdir, checkpoint__every=2, rl__accuracy_floor=0.01)
    return workdir


@pytest.fixture(scope="module")
def sft_run(model_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sft") / "run"
    run("sft", model_dir, workdir, checkpoint__every=2)
    return workdir


def test_an_rl_run_leaves_everything_that_a_run_promises(rl_run):
    rows = list(map(json.loads, (rl_run / "metrics.jsonl").read_text().splitlines()))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) >= RL_METRICS
    assert not {"mfu", "model_flops"} & set(rows[0])  # nobody says what a CPU's peak is
    assert all(np.isfinite(value) for row in rows for value in row.values())
    samples = list(map(json.loads, (rl_run / "samples.jsonl").read_text().splitlines()))
    assert {sample["step"] for sample in samples} == {1, 3}
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["depths"])
        assert sample["depths"][0] == 3
        assert set(sample["depths"]) <= {1, 2, 3}
    for plot in (rl_run / "plots").glob("*.svg"):
        assert xml.etree.ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert list((rl_run / "plots").glob("*.svg"))
    assert "Where tokens leave" in (rl_run / "report.html").read_text()
    assert list((rl_run / "tensorboard").iterdir())
    assert json.loads((rl_run / "config.json").read_text())["rl"]["rollouts"] == 2
    for name in ("before.json", "after.json"):
        assert json.loads((rl_run / name).read_text())["problems"] == 6


def test_what_a_run_trained_loads_from_its_directory(rl_run, model_dir):
    trained, tokenizer = jexit.load(rl_run)
    generation = jexit.generate(trained, tokenizer, ["sum 372"], max_new_tokens=4)
    assert generation.depths[0][0] == 3
    before, after = parameters(model_dir), parameters(rl_run)
    for name, value in before.items():
        same = np.array_equal(value, after[name])
        assert same == (not name.startswith("exits.")), name
    assert np.abs(after["blocks.attn.q.lora_b"]).max() > 0


def test_depth_and_sampler_figures_agree_with_the_samples(rl_run):
    """The trainer's teacher-forced log-probabilities are the sampler's."""
    for row in metrics(rl_run):
        assert row["sampler_gap"] < 1e-4
        assert row["depth/fraction"] == pytest.approx(row["depth/mean"] / 3, rel=1e-5)
        shares = [row[f"exit/{layers}"] for layers in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("command", ["rl", pytest.param("sft", marks=pytest.mark.slow)])
def test_a_run_stopped_half_way_ends_like_one_that_was_not(
    command, rl_run, sft_run, model_dir, tmp_path, monkeypatch
):
    whole = {"rl": rl_run, "sft": sft_run}[command]
    settings = {"checkpoint__every": 2}
    if command == "rl":
        settings["rl__accuracy_floor"] = 0.01
    stop_after(monkeypatch, step=2)
    with pytest.raises(Interrupted, match="SIGTERM after step 3; the state is saved"):
        run(command, model_dir, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    run(command, model_dir, tmp_path / "run", **settings)
    assert metrics(tmp_path / "run") == metrics(whole)
    first, second = parameters(whole), parameters(tmp_path / "run")
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    for name in ("before.json", "after.json"):
        ours, theirs = (json.loads((d / name).read_text()) for d in (tmp_path / "run", whole))
        ours.pop("tokens_per_second"), theirs.pop("tokens_per_second")
        assert ours == theirs


def test_a_finished_run_that_is_started_again_changes_nothing(rl_run, model_dir):
    rows, trained = metrics(rl_run), parameters(rl_run)
    run("rl", model_dir, rl_run, checkpoint__every=2, rl__accuracy_floor=0.01)
    assert metrics(rl_run) == rows
    for name, value in parameters(rl_run).items():
        np.testing.assert_array_equal(value, trained[name])


def test_another_config_in_the_same_directory_is_refused(rl_run, model_dir):
    rows, same = metrics(rl_run), {"checkpoint__every": 2, "rl__accuracy_floor": 0.01}
    with pytest.raises(ValueError, match=r"config\.rl\.depth_coef=0\.5.* has 0\.9; choose another"):
        run("rl", model_dir, rl_run, rl__depth_coef=0.9, **same)
    assert metrics(rl_run) == rows


def test_calibration_reads_its_teacher_once(sft_run, model_dir, monkeypatch):
    """A second run over the cached trajectories never decodes with the teacher."""
    kept = (sft_run / "teacher").stat().st_mtime_ns

    def refuse(*args, **kwargs):
        raise AssertionError("the teacher was decoded again")

    stage = rl.Stage.open(make_config("sft", model_dir, checkpoint__every=2), sft_run, updates=4)
    monkeypatch.setattr(trajectories, "rollout", refuse)
    assert len(trajectories.teacher_trajectories(stage)) == 6
    assert (sft_run / "teacher").stat().st_mtime_ns == kept


def test_calibration_on_the_data_sets_own_answers(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "rollout", None)  # would raise when called
    run("sft", model_dir, tmp_path, sft__trajectories="dataset", steps=2, eval__problems=2)
    assert len(metrics(tmp_path)) == 2


def test_calibration_lowers_both_parts_of_its_loss(model_dir, tmp_path):
    run(
        "sft",
        model_dir,
        tmp_path,
        steps=60,
        batch_size=8,
        sft__pool=8,
        sft__generate_batch=8,
        sft__explore=0.5,
        sft__exit_loss="expected",
        optim__lora_lr=3e-2,
        optim__exit_lr=3e-2,
        eval__problems=2,
    )
    rows = metrics(tmp_path)
    early, late = (
        {k: np.mean([r[k] for r in part]) for k in rows[0]} for part in (rows[:5], rows[-5:])
    )
    assert late["kl/teacher"] < 0.7 * early["kl/teacher"]
    assert late["loss/exit"] < early["loss/exit"]


def test_full_fine_tuning_keeps_a_second_copy_as_the_teacher(model_dir, tmp_path):
    run("rl", model_dir, tmp_path, lora__rank=0, optim__full_lr=1e-2, steps=2, eval__problems=2)
    before, after = parameters(model_dir), parameters(tmp_path)
    assert set(before) == set(after)
    assert not np.array_equal(before["blocks.mlp.up.kernel"], after["blocks.mlp.up.kernel"])
    assert max(row["sampler_gap"] for row in metrics(tmp_path)) < 1e-4


def test_losses_that_are_not_finite_stop_the_run_and_name_the_last_good_checkpoint(
    model_dir, tmp_path
):
    config = make_config("rl", model_dir, steps=8, optim__max_skipped=3, eval__problems=2)
    broken = dataclasses.replace(config.rl, kl_coef=float("nan"))
    with pytest.raises(Diverged, match=r"not finite in 3 steps in a row .*; last good checkpoint"):
        dispatch(dataclasses.replace(config, rl=broken), tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_run_that_collapses_stops_with_the_last_good_checkpoint(model_dir, tmp_path, monkeypatch):
    """Updates 1 and 2 are good, from the fourth on the watch says stop."""
    original = FailureWatch.observe

    def observe(self, step, *args, **kwargs):
        original(self, step, *args, **kwargs)
        self.good_step = min(step, 2)
        return "text collapse: as told" if step >= 4 else ""

    monkeypatch.setattr(FailureWatch, "observe", observe)
    config = make_config("rl", model_dir, steps=8, checkpoint__every=1, checkpoint__keep=5,
                         eval__problems=2)  # fmt: skip
    with pytest.raises(Collapsed, match=r"stopped after step 4: text collapse: as told; .*/model "
                                        r"is of step 2, the last checkpoint before"):  # fmt: skip
        dispatch(config, tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    dispatch(dataclasses.replace(config, steps=2), tmp_path / "two")
    stopped, two = parameters(tmp_path), parameters(tmp_path / "two")
    assert stopped.keys() == two.keys()
    for name, values in stopped.items():
        np.testing.assert_array_equal(values, two[name])

    with pytest.raises(Collapsed, match=r"stopped after step 4: .* is of step 2"):  # the last
        dispatch(dataclasses.replace(config, steps=4), tmp_path / "last")

    gone = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep=1))
    with pytest.raises(Collapsed, match="no checkpoint from before is kept"):
        dispatch(gone, tmp_path / "gone")
    assert not (tmp_path / "gone" / "model").exists()


def test_a_floor_can_be_a_share_of_what_the_initial_model_has_at_full_depth(
    model_dir, tmp_path, monkeypatch, capsys
):
    """The random model gets nothing right, so one that is told apart by temperature stands in."""
    accuracy = {0.7: 0.5, 0.0: 0.8}
    asked = []
    original = Stage._measured

    def measured(self, trainable, *, policy="", **decoding):
        result, made = original(self, trainable, policy=policy, **decoding)
        if policy == "full":
            asked.append(decoding)
            known = accuracy[decoding.get("temperature", 0)]
            result = result.model_copy(update={"accuracy": known})
        return result, made

    monkeypatch.setattr(Stage, "_measured", measured)
    config = make_config(
        "rl", model_dir, steps=3, rl__depth_coef=1.0, rl__accuracy_floor=0.9, rl__temperature=0.7,
        rl__floor_of="initial", checkpoint__every=1, checkpoint__keep_best=1, eval__problems=2,
    )  # fmt: skip
    dispatch(config, tmp_path)
    assert "floors 45.0% of rollouts, 72.0% of the val split" in capsys.readouterr().out
    assert asked == [{"temperature": 0.7, "max_new_tokens": config.rl.max_new_tokens}, {}]
    rows = metrics(tmp_path)
    assert [row["depth_coef"] for row in rows] == [0.0] * 3
    for row in rows:  # 100 a unit of accuracy under 0.72
        assert row["val/reward"] < -70
    dispatch(dataclasses.replace(config, steps=4), tmp_path)  # a resumed run knows its floor
    assert len(asked) == 2


def test_evaluation_writes_what_outsiders_read(rl_run, model_dir, tmp_path, capsys):
    policies = ("full", "sample", "threshold:0.5", "fixed:2")
    run("eval", rl_run, tmp_path, eval__policies=policies, exits__layers=())
    written = json.loads((tmp_path / "eval.json").read_text())
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy and depth" in page and all(policy in page for policy in policies)
    assert written["task"]["name"] == "sums"
    assert [entry["policy"] for entry in written["runs"]] == list(policies)
    for entry in written["runs"]:
        assert entry["problems"] == 6
        assert sum(entry["depth_histogram"].values()) == entry["tokens"]
        assert entry["depth_fraction"] == pytest.approx(entry["depth_mean"] / 3)
        low, high = entry["accuracy_ci95"]
        assert 0 <= low <= entry["accuracy"] <= high <= 1
        assert entry["tokens_per_second"] > 0
    by_policy = {entry["policy"]: entry for entry in written["runs"]}
    assert by_policy["full"]["depth_fraction"] == 1.0
    # The first token of each of the six completions always runs every layer.
    fixed = by_policy["fixed:2"]["depth_histogram"]
    assert fixed == {"2": by_policy["fixed:2"]["tokens"] - 6, "3": 6}
    printed = capsys.readouterr().out
    assert all(policy in printed for policy in policies)


def test_generation_prints_text_with_depths(model_dir, capsys):
    run(
        "generate",
        model_dir,
        None,
        generate__prompts=("sum 372",),
        generate__max_new_tokens=5,
        generate__policy="fixed:2",
        exits__layers=(),
    )
    printed = capsys.readouterr().out
    assert "> sum 372" in printed
    assert "depths: 3 2 2 2 2" in printed


def test_a_run_on_several_tasks_tells_how_each_goes(model_dir, tmp_path):
    settings = {"task__name": "blend", "task__steps": "mixed", "steps": 2, "batch_size": 6}
    run("rl", model_dir, tmp_path, **settings)
    logged = metrics(tmp_path)[-1]
    for name in ("sums", "word_problems", "tom"):
        assert 0.0 <= logged[f"task/{name}/accuracy"] <= 1.0
    assert "task/tom/chain_lines" in logged


def test_figures_about_texts_are_means_over_all_hosts():
    hosts = [{"step_size": (30.0, 10)}, {"step_size": (2.0, 1), "words": (9.0, 3)}, {}]
    assert text_means(hosts) == {"step_size": pytest.approx(32 / 11), "words": 3.0}
    assert text_means([{"step_size": (0.0, 0)}, {}]) == {}  # no step anywhere: no mean


@pytest.mark.parametrize(
    "command",
    ["rl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "pretrain"))],
)
def test_a_run_can_end_with_its_best_checkpoint(command, model_dir, tmp_path, monkeypatch):
    """What is written is the best step's parameters, also when the run was cut after it."""
    name = {"rl": "val/reward", "sft": "-loss", "pretrain": "-loss/text"}[command]
    best = {"checkpoint__every": 2, "checkpoint__keep_best": 1, "checkpoint__final": "best"}
    best |= {"checkpoint__best_metric": name, "checkpoint__keep": 1, "eval__problems": 2}
    # Steps that are large enough to make things worse.
    best |= {"steps": 5, "optim__lora_lr": 0.3, "optim__exit_lr": 0.3, "optim__full_lr": 0.3}
    if command == "pretrain":
        best |= {"pretrain__layers": 3, "pretrain__width": 16, "pretrain__mlp_width": 24}
    stop_after(monkeypatch, step=2)  # with a checkpoint that is not due, and has no score
    with pytest.raises(Interrupted):
        run(command, model_dir, tmp_path / "cut", **best)
    monkeypatch.undo()
    run(command, model_dir, tmp_path / "cut", **best)
    key = name.lstrip("-")
    measured = set().union(*metrics(tmp_path / "cut"))
    assert command == "sft" or set(BEST_METRICS[command]) <= measured
    assert (tmp_path / "cut" / "report.html").exists()
    values = {row["step"]: row[key] for row in metrics(tmp_path / "cut") if key in row}
    assert sorted(values) == ([2, 4, 5] if command == "rl" else [1, 2, 3, 4, 5])
    scores = {step: -value if name.startswith("-") else value for step, value in values.items()}
    means = {
        last: np.mean([scores[step] for step in range(first, last + 1) if step in scores])
        for first, last in ((1, 2), (3, 4), (5, 5))
    }
    winner = max(means, key=lambda step: (means[step], step))
    kept = {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()}
    assert kept == {str(winner), "5"}
    # A run of just so many steps ends with the same parameters: schedules here are constant.
    short = best | {"steps": winner, "checkpoint__final": "last"}
    run(command, model_dir, tmp_path / "short", **short)
    first, second = parameters(tmp_path / "cut"), parameters(tmp_path / "short")
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)


def test_every_metric_that_a_checkpoint_can_be_best_in_is_measured(sft_run):
    assert set(BEST_METRICS["sft"]) <= set(metrics(sft_run)[0])


def test_completions_that_the_model_has_no_positions_for_are_refused_at_the_start(
    model_dir, tmp_path
):
    for settings in ({"rl__max_new_tokens": 300}, {"eval__max_new_tokens": 300}):
        with pytest.raises(ValueError, match=r"max_new_tokens is 300 .* model's 256 positions"):
            run("rl", model_dir, tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()


def test_a_run_that_has_not_finished_holds_no_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="a run that has not finished"):
        jexit.load(tmp_path)


def test_a_run_is_measured_under_the_law_that_it_trains(model_dir, tmp_path):
    """With a floor of 0.9 under the hazards nearly every token leaves at the first exit."""
    settings = {"rl__min_hazard": 0.9, "steps": 1, "eval__problems": 4}
    run("rl", model_dir, tmp_path, **settings)
    before = json.loads((tmp_path / "before.json").read_text())
    run("eval", tmp_path, tmp_path / "eval", eval__problems=4, eval__policies=("sample",))
    (after,) = json.loads((tmp_path / "eval" / "eval.json").read_text())["runs"]
    for measured in (before, after):
        may_leave = measured["tokens"] - measured["problems"]
        assert measured["depth_histogram"]["1"] / may_leave > 0.75
