"""Evaluation end to end on a small random model."""

import collections
import dataclasses
import json
import math

import pytest

from jexit.config import EVAL_MEASURES, TINY_CALIBRATED_PATH
from jexit.data.tokenizer import Tokenizer
from jexit.evaluation.accuracy import Examination, evaluate_policy, held_out, policy_result
from jexit.evaluation.faithfulness import LIKELIHOODS
from jexit.evaluation.finished import FinishedPolicies
from jexit.evaluation.measures import Measurer
from jexit.loops.setup import load_task
from jexit.results import VERSION, Evaluation
from jexit.tasks import Attempt, Verdict
from small_runs import make_config, run

POLICIES = (
    *("full", "threshold:0.2", "shuffled:threshold:0.2", "fixed:matched:threshold:0.2"),
    "confidence:0.1",
)


def evaluate(model_dir, workdir, **settings):
    run(
        "eval", model_dir, workdir, eval__policies=POLICIES, eval__measures=EVAL_MEASURES,
        eval__measured="threshold:0.2", eval__problems=12, exits__layers=(), **settings,
    )  # fmt: skip
    return workdir


@pytest.fixture(scope="module")
def workdir(model_dir, tmp_path_factory):
    return evaluate(model_dir, tmp_path_factory.mktemp("eval") / "run")


@pytest.fixture(scope="module")
def evaluation(workdir):
    return Evaluation.read(workdir / "eval.json")


@pytest.mark.slow
def test_a_mesh_measures_what_one_device_does(evaluation, model_dir, tmp_path):
    axes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    sharded = Evaluation.read(evaluate(model_dir, tmp_path / "run", **axes) / "eval.json")
    assert_same(evaluation.model_dump(), sharded.model_dump())


def test_an_evaluation_that_was_stopped_continues_after_its_finished_policies(
    evaluation, workdir, model_dir, tmp_path, monkeypatch
):
    stopped, decoded = tmp_path / "run", []

    def stop(*_):
        raise KeyboardInterrupt

    def recorded(decoder, examination, policy):
        decoded.append(policy)
        return evaluate_policy(decoder, examination, policy)

    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stopping.setattr("jexit.loops.evaluate.evaluate_control", stop)
        evaluate(model_dir, stopped)
    assert sorted(path.stem for path in (stopped / "policies").iterdir()) == sorted(POLICIES[:2])
    monkeypatch.setattr("jexit.loops.evaluate.evaluate_policy", recorded)
    resumed = Evaluation.read(evaluate(model_dir, stopped) / "eval.json")
    assert decoded == [*POLICIES[4:]]
    assert_same(evaluation.model_dump(), resumed.model_dump())
    for name in ("problems.csv", "completions.json"):
        assert (stopped / name).read_bytes() == (workdir / name).read_bytes()
    assert not (stopped / "policies").exists()


def test_what_another_model_or_other_problems_gave_is_not_finished(tmp_path, model_dir):
    config = make_config("eval", model_dir, task__name="sums", eval__problems=3)
    tokenizer = Tokenizer.load(TINY_CALIBRATED_PATH)
    examination = Examination.of(load_task(config.task, "test"), tokenizer, config)
    attempts = [
        Attempt(
            text=tokenizer.completion_text(ids),
            ids=ids,
            depths=[3, 1],
            truncated=cut,
            verdict=Verdict(kind=kind, reward=reward, parts={"style": 0.5}),
        )
        for ids, kind, reward, cut in (
            ([5, 2], "strict", 1.0, False),
            ([6, 2], "wrong", 0.0, True),
            ([7, 2], "none", -1.0, False),
        )
    ]
    result = policy_result("full", examination, attempts, 3, tokens_per_second=math.nan)
    finished = FinishedPolicies(tmp_path / "policies", "0123abcd", examination)
    assert finished.read("full") is None
    finished.write("full", result, attempts)
    assert finished.read("sample") is None
    found, replies = finished.read("full")
    assert replies == attempts and str(found) == str(result)
    assert dataclasses.replace(finished, model="4567cdef").read("full") is None
    fewer = dataclasses.replace(examination, problems=examination.problems[:2])
    assert dataclasses.replace(finished, examination=fewer).read("full") is None
    finished.clear()
    assert finished.read("full") is None


