"""Files of evaluations as records: what is missing or of another type is named."""

import copy
import dataclasses
import math

import pytest

from jexit.loops.policies import PolicyResult
from jexit.report.records import Completion, Evaluation, PolicyFigures, build, build_list
from report_files import completions, evaluation


def test_every_part_of_an_evaluation_is_read():
    value = evaluation()
    read = build(Evaluation, value, "eval")
    assert [run.policy for run in read.runs] == [run["policy"] for run in value["runs"]]
    assert read.runs[0].accuracy_ci95 == tuple(value["runs"][0]["accuracy_ci95"])
    assert read.runs[0].depth_by_class["digit"].tokens == 500
    assert read.hazards[0].exits[2].bins[3].positions == 100
    assert read.faithfulness[1].measures[0].curve[5].kept == 1.0
    assert read.faithfulness_paired[0].difference_ci95 == (-0.125, 0.625)
    assert read.capacity[0].step_size is None
    assert read.model.exits == tuple(value["model"]["exits"])


def test_parts_that_came_later_may_be_absent_and_unknown_ones_are_passed_over():
    value = evaluation(new_parts=False)
    value["later"] = value["runs"][0]["later"] = {"any": "thing"}
    read = build(Evaluation, value, "eval")
    assert read.controls is read.hazards is read.faithfulness is read.capacity is None
    assert read.faithfulness_paired is None
    assert read.runs[0].depth_by_class is None and read.runs[0].control_of is None


def test_layers_a_problem_of_an_older_file_follow_from_its_means():
    old, new = (
        build(Evaluation, evaluation(new_parts=part), "eval").runs for part in (False, True)
    )
    written = evaluation()["runs"]
    assert [run.layers_per_problem for run in new] == [r["layers_per_problem"] for r in written]
    for run in old:
        assert run.layers_per_problem == pytest.approx(run.depth_mean * 12.5)
        assert run.layers_per_problem_ci95 is None


def test_what_an_evaluation_of_today_writes_is_read_field_by_field():
    names = {field.name for field in dataclasses.fields(PolicyResult)}
    assert names <= {field.name for field in dataclasses.fields(PolicyFigures)}


def test_a_control_is_one_by_name_or_by_what_it_matches():
    read = build(Evaluation, evaluation(), "eval")
    controls = [run.policy for run in read.runs if run.is_control]
    assert controls == ["fixed:matched", "shuffled"]
    assert [run.kind for run in read.runs][2:5] == ["threshold", "threshold", "fixed"]


def test_a_fixed_exit_is_a_control_only_where_it_matches_a_policy():
    value = evaluation(new_parts=False)
    for policy, control in (("fixed:3", False), ("fixed:matched", True), ("fixed:matched:x", True)):
        value["runs"][0]["policy"] = policy
        assert build(Evaluation, value, "eval").runs[0].is_control == control


def test_null_is_a_figure_that_was_not_finite():
    value = evaluation()
    value["runs"][0]["accuracy"] = None
    value["runs"][0]["accuracy_ci95"] = [None, 1]
    read = build(Evaluation, value, "eval").runs[0]
    assert math.isnan(read.accuracy) and math.isnan(read.accuracy_ci95[0])


@pytest.mark.parametrize(
    "path, wrong, sentence",
    [
        (("runs", 1, "accuracy"), "high", r"eval\.runs\[1\]\.accuracy is 'high' where a number"),
        (("runs", 1, "accuracy"), True, r"accuracy is True where a number"),
        (("runs", 0, "tokens"), 1.5, r"eval\.runs\[0\]\.tokens is 1\.5 where a whole number"),
        (("runs", 0, "policy"), None, r"policy is None where a text"),
        (("runs", 0, "accuracy_ci95"), [0.1], r"accuracy_ci95 is \[0\.1\] where a list of 2"),
        (("runs",), {}, r"eval\.runs is \{\} where a list"),
        (("model",), [], r"eval\.model is \[\] where an object"),
        (("task",), "sums", r"eval\.task is 'sums' where an object"),
        (("hazards", 0, "exits", 0, "bins", 0, "low"), "x", r"bins\[0\]\.low is 'x'"),
    ],
)
def test_a_value_of_another_type_is_named(path, wrong, sentence):
    said = refusal(path, wrong, sentence)
    assert "\n" not in said and "again" in said


def refusal(path, wrong, sentence):
    """What is said of an evaluation with another value at a place, which matches `sentence`."""
    value = evaluation()
    *owner, last = path
    place = value
    for key in owner:
        place = place[key]
    place[last] = wrong
    with pytest.raises(ValueError, match=sentence) as caught:
        build(Evaluation, value, "eval")
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "wrong", "sentence"),
    [
        (("model", "layers"), 0, r"eval\.model has 0 layers where at least 1 belongs; run what"),
        (("model", "layers"), -3, r"eval\.model has -3 layers where"),
        (
            ("runs", 2, "depth_histogram"),
            {"1": 3, "x": 4},
            r"eval\.runs\[2\] has depth_histogram for 'x' layers where a number of layers",
        ),
        (("runs", 0, "depth_histogram"), {"²": 4}, r"for '²' layers where"),
        (("runs", 0, "depth_histogram"), {"٣": 4}, r"for '٣' layers where"),
        (("runs", 0, "depth_histogram"), {"-1": 4}, r"for '-1' layers where"),
        (("runs", 0, "depth_histogram"), {"9" * 5000: 4}, r"for '9{39}… layers where"),
        (
            ("capacity", 1, "granularity"),
            "²",
            r"eval\.capacity\[1\] has granularity '²' where a number of operands .* or a name",
        ),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_named(path, wrong, sentence):
    said = refusal(path, wrong, sentence)
    assert "\n" not in said and said.endswith("this file again")


def test_each_field_that_was_always_there_is_asked_for():
    value = evaluation(new_parts=False)
    for key in ("accuracy", "accuracy_ci95", "depth_mean", "depth_fraction", "problems", "tokens"):
        broken = copy.deepcopy(value)
        del broken["runs"][2][key]
        with pytest.raises(ValueError, match=rf"eval\.runs\[2\] lacks '{key}'"):
            build(Evaluation, broken, "eval")
    for key in ("task", "model", "runs"):
        with pytest.raises(ValueError, match=f"eval lacks '{key}'"):
            build(Evaluation, {k: v for k, v in value.items() if k != key}, "eval")


@pytest.mark.parametrize("wrong", [None, 3, "text", [], [1]])
def test_what_is_no_object_is_said_to_be_none(wrong):
    with pytest.raises(ValueError, match=r"eval is .* where an object belongs"):
        build(Evaluation, wrong, "eval")


def test_completions_have_a_depth_and_hazards_for_each_token():
    value = completions()
    read = build_list(Completion, value, "completions")
    assert read[0].tokens == tuple(value[0]["tokens"])
    assert read[3].hazards[0] == (None,) * 5
    for name in ("depths", "hazards"):
        broken = copy.deepcopy(value)
        broken[1][name].pop()
        count = len(broken[1]["tokens"])
        with pytest.raises(
            ValueError, match=rf"completions\[1\] has {count - 1} {name} for {count} tokens"
        ):
            build_list(Completion, broken, "completions")
