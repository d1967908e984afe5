"""Figures of an evaluation: every policy, interval and curve is where its figures say."""

import json
import re

import numpy as np
import pytest

from jexit.report import figures, tables
from jexit.report.palette import depth_class
from jexit.report.runs import read_run, read_runs
from parsed_page import parse
from report_files import DEPTHS, EXITS, LAYERS, POLICIES, evaluation, write_evaluated, write_json


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return read_run(write_evaluated(tmp_path_factory.mktemp("runs") / "eval"))


def changed(tmp_path, change):
    value = evaluation()
    change(value)
    write_json(tmp_path / "eval.json", value)
    return read_run(tmp_path)


def classed(page, name):
    return [element for element in page if name in element.classes]


def labels(page, name):
    return [text.text for text in page.all("text") if name in text.classes]


def first_point(mark):
    if mark.name == "circle":
        return float(mark.attributes["cx"]), float(mark.attributes["cy"])
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", mark.attributes["d"])]
    xs, ys = numbers[0::2], numbers[1::2]
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


def test_every_policy_is_a_named_point_with_both_intervals(evaluated):
    page = parse(figures.plane([evaluated]))
    assert set(labels(page, "name")) == set(POLICIES)
    marks = [mark for mark in classed(page, "mark") if mark.all("title")]
    assert len(marks) == len(POLICIES)
    assert len(classed(page, "error")) == 2 * len(POLICIES)
    points = {}
    for mark in marks:
        told = re.fullmatch(r"(\S+): ([\d.]+).% right \(.*\) at ([\d.]+).% of .*", mark.text)
        points[told[1]] = (float(told[3]), float(told[2]), *first_point(mark))
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


def test_controls_are_hollow_and_joined_to_what_they_control(evaluated):
    page = parse(figures.plane([evaluated]))
    hollow = {mark.text.partition(": ")[0] for mark in classed(page, "open")}
    assert {re.split(r":(?= )", name)[0] for name in hollow} == {"fixed:matched", "shuffled"}
    links = [path for path in classed(page, "link") if "d" in path.attributes]
    drawn = [link for link in links if link.attributes["d"] != "M1 7H23"]  # not the legend's
    assert len(drawn) == 2
    at = {m.text.partition(": ")[0]: first_point(m) for m in classed(page, "mark") if m.text}
    ends = [
        tuple(map(float, pair.split()))
        for link in drawn
        for pair in link.attributes["d"][1:].split("L")
    ]
    expected = [at["fixed:matched"], at["sample"], at["shuffled"], at["sample"]]
    for end, place in zip(ends, expected, strict=True):
        assert end == pytest.approx(place, abs=1.0)  # a triangle's or diamond's middle, rounded


def test_an_evaluation_of_before_has_no_links_and_one_interval(tmp_path):
    page = parse(figures.plane([read_run(write_evaluated(tmp_path, new_parts=False))]))
    assert not classed(page, "link")
    assert len(classed(page, "error")) == len(POLICIES)


def test_each_task_has_a_plane_of_its_own(tmp_path):
    for name in ("sums", "tom"):
        write_evaluated(tmp_path / name)
        value = json.loads((tmp_path / name / "eval.json").read_text())
        write_json(tmp_path / name / "eval.json", value | {"task": {"name": name}})
    page = parse(figures.plane(read_runs([tmp_path / "sums", tmp_path / "tom"])))
    assert "Accuracy and depth on sums" in page.text and "Accuracy and depth on tom" in page.text
    assert len([mark for mark in classed(page, "mark") if mark.text]) == 2 * len(POLICIES)
    alone = parse(figures.plane(read_runs([tmp_path / "tom"])))
    assert "on tom" not in alone.text


def test_several_runs_share_the_plane_in_colours_of_their_own(tmp_path):
    runs = read_runs([write_evaluated(tmp_path / name, seed) for seed, name in enumerate("ab")])
    page = parse(figures.plane(runs))
    legend = [item.text for item in page.all("li")]
    assert legend[:2] == ["a", "b"]
    named = [mark.text for mark in classed(page, "mark") if mark.text]
    assert sum(text.startswith("a, ") for text in named) == len(POLICIES)
    for mark in classed(page, "mark"):
        if mark.text:
            assert ("s0" in mark.classes) == mark.text.startswith("a, ")


def test_figures_that_are_not_finite_are_left_out(tmp_path):
    def change(value):
        value["runs"][0]["accuracy"] = None
        value["runs"][1]["accuracy_ci95"] = [None, None]
        value["runs"][2]["depth_fraction_ci95"] = None
        value["capacity"][0]["accuracy"] = None
        value["hazards"][0]["exits"][0]["bins"][0]["target_mean"] = None

    run = changed(tmp_path, change)
    drawn = [
        figures.plane([run]),
        figures.capacity(run.evaluation.capacity),
        figures.reliability(run.evaluation.hazards),
    ]
    assert not any(re.search(r"nan|inf\b", page) for page in drawn)
    page = parse(drawn[0])
    assert len(labels(page, "name")) == len(POLICIES) - 1
    assert len(classed(page, "error")) == 2 * (len(POLICIES) - 1) - 2


