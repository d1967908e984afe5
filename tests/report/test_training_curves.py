"""Training curves of every kind of run, on the page and as files."""

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from drawn_shapes import classed, corners

from jexit.io.metrics import MetricsWriter
from jexit.report.charts import Text
from jexit.report.runs import read_run, read_runs
from jexit.report.training_curves import (
    DEPTHS,
    OTHER,
    PANELS,
    POINTS,
    running_mean,
    thinned,
    training_charts,
    write_charts,
)
from report_files import write_evaluated, write_json, write_trained


def write_metrics(workdir, command="", rows=()):
    write_json(workdir / "config.json", {"command": command})
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step, row in enumerate(rows, start=1):
            writer.write(step, row)
    return read_run(workdir)


def by_title(*runs):
    return {chart.title: chart for charts in training_charts(runs).values() for chart in charts}


def test_accuracy_and_depth_come_first_and_every_metric_is_drawn(tmp_path):
    run = read_run(write_trained(tmp_path / "all"))
    charts = training_charts([run])
    assert [name for name in charts if name != OTHER] == [
        "training", "reward", "kl", "length", "exits",
    ]  # fmt: skip
    assert [chart.title for chart in charts["training"]] == ["Accuracy", "Depth"]
    panels = [panel for of_file in PANELS.values() for panel in of_file]
    shown = {m for p in panels if p.title in by_title(run) for m in p.metrics} | {*DEPTHS}
    rest = {name for name in run.curves.names if not name.startswith("exit/")} - shown
    assert {chart.title for chart in charts[OTHER]} == rest
    assert "loss" in rest  # a policy gradient's says nothing by its height
    many = by_title(run)
    assert not classed(many["Accuracy"], "mark")
    assert len(classed(many["Accuracy"], "curve")) == 2  # measured, and their mean
    assert len(classed(many["Depth"], "band")) == 1  # the middle 80 % of the tokens
    rows = [{"loss": 1.0 / step, "completion/truncated": 0.0} for step in range(1, 9)]
    calibrated = by_title(write_metrics(tmp_path / "sft", "sft", rows))
    assert set(calibrated) == {"Loss", "completion/truncated"}
    rows[3] = {"loss": 0.1, "loss/policy": 0.1, "completion/truncated": 0.5}
    reinforced = by_title(write_metrics(tmp_path / "rl", "rl", rows))
    assert set(reinforced) == {"loss", "loss/policy", "Truncated completions"}


def test_a_line_ends_in_its_last_value_and_the_pointer_reads_each_step(tmp_path):
    rows = [{"accuracy": s / 10, "reward/mean": -s, "odd": 0.125} for s in range(1, 11)]
    charts = by_title(write_metrics(tmp_path / "a", "rl", rows))
    ends = [shape.text for chart in charts.values() for shape in classed(chart, "end")]
    assert ends == ["100\u00a0%", "−10", "0.125"]
    told = [shape.title for shape in classed(charts["Accuracy"], "told")]
    assert told == [f"step {s}\naccuracy: {10 * s}.0\u00a0%" for s in range(1, 11)]
    assert len(classed(charts["Accuracy"], "mark")) == 10  # few points, without a mean
    assert not classed(charts["Accuracy"], "measured")
    run = write_metrics(tmp_path / "long", "rl", [{"accuracy": (s % 2) * 0.5} for s in range(600)])
    told = [shape.title for shape in classed(by_title(run)["Accuracy"], "told")]
    assert len(told) == 60 and told[0] == "mean of steps 1–10\naccuracy: 25.0\u00a0%"


