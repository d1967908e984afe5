"""Files of evaluations as records: what is written is read, what does not fit is named."""

import copy
import functools
import json
import math
import operator

import pytest

from jexit.results import VERSION, Completion, Evaluation, PolicyResult, checked
from report_files import completions, evaluation


def read(value):
    return checked(Evaluation, value, "eval.json")


def changed(path, wrong):
    """An evaluation with another value at a path."""
    value = evaluation()
    functools.reduce(operator.getitem, path[:-1], value)[path[-1]] = wrong
    return value


def test_what_is_written_is_what_was_set_and_is_read_again(tmp_path):
    value = evaluation() | {"complete": False}
    value["runs"][0]["tokens_per_second"] = None  # was not finite
    read(value | {"later": {"any": "thing"}}).write(tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text()) == value
    again = Evaluation.read(tmp_path / "eval.json")
    assert math.isnan(again.runs[0].tokens_per_second) and not again.complete
    assert [run.policy for run in again.runs if run.is_control] == ["fixed:matched", "shuffled"]
    assert [run.kind for run in again.runs][2:5] == ["threshold", "threshold", "fixed"]
    found = again.numbers()
    assert found["sample/accuracy_ci95/low"] == value["runs"][1]["accuracy_ci95"][0]
    assert found["sample less shuffled/accuracy_difference"] == 0.62
    assert found["sample less full/faithfulness/hint/difference_ci95/high"] == 0.625
    assert found["sample/faithfulness/hint/detail/answered"] == 0.31
    assert found["full/capacity/at_once/accuracy"] == 0.35
    assert found["sample/begun_steps/3/obeyed"] == 0.375 and found["sample/hazards/ece"] == 0.0431
    assert "full/tokens_per_second" not in found and "full/tokens" in found
    assert all(map(math.isfinite, found.values()))


def test_a_file_with_the_promised_fields_alone_is_read():
    """Those of DESIGN, and what any file has had besides."""
    asked = {name for name, field in PolicyResult.model_fields.items() if field.is_required()}
    assert asked == {
        "policy", "accuracy", "accuracy_ci95", "depth_mean", "depth_fraction", "problems",
        "tokens", "tokens_per_second",
    }  # fmt: skip
    value = {key: evaluation()[key] for key in ("task", "model", "runs")}
    value["runs"] = [{key: run[key] for key in asked} for run in value["runs"]]
    found = read(value)
    assert (found.version, found.complete, found.capacity) == (0, True, ())
    for place, names in (("runs", asked), ("model", ["path", "layers"]), (None, value)):
        for name in names:
            broken = copy.deepcopy(value)
            del {None: broken, "runs": broken["runs"][2], "model": broken["model"]}[place][name]
            with pytest.raises(ValueError, match=f"lacks the field '{name}'"):
                read(broken)


def test_what_does_not_fit_is_named_in_one_sentence():
    cases = {
        ("runs", 1, "accuracy"): [
            ("high", "runs[1].accuracy is 'high', but it must be a number"),
            (True, "runs[1].accuracy is True, but it must be a number"),
            (None, "runs[1].accuracy is None, but it must be a number"),
            (1.5, "runs[1].accuracy is 1.5, but it must be a fraction from 0 to 1"),
            (-1e300, "is -1e+300, but it must be a number from -1e+15 to 1e+15"),
        ],
        ("runs", 0, "tokens"): [
            (1.5, "runs[0].tokens is 1.5, but it must be a whole number"),
            (-1, "is -1, but it must be a whole number from 0 to 1e+15"),
        ],
        ("runs", 0, "policy"): [(None, "policy is None, but it must be a string")],
        ("runs", 0, "accuracy_ci95"): [([0.1], "is [0.1], but it must be a list of 2 numbers")],
        ("runs", 2, "depth_histogram"): [
            ({"1": 3, key: 4}, f"runs[2].depth_histogram has the key {key!r:.40}")
            for key in ("x", "²", "-1", "9" * 5000)
        ],
        ("runs",): [({}, "eval.json: runs is {}, but it must be a list")],
        ("model",): [([], "model is [], but it must be an object")],
        ("model", "layers"): [
            (0, "model.layers is 0, but it must be a whole number of at least 1")
        ],
        ("task",): [("sums", "task is 'sums', but it must be an object")],
        ("complete",): [("yes", "complete is 'yes', but it must be true or false")],
        ("version",): [(VERSION + 1, f"reads versions up to {VERSION}; update jexit")],
        ("hazards", 0, "exits", 0, "bins", 0, "low"): [("x", "bins[0].low is 'x', but it")],
    }
    wrongs = [
        (changed(path, wrong), sentence)
        for path, pairs in cases.items()
        for wrong, sentence in pairs
    ]
    wrongs += [(wrong, "but it must be an object") for wrong in (None, 3, "text", [1])]
    for value, sentence in wrongs:
        with pytest.raises(ValueError) as caught:
            read(value)
        said = str(caught.value)
        assert sentence in said and said.startswith("eval.json"), said
        assert "\n" not in said and said.count("; ") == 1 and len(said) < 200


def test_completions_have_a_depth_and_hazards_for_each_token():
    value = completions()
    found = checked(tuple[Completion, ...], value, "completions.json")
    assert found[3].hazards[0] == (None,) * 5
    for name in ("depths", "hazards"):
        broken = copy.deepcopy(value)
        broken[1][name].pop()
        count = len(broken[1]["tokens"])
        with pytest.raises(ValueError, match=rf"\[1\] has {count - 1} {name} for {count} tokens"):
            checked(tuple[Completion, ...], broken, "completions.json")
