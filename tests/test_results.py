"""Files of evaluations as records: older ones are read, what does not fit is named."""

import copy
import json
import math

import pytest

from jexit.results import VERSION, Completion, Evaluation, PolicyResult, checked
from report_files import completions, evaluation


def read(value):
    return checked(Evaluation, value, "eval.json")


def changed(value, path, wrong):
    value = copy.deepcopy(value)
    *owner, last = path
    place = value
    for key in owner:
        place = place[key]
    place[last] = wrong
    return value


def test_every_part_of_an_evaluation_is_read():
    value = evaluation()
    found = read(value)
    assert [run.policy for run in found.runs] == [run["policy"] for run in value["runs"]]
    assert found.runs[0].accuracy_ci95 == tuple(value["runs"][0]["accuracy_ci95"])
    assert found.runs[0].depth_by_class["digit"].tokens == 500
    assert found.hazards[0].exits[2].bins[3].positions == 100
    assert found.faithfulness[1].measures[0].curve[5].kept == 1.0
    assert found.faithfulness_paired[0].difference_ci95 == (-0.125, 0.625)
    assert found.capacity[0].step_size is None
    assert found.model.exits == tuple(value["model"]["exits"])
    controls = [run.policy for run in found.runs if run.is_control]
    assert controls == ["fixed:matched", "shuffled"]
    assert [run.kind for run in found.runs][2:5] == ["threshold", "threshold", "fixed"]


def test_an_older_file_is_read_and_unknown_parts_are_passed_over():
    value = evaluation(new_parts=False)
    value["later"] = value["runs"][0]["later"] = {"any": "thing"}
    found = read(value)
    assert (found.version, found.complete) == (0, True)
    assert found.controls is found.hazards is found.faithfulness is found.capacity is None
    for run in found.runs:
        assert run.depth_by_class is run.control_of is run.layers_per_problem_ci95 is None
        assert run.layers_per_problem == pytest.approx(run.depth_mean * 12.5)
    for policy, control in (("fixed:3", False), ("fixed:matched", True), ("fixed:matched:x", True)):
        assert read(changed(value, ("runs", 0, "policy"), policy)).runs[0].is_control == control


def test_what_is_written_is_what_was_set_and_is_read_again(tmp_path):
    value = evaluation() | {"version": VERSION, "complete": False}
    value["runs"][0]["tokens_per_second"] = None  # was not finite
    read(value).write(tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text()) == value
    again = Evaluation.read(tmp_path / "eval.json")
    assert math.isnan(again.runs[0].tokens_per_second) and not again.complete
    found = again.numbers()
    assert found["sample/accuracy_ci95/low"] == value["runs"][1]["accuracy_ci95"][0]
    assert found["sample less shuffled/accuracy_difference"] == 0.62
    assert found["sample/faithfulness/hint/detail/answered"] == 0.31
    assert "full/tokens_per_second" not in found and "full/tokens" in found
    assert all(map(math.isfinite, found.values()))


def test_what_does_not_fit_is_named_in_one_sentence():
    cases = {
        ("runs", 1, "accuracy"): [
            ("high", "runs[1].accuracy is 'high' where a number belongs"),
            (True, "runs[1].accuracy is True where a number belongs"),
            (1.5, "runs[1].accuracy is 1.5 where a share of 0 to 1 belongs"),
            (-1e300, "is -1e+300 where a number up to 1e+15 belongs"),
        ],
        ("runs", 0, "tokens"): [
            (1.5, "runs[0].tokens is 1.5 where a whole number belongs"),
            (10**20, f"is {10**20} where a whole number up to 1e+15 belongs"),
            (-1, "is -1 where a whole number up to 1e+15 belongs"),
        ],
        ("runs", 0, "policy"): [(None, "policy is None where a text belongs")],
        ("runs", 0, "accuracy_ci95"): [
            ([0.1], "accuracy_ci95 is [0.1] where a list of 2 numbers belongs"),
            ([0, 0, 0], "accuracy_ci95 is [0, 0, 0] where a list of 2 numbers belongs"),
        ],
        ("runs", 2, "depth_histogram"): [
            ({"1": 3, key: 4}, f"runs[2].depth_histogram has the key {key!r:.40}")
            for key in ("x", "²", "٣", "-1", "9" * 5000)
        ],
        ("runs",): [({}, "eval.json: runs is {} where a list belongs")],
        ("model",): [([], "model is [] where an object belongs")],
        ("model", "layers"): [(0, "model.layers is 0 where a whole number of at least 1")],
        ("task",): [("sums", "task is 'sums' where an object belongs")],
        ("complete",): [("yes", "complete is 'yes' where true or false belongs")],
        ("version",): [(VERSION + 1, f"reads up to {VERSION}; update jexit")],
        ("hazards", 0, "exits", 0, "bins", 0, "low"): [("x", "bins[0].low is 'x' where")],
        ("capacity", 1, "granularity"): [("²", "a number of operands in the digits 0-9 or a name")],
    }
    for path, wrongs in cases.items():
        for wrong, sentence in wrongs:
            with pytest.raises(ValueError) as caught:
                read(changed(evaluation(), path, wrong))
            said = str(caught.value)
            assert sentence in said and said.startswith("eval.json"), (path, said)
            assert "\n" not in said and said.count("; ") == 1 and len(said) < 200
    for wrong in (None, 3, "text", [], [1]):
        with pytest.raises(ValueError, match=r"^eval\.json is .* where an object belongs; "):
            read(wrong)


def test_each_field_that_was_always_there_is_asked_for():
    value = evaluation(new_parts=False)
    asked = {
        ("runs", 2): [name for name, field in PolicyResult.model_fields.items()
                      if field.is_required()],
        (): ["task", "model", "runs"],
        ("model",): ["path", "layers"],
    }  # fmt: skip
    assert {"accuracy", "depth_mean", "tokens_per_second"} < set(asked["runs", 2])
    for place, names in asked.items():
        for name in names:
            broken = copy.deepcopy(value)
            owner = broken
            for key in place:
                owner = owner[key]
            del owner[name]
            with pytest.raises(ValueError, match=f"lacks '{name}'"):
                read(broken)


def test_completions_have_a_depth_and_hazards_for_each_token():
    value = completions()
    found = checked(tuple[Completion, ...], value, "completions.json")
    assert found[0].tokens == tuple(value[0]["tokens"])
    assert found[3].hazards[0] == (None,) * 5
    for name in ("depths", "hazards"):
        broken = copy.deepcopy(value)
        broken[1][name].pop()
        count = len(broken[1]["tokens"])
        with pytest.raises(ValueError, match=rf"\[1\] has {count - 1} {name} for {count} tokens"):
            checked(tuple[Completion, ...], broken, "completions.json")
