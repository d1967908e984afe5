"""Training curves on the page."""

import math

import numpy as np
import pytest

from jexit.io.metrics import MetricsWriter
from jexit.report.curves import POINTS, thinned, training_figures
from jexit.report.runs import read_run, read_runs
from parsed_page import parse
from report_files import write_evaluated, write_trained


def titles(page):
    return [figure.one("strong").text for figure in page.all("figure")]


def lines(figure, *wanted):
    return [path for path in figure.all("path") if set(wanted) <= path.classes]


def test_accuracy_and_depth_come_first_and_nothing_is_left_out(tmp_path):
    run = read_run(write_trained(tmp_path))
    page = parse(training_figures([run]))
    found = titles(page)
    assert found[:3] == ["Accuracy", "Depth", "Reward"]
    folded = titles(page.one("details"))
    assert folded == ["lr/lora", "step_seconds"]
    assert page.one("summary").text == "All other metrics (2)"
    assert found[3:-2] == [
        "Loss",
        "Distance from the teacher",
        "Completion length",
        "Truncated completions",
        "Where tokens leave",
    ]


def test_a_line_ends_in_its_last_value(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 11):
            writer.write(step, {"accuracy": step / 10, "reward/mean": -step, "odd": 0.125})
    page = parse(training_figures([read_run(tmp_path)]))
    ends = [text.text for text in page.all("text") if "end" in text.classes]
    assert ends == ["100 %", "−10", "0.125"]


def areas(figure):
    """The lower and upper line of each stacked area, in the chart's own units."""
    for path in figure.all("path"):
        if "area" in path.classes:
            pairs = [tuple(map(float, p.split())) for p in path.attributes["d"][1:-1].split("L")]
            half = len(pairs) // 2
            yield path, pairs[half:][::-1], pairs[:half]


def test_exits_are_stacked_from_the_shallowest_up_to_all_tokens(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 41):
            writer.write(step, {"exit/12": 2.0, "exit/5": 1.0, "exit/24": 1.0, "exit/odd": 1.0})
    page = parse(training_figures([read_run(tmp_path)]))
    (figure,) = [f for f in page.all("figure") if f.one("strong").text == "Where tokens leave"]
    assert [item.text for item in figure.all("li")] == ["5", "12", "24"]
    drawn = list(areas(figure))
    (_, foot, first), (_, below, second), (_, last, top) = drawn
    assert first == below and second == last
    height = foot[0][1] - top[0][1]
    shares = [(b[0][1] - t[0][1]) / height for _, b, t in drawn]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)
    assert [path.classes & {"c7", "c16", "c32"} for path, *_ in drawn] == [{"c7"}, {"c16"}, {"c32"}]
    assert titles(page.one("details")) == ["exit/odd"]


def test_a_few_points_are_marked_and_many_get_a_mean(tmp_path):
    few = parse(training_figures([read_run(write_trained(tmp_path / "few", steps=5))]))
    accuracy = few.all("figure")[0]
    assert len([e for e in accuracy if "dot" in e.classes]) == 5
    assert not lines(accuracy, "measured")
    many = parse(training_figures([read_run(write_trained(tmp_path / "many"))]))
    accuracy, depth = many.all("figure")[:2]
    assert not [e for e in accuracy if "dot" in e.classes]
    assert len(lines(accuracy, "measured")) == 1 and len(lines(accuracy, "curve")) == 2
    assert len(lines(depth, "band")) == 1  # the middle 80 % of the tokens
    assert "middle 80 % of tokens" in depth.text


def test_runs_lie_over_each_other_in_colours_of_their_own(tmp_path):
    runs = read_runs(
        [
            write_trained(tmp_path / "a"),
            write_evaluated(tmp_path / "b"),
            write_trained(tmp_path / "c", seed=3, steps=90),
        ]
    )
    accuracy, _, reward = parse(training_figures(runs)).all("figure")[:3]
    assert [item.text for item in accuracy.all("li")] == ["a", "c"]
    assert len(lines(accuracy, "measured", "s0")) == len(lines(accuracy, "measured", "s2")) == 1
    assert [item.text for item in reward.all("li")] == [
        "a, total",
        "a, verifier only",
        "c, total",
        "c, verifier only",
    ]
    assert training_figures(runs[1:2]) is None


def test_gaps_one_step_and_lone_values(tmp_path):
    with MetricsWriter(tmp_path / "gaps", tensorboard=False) as writer:
        for step in range(1, 60):
            loss = math.nan if step % 7 == 0 or step > 50 else 1.0
            slow = 60.0 if step == 1 else 1.0
            writer.write(step, {"loss": loss, "never": math.nan, "slow": slow, "share": [1, 2]})
    drawn = training_figures([read_run(tmp_path / "gaps")])
    page = parse(drawn)
    assert titles(page) == ["Loss", "share/00", "share/01", "slow"]
    assert "nan" not in drawn
    assert lines(page.all("figure")[0], "measured")[0].attributes["d"].count("M") == 8
    ticks = [text.text for text in page.all("figure")[3].all("text") if "tick" in text.classes]
    assert "60" not in ticks
    one = parse(training_figures([read_run(write_trained(tmp_path / "one", steps=1))]))
    assert titles(one)[0] == "Accuracy"


def test_long_runs_are_thinned_to_their_extremes():
    steps = np.arange(100_000)
    values = np.sin(steps / 3e3)
    values[12_345], values[54_321], values[70_000:80_000] = 9.0, -9.0, np.nan
    at, kept = thinned(steps, values)
    assert len(at) == len(kept) <= POINTS
    assert (np.diff(at) > 0).all()
    assert kept[at == 12_345] == [9.0] and kept[at == 54_321] == [-9.0]
    assert np.isnan(kept[(at >= 70_500) & (at < 79_500)]).all()
    short = thinned(steps[:POINTS], values[:POINTS])
    np.testing.assert_array_equal(short[1], values[:POINTS])