def test_histograms_add_up_and_are_coloured_by_depth(evaluated):
    page = parse(figures.histograms(evaluated))
    charts = page.all("figure")
    assert [chart.one("strong").text for chart in charts] == list(POLICIES)
    for chart, run in zip(charts, evaluation()["runs"], strict=True):
        bars = [bar for bar in chart.all("rect") if "bar" in bar.classes]
        total = sum(run["depth_histogram"].values())
        assert len(bars) == len(run["depth_histogram"])
        heights = [float(bar.attributes["height"]) for bar in bars]
        counts = run["depth_histogram"].values()
        for bar, height, (depth, count) in zip(
            bars, heights, run["depth_histogram"].items(), strict=True
        ):
            assert height / sum(heights) == pytest.approx(count / total, abs=1e-3)
            assert depth_class(int(depth), LAYERS) in bar.classes
            assert bar.text == f"{depth} layers: {100 * count / total:.1f}\u00a0% of tokens"
        assert len(counts) == len(bars)
        assert [t for t in labels(chart, "tick") if t.isdigit()] == [str(d) for d in DEPTHS]


def test_the_early_answering_curve_rises_with_what_is_kept(evaluated):
    page = parse(figures.early_answering(evaluated.evaluation.faithfulness))
    assert [item.text for item in page.all("li")] == [
        "full: same answer as in the end",
        "full: right answer",
        "sample: same answer as in the end",
        "sample: right answer",
    ]
    assert "100\u00a0%" in labels(page, "tick")
    assert len(classed(page, "dot")) == 2 * 6


def test_agreement_is_drawn_in_relation_to_the_whole_chains(tmp_path):
    def without(value):
        for entry in value["faithfulness"]:
            for point in entry["measures"][0]["curve"]:
                del point["of_whole"]

    heights = {}
    for name, change in (("now", lambda value: None), ("before", without)):
        run = changed(tmp_path / name, change)
        page = parse(figures.early_answering(run.evaluation.faithfulness))
        heights[name] = [first_point(dot)[1] for dot in classed(page, "dot")][:6]
    low, now, before = heights["now"][0], heights["now"][-1], heights["before"][-1]
    assert (low - before) / (low - now) == pytest.approx(0.8, abs=0.01)


def test_steps_that_are_counted_are_ticks_of_whole_steps(tmp_path):
    def change(value):
        for point in value["faithfulness"][0]["measures"][0]["curve"]:
            point["kept"] *= 5

    page = parse(figures.early_answering(changed(tmp_path, change).evaluation.faithfulness))
    assert [t for t in labels(page, "tick") if t.isdigit()] == ["0", "1", "2", "3", "4", "5"]


def test_no_curve_no_figure(tmp_path):
    def change(value):
        for entry in value["faithfulness"]:
            entry["measures"][0]["curve"] = None
        for at_exit in value["hazards"][0]["exits"]:
            at_exit["bins"] = []
        for run in value["runs"]:
            run["depth_histogram"] = {}

    run = changed(tmp_path, change)
    assert figures.early_answering(run.evaluation.faithfulness) is None
    assert figures.reliability(run.evaluation.hazards) is None
    assert figures.histograms(run) is None


def test_begun_steps_have_a_line_a_policy_over_operands(evaluated):
    entries = evaluated.evaluation.begun_steps
    page = parse(figures.begun_steps(entries))
    assert [t for t in labels(page, "tick") if "%" not in t] == ["2", "3"]
    marks = [mark for mark in classed(page, "mark") if mark.all("title")]
    assert marks[-1].text == "sample, 3: 62.5\u00a0%, a result given in 37.5\u00a0%"
    last = [cell.text for cell in parse(tables.begun_steps(entries)).all("tr")[-1].all("td")]
    assert last[0] == "3" and last[1] == "62.5\u00a0%" and last[5] == "240"


def test_capacity_has_a_line_a_policy_over_steps_in_order(evaluated):
    page = parse(figures.capacity(evaluated.evaluation.capacity))
    assert [t for t in labels(page, "tick") if "%" not in t] == ["2", "3", "4", "5", "at once"]
    assert [item.text for item in page.all("li")] == ["full", "sample", "shuffled"]
    marks = [mark for mark in classed(page, "mark") if mark.all("title")]
    assert len(marks) == len(classed(page, "error")) == 15
    assert marks[0].text == "full, 2: 100.0\u00a0%, steps as asked in 98.0\u00a0%"
    hollow = [mark for mark in marks if "open" in mark.classes]
    assert [mark.text.split(":")[0] for mark in hollow] == ["full, 5", "sample, 5", "shuffled, 5"]


def test_reliability_has_a_point_a_bin_that_has_positions(evaluated):
    page = parse(figures.reliability(evaluated.evaluation.hazards))
    assert len(classed(page, "diagonal")) == 1
    marks = [mark for mark in classed(page, "mark") if mark.all("title")]
    assert len(marks) == len(EXITS) * 9  # the tenth bin is empty
    assert marks[0].text == "exit 1: hazard 0.05, target 0.03, 100 positions"
    assert [item.text for item in page.all("li")] == [f"exit {layer}" for layer in EXITS]