def test_exits_are_stacked_from_the_shallowest_up_to_all_tokens(tmp_path):
    row = {"exit/12": 2.0, "exit/5": 1.0, "exit/24": 1.0, "exit/odd": 1.0}
    chart = by_title(write_metrics(tmp_path, "sft", [row] * 40))["Where tokens leave"]
    assert [text for text, _ in chart.legend] == ["5", "12", "24"]
    outlines = [corners(shape) for shape in classed(chart, "area")]
    tops = [pairs[: len(pairs) // 2] for pairs in outlines]
    feet = [pairs[len(pairs) // 2 :][::-1] for pairs in outlines]
    assert feet[1:] == tops[:-1]
    height = feet[0][0][1] - tops[-1][0][1]
    shares = [(foot[0][1] - top[0][1]) / height for foot, top in zip(feet, tops, strict=True)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)
    assert [s.classes for s in classed(chart, "area")] == ["area c7", "area c16", "area c32"]
    assert "12 layers: 50.0\u00a0%" in classed(chart, "told")[0].title


def test_runs_lie_over_each_other_in_colours_of_their_own(tmp_path):
    write_trained(tmp_path / "a")
    write_evaluated(tmp_path / "b")
    write_trained(tmp_path / "c", seed=3, steps=90)
    runs = read_runs([tmp_path / name for name in "abc"])
    charts = by_title(*runs)
    assert [text for text, _ in charts["Accuracy"].legend] == ["a", "c"]
    for place in ("s0", "s2"):  # that of the run on the page
        assert len(classed(charts["Accuracy"], "measured", place)) == 1
    assert [text for text, _ in charts["Reward"].legend] == [
        "a, total", "a, verifier only", "c, total", "c, verifier only",
    ]  # fmt: skip
    (tmp_path / "c" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 1}\n')
    runs = read_runs([tmp_path / "a", tmp_path / "c"])
    assert [text for text, _ in by_title(*runs)["Accuracy"].legend] == ["a"]  # a lone line, too


def test_gaps_stay_gaps_and_long_runs_are_thinned_to_their_extremes(tmp_path):
    rows = [
        {
            "loss": math.nan if step % 7 == 0 or step > 50 else 1.0,
            "never": math.nan,
            "slow": 60.0 if step == 1 else 1.0,
            "share": [1, 2],
        }
        for step in range(1, 60)
    ]
    charts = by_title(write_metrics(tmp_path / "gaps", "sft", rows))
    assert list(charts) == ["Loss", "share/00", "share/01", "slow"]
    assert not any("nan" in getattr(s, "d", "") for c in charts.values() for s in c.shapes)
    assert classed(charts["Loss"], "measured")[0].d.count("M") == 8
    assert "60" not in [s.text for s in charts["slow"].shapes if isinstance(s, Text)]
    values = np.asarray([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    expected = [1.0, 2.0, 4.0, 4.0, 5.0, np.nan, np.nan]
    np.testing.assert_allclose(running_mean(values), expected)
    steps = np.arange(100_000)
    values = np.sin(steps / 3e3)
    values[12_345], values[54_321], values[70_000:80_000] = 9.0, -9.0, np.nan
    at, kept = thinned(steps, values)
    assert len(at) == len(kept) <= POINTS and (np.diff(at) > 0).all()
    assert kept[at == 12_345] == [9.0] and kept[at == 54_321] == [-9.0]
    assert np.isnan(kept[(at >= 70_500) & (at < 79_500)]).all()


def test_files_are_the_same_charts(tmp_path):
    run = read_run(write_trained(tmp_path / "rl"))
    files = write_charts(run)
    charts = training_charts([run])
    assert [path.stem for path in files] == list(charts)
    for path in files:
        root = ET.parse(path).getroot()
        texts = {"".join(n.itertext()) for n in root.iter() if n.tag.endswith("}text")}
        assert {chart.title for chart in charts[path.stem]} <= texts
        outlines = {node.get("d") for node in root.iter() if node.tag.endswith("}path")}
        for chart in charts[path.stem]:
            assert {s.d for s in chart.shapes if not isinstance(s, Text)} <= outlines
    before = [path.read_bytes() for path in files]
    with (run.workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')  # torn
    assert [path.read_bytes() for path in write_charts(read_run(run.workdir))] == before
    assert write_charts(read_run(write_evaluated(tmp_path / "eval"))) == []
    assert not (tmp_path / "eval" / "plots").exists()
    workdir = write_trained(tmp_path / "short", steps=1)
    (workdir / "plots").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write .*plots/training\.svg"):
        write_charts(read_run(workdir))