def assert_same(first, second, name="eval.json"):
    """All numbers are equal up to rounding, except for wall-clock times."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first.keys() - {"tokens_per_second"}:
            assert_same(first[key], second[key], f"{name}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), name
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{name}/{index}")
    elif isinstance(first, float):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5, nan_ok=True), name
    else:
        assert first == second, name


def test_controls_run_at_the_depth_of_what_they_control(evaluation):
    runs = {entry.policy: entry for entry in evaluation.runs}
    assert [entry.control_of for entry in evaluation.runs] == [None, None, *[POLICIES[1]] * 2, None]
    ours, shuffled, fixed = (runs[name] for name in POLICIES[1:4])
    assert len(ours.depth_histogram) > 2, "the threshold should stop tokens at several exits"
    assert shuffled.depth_fraction == pytest.approx(ours.depth_fraction, abs=0.08)
    assert shuffled.tokens == ours.tokens  # as many passes: the very same depths
    assert shuffled.depth_histogram == ours.depth_histogram
    # Exits lie a layer apart here: one of twelve completions moves the mean by about 1 / 12.
    assert abs(fixed.depth_mean - ours.depth_mean) < 1 / 12
    assert len(set(map(int, fixed.depth_histogram)) - {3}) <= 2
    pairs = [(pair.policy, pair.control) for pair in evaluation.controls]
    assert pairs == [(POLICIES[1], POLICIES[2]), (POLICIES[1], POLICIES[3])]
    for pair in evaluation.controls:
        for name in ("accuracy", "depth_fraction"):
            difference = getattr(ours, name) - getattr(runs[pair.control], name)
            assert getattr(pair, f"{name}_difference") == pytest.approx(difference)
            low, high = getattr(pair, f"{name}_difference_ci95")
            assert low <= difference <= high


def test_numbers_of_a_policy_agree_with_each_other(evaluation):
    for entry in evaluation.runs:
        classes = entry.depth_by_class
        assert "end" not in classes or classes["end"].tokens <= entry.problems
        assert sum(part.tokens for part in classes.values()) == entry.tokens - entry.problems
        layers = sum(part.tokens * part.depth_mean for part in classes.values())
        assert layers + 3 * entry.problems == pytest.approx(entry.depth_mean * entry.tokens)
        low, high = entry.depth_fraction_ci95
        assert low <= entry.depth_fraction <= high
        spent = sum(int(depth) * count for depth, count in entry.depth_histogram.items())
        assert entry.layers_per_problem == pytest.approx(spent / entry.problems)
        low, high = entry.layers_per_problem_ci95
        assert low <= entry.layers_per_problem <= high
        assert low < high or len(entry.depth_histogram) == 1
        assert entry.compute_fraction >= entry.depth_fraction  # keys and values are computed anyway


def test_every_measure_is_there_for_the_policy_and_for_full_depth(evaluation):
    both = [POLICIES[1], "full"]
    assert [entry.policy for entry in evaluation.faithfulness] == both
    granularities = [entry.granularity for entry in evaluation.capacity]
    assert granularities[::2] == ["2", "3", "4", "5", "at_once"]
    assert [entry.policy for entry in evaluation.capacity] == both * 5
    assert {entry.policy for entry in evaluation.begun_steps} == set(both)
    (serial,) = evaluation.serial_depth
    assert serial.policy == POLICIES[1] and list(serial.by_depth) == ["1", "2", "3"]
    assert min(serial.by_depth.values()) <= serial.mean <= serial.full == serial.by_depth["3"]
    probes = {(probe.policy, probe.ahead, probe.layer) for probe in evaluation.planning}
    assert {(policy, 1, layer) for policy in both for layer in (1, 2, 3)} <= probes
    for entry in evaluation.faithfulness:
        for measure in entry.measures:
            if measure.name in LIKELIHOODS:
                assert measure.detail["logprob"] < 0 and -1 <= measure.value <= 1
    (hazards,), (exits,) = evaluation.hazards, evaluation.exits
    assert hazards.policy == POLICIES[1] and 0 <= hazards.ece <= 1
    assert exits.policy == "full" and [entry.exit for entry in exits.exits] == [1, 2]
    pairs = {pair.measure: pair for pair in evaluation.faithfulness_paired}
    runs = {entry.policy: entry for entry in evaluation.runs}
    accuracy = pairs.pop("accuracy")
    assert (accuracy.policy, accuracy.against, accuracy.problems) == (*both, 12)
    assert accuracy.value == pytest.approx(runs[POLICIES[1]].accuracy)
    assert accuracy.against_value == pytest.approx(runs["full"].accuracy)
    low, high = accuracy.difference_ci95
    assert low <= accuracy.difference <= high and high > low
    ours, theirs = (
        {measure.name: measure.problems for measure in entry.measures}
        for entry in evaluation.faithfulness
    )
    for name, pair in pairs.items():
        assert 0 < pair.problems <= min(ours[name], theirs[name])


def test_the_files_have_what_readers_rely_on(workdir):
    written = json.loads((workdir / "eval.json").read_text())
    assert written["version"] == VERSION and written["complete"] is True
    assert written["task"]["name"] == "sums" and written["split"] == "test"
    assert written["model"]["layers"] == 3 and written["model"]["exits"] == [1, 2]
    promised = {
        "policy", "accuracy", "accuracy_ci95", "depth_mean", "depth_fraction", "problems",
        "tokens", "tokens_per_second", "layers_per_problem",
    }  # fmt: skip
    assert all(promised < set(entry) for entry in written["runs"])
    assert (workdir / "report.html").exists()
    rows = json.loads((workdir / "completions.json").read_text())
    kept = collections.Counter(row["policy"] for row in rows)
    assert kept == dict.fromkeys(POLICIES, 8)  # eval.heat_maps, of twelve
    for row in rows:
        if row["policy"].startswith("fixed:matched"):
            assert len(set(row["depths"][1:])) <= 1  # a completion has one exit
        assert len(row["tokens"]) == len(row["depths"]) == len(row["hazards"])
        assert row["hazards"][0] == [None, None]
        for depth, hazards in list(zip(row["depths"], row["hazards"], strict=True))[1:]:
            assert [hazard is not None for hazard in hazards] == [depth >= 1, depth >= 2]
            if row["policy"] in (POLICIES[1], POLICIES[-1]):
                most = float(row["policy"].partition(":")[2])
                left = [hazard is not None and hazard > most for hazard in hazards]
                assert depth == next((e + 1 for e in (0, 1) if left[e]), 3)


def test_hazards_are_those_that_were_sampled_and_outlive_a_measure_that_fails(
    model_dir, tmp_path, monkeypatch
):
    """With a floor of 0.6 and a temperature of 100 each hazard is near 0.6 + 0.4 · ½."""

    def fails(self, granularity):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(Measurer, "_capacity", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        run(
            "eval", model_dir, tmp_path / "run", eval__policies=("sample",), eval__problems=4,
            eval__measures=("capacity",), rl__min_hazard=0.6, rl__hazard_temperature=100.0,
        )  # fmt: skip
    rows = json.loads((tmp_path / "run" / "completions.json").read_text())
    recorded = [h for row in rows for token in row["hazards"] for h in token if h is not None]
    assert recorded and all(0.75 < hazard < 0.85 for hazard in recorded)
    kept = Evaluation.read(tmp_path / "run" / "eval.json")
    assert not kept.complete and kept.capacity == ()
    assert [entry.policy for entry in kept.runs] == ["sample"]


def test_what_cannot_be_measured_is_refused_before_anything_runs(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("jexit.evaluation.completer.FILLERS", ("sum ",))
    for settings, says in (
        ({"eval__measures": ("filler",)}, "remove 'filler' and 'substantivity' from config"),
        ({"eval__measures": ("substantivity",)}, "remove 'filler' and 'substantivity' from config"),
        ({"eval__policies": ("full", "fixed:4")}, "Fixed has depth 4, but a token of this model"),
        ({"eval__policies": ("shuffled:full", "full")}, "put 'full' before it"),
        ({"eval__measured": "shuffled"}, "policy 'shuffled' is not known"),
        ({"eval__max_new_tokens": 250}, "together exceed the model's 256 positions; lower config"),
        (
            {"eval__measures": ("exits", "capacity"), "task__name": "word_problems"},
            r"contains capacity, but task 'word_problems' cannot .* step; set .*\('exits',\)",
        ),
        (
            {"eval__measures": ("hint", "capacity"), "task__name": "blend"},
            r"contains hint, capacity, but the completions of task 'blend' are not .*\(\)",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            run("eval", model_dir, tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()


def test_a_generated_split_of_which_every_prompt_is_too_long_is_refused():
    config = make_config(
        "eval", TINY_CALIBRATED_PATH, task__name="sums", task__max_prompt_tokens=2,
        task__skip_long=True, eval__split="test",
    )  # fmt: skip
    task, tokenizer = load_task(config.task, "test"), Tokenizer.load(TINY_CALIBRATED_PATH)
    with pytest.raises(ValueError, match="every prompt in the 'test' split of task 'sums' is lon"):
        held_out(task, tokenizer, config, 4)


def test_a_split_with_fewer_problems_than_asked_for_is_measured_whole_and_said(caplog):
    config = make_config(
        "eval", TINY_CALIBRATED_PATH, task__name="sums", task__options__operands_min=2,
        task__options__operands_max=2, eval__problems=256, eval__split="test",
    )  # fmt: skip
    tokenizer = Tokenizer.load(TINY_CALIBRATED_PATH)
    problems, _ = held_out(load_task(config.task, "test"), tokenizer, config, 256)
    assert 3 <= len(problems) < 30
    assert len({problem.prompt for problem in problems}) == len(problems)
    said = f"'sums' has only {len(problems)} problems in its test split with these settings, but"
    assert said in caplog.text and "eval.problems is 256" in caplog.text
