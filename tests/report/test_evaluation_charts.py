"""Charts of an evaluation: every policy, interval and curve is where its numbers say."""

import re

import numpy as np
import pytest
from drawn_shapes import classed, corners, middle, words

from jexit.report import evaluation_charts as charts
from jexit.report.colours import depth_class
from jexit.report.runs import read_run, read_runs
from jexit.results import Evaluation
from report_files import DEPTHS, EXITS, LAYERS, POLICIES, evaluation, write_evaluated, write_json


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return read_run(write_evaluated(tmp_path_factory.mktemp("runs") / "eval"))


def test_every_policy_is_a_named_point_with_both_intervals(evaluated):
    (chart,) = charts.accuracy_over_depth([evaluated])
    assert set(words(chart, "name")) == {name.removeprefix("threshold:") for name in POLICIES}
    assert [text for text, _ in chart.legend] == [
        "leaves at a hazard above this number",
        "a control and the policy whose depth it matches",
    ]
    marks = classed(chart, "mark")
    assert len(marks) == len(POLICIES) and len(classed(chart, "error")) == 2 * len(POLICIES)
    points = {}
    for mark in marks:
        told = re.fullmatch(r"(\S+): ([\d.]+).% correct \(.*\) at ([\d.]+).% of .*", mark.title)
        points[told[1]] = (float(told[3]), float(told[2]), *middle(mark))
    for run in evaluation()["runs"]:
        depth, accuracy, *_ = points[run["policy"]]
        assert depth == pytest.approx(100 * run["depth_fraction"], abs=0.051)
        assert accuracy == pytest.approx(100 * run["accuracy"], abs=0.051)
    # Both axes are linear: to the right is deeper, higher is better.
    depths, accuracies, xs, ys = np.array(list(points.values())).T
    for values, places, sign in ((depths, xs, 1), (accuracies, ys, -1)):
        slope, start = np.polyfit(values, places, 1)
        np.testing.assert_allclose(start + slope * values, places, atol=1.0)
        assert sign * slope > 0
    for text in classed(chart, "name"):
        named = [name for name in POLICIES if name.removeprefix("threshold:") == text.text]
        *_, x, y = points[named[0]]
        assert abs(text.x - x) < 50 and abs(text.y - y) < 50, text
    hollow = {mark.title.split(": ")[0] for mark in classed(chart, "open")}
    assert hollow == {"fixed:matched", "shuffled"}
    ends = [end for link in classed(chart, "link") for end in corners(link)]
    joined = ("fixed:matched", "sample", "shuffled", "sample")
    for end, name in zip(ends, joined, strict=True):
        assert end == pytest.approx(points[name][2:], abs=1.0)


def test_runs_share_a_chart_in_their_colours_and_each_task_has_its_own(tmp_path):
    paths = [write_evaluated(tmp_path / name, seed) for seed, name in enumerate("ab")]
    (chart,) = charts.accuracy_over_depth(read_runs(paths))
    assert [text for text, _ in chart.legend][:2] == ["a", "b"]
    for mark in classed(chart, "mark"):
        assert ("s0" in mark.classes.split()) == mark.title.startswith("a, ")
    write_json(paths[1] / "eval.json", evaluation() | {"task": {"name": "tom"}})
    titles = [chart.title for chart in charts.accuracy_over_depth(read_runs(paths))]
    assert titles == ["Accuracy and depth on sums", "Accuracy and depth on tom"]


def test_histograms_add_up_and_are_coloured_by_depth(evaluated):
    drawn = charts.histograms(evaluated)
    assert [chart.title for chart in drawn] == list(POLICIES)
    for chart, run in zip(drawn, evaluation()["runs"], strict=True):
        counts, bars = run["depth_histogram"], classed(chart, "bar")
        total = sum(counts.values())
        for bar, (depth, count) in zip(bars, counts.items(), strict=True):
            top = float(re.search(r"V([\d.]+)H", bar.d)[1])
            share = (chart.bottom - top) / (chart.bottom - chart.top)
            assert share == pytest.approx(count / total, abs=1e-3)
            assert depth_class(int(depth), LAYERS) in bar.classes.split()
            assert bar.title == f"{depth} layers: {100 * count / total:.1f}\u00a0% of tokens"
        assert [t for t in words(chart) if t.isdigit()] == [str(d) for d in DEPTHS]


def test_early_answering_is_drawn_in_relation_to_the_whole_chain():
    value = evaluation()
    curve = value["faithfulness"][1]["measures"][0]["curve"]
    for point in curve:
        point["of_whole"] = None  # as when the whole chain gives none of the answers again
    chart = charts.early_answering(Evaluation(**value).faithfulness)
    assert [text for text, _ in chart.legend] == [
        f"{policy}: {what}"
        for policy in ("full", "sample")
        for what in ("same answer as in the end", "correct answer")
    ]
    marks = classed(chart, "mark")
    told = "full, 100\u00a0% of the steps kept: same answer as in the end in 100.0\u00a0%"
    assert marks[5].title == told
    low, whole, as_counted = (middle(marks[index])[1] for index in (0, 5, 17))
    assert (low - as_counted) / (low - whole) == pytest.approx(0.8, abs=0.01)
    for entry in value["faithfulness"]:
        entry["measures"][0]["curve"] = None
    assert charts.early_answering(Evaluation(**value).faithfulness) is None


def test_capacity_has_a_line_a_policy_over_steps_in_order(evaluated):
    chart = charts.prescribed_steps(evaluated.evaluation.capacity)
    assert [t for t in words(chart) if "%" not in t] == ["2", "3", "4", "5", "at once"]
    assert [text for text, _ in chart.legend] == ["full", "sample", "shuffled"]
    marks = classed(chart, "mark")
    assert len(marks) == len(classed(chart, "error")) == 15
    assert marks[0].title == "full, 2: 100.0\u00a0%, steps as asked in 98.0\u00a0%"
    hollow = [mark.title.split(":")[0] for mark in classed(chart, "open")]
    assert hollow == ["full, 5", "sample, 5", "shuffled, 5"]
    begun = charts.begun_steps(evaluated.evaluation.begun_steps)
    last = classed(begun, "mark")[-1]
    assert last.title == "sample, 3: 62.5\u00a0%, a result given in 37.5\u00a0%"


def test_reliability_has_a_point_a_bin(evaluated):
    (chart,) = charts.reliability(evaluated.evaluation.hazards)
    assert len(classed(chart, "diagonal")) == 1
    marks = classed(chart, "mark")
    assert len(marks) == len(EXITS) * 9
    assert marks[0].title == "exit 1: hazard 0.05, target 0.03, 100 positions"
    assert middle(marks[4]) == pytest.approx((chart.x(0.45), chart.y(0.45**1.15)), abs=0.1)
    assert [text for text, _ in chart.legend] == [f"exit {layer}" for layer in EXITS]
