"""Training curves of every kind of run, drawn from metrics.jsonl alone."""

import math
import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jexit.io.metrics import MetricsWriter, read_metrics
from jexit.report import plots
from jexit.report.plots import Curves, plot_training, running_mean

SVG = "{http://www.w3.org/2000/svg}"
COMMON = {"loss": 0.7, "grad_norm": 0.5, "skipped": 0.0, "step_seconds": 1.5}
METRICS = {
    "pretrain": {**COMMON, "loss/text": 0.6, "p_right/step_2": 0.9, "lr": 1e-3},
    "sft": {
        **COMMON,
        "kl/teacher": 0.4,
        "loss/exit": 1.2,
        "depth/fraction": 0.4,
        **{f"exit/{layer}": 0.25 for layer in (5, 10, 15, 24)},
        "lr/lora": 1e-3,
        "lr/exit": 1e-2,
    },
    "rl": {
        **COMMON,
        "loss/policy": 0.1,
        "accuracy": 0.8,
        "reward/mean": 0.5,
        "reward/verifier": 0.8,
        "reward/depth": -0.3,
        "depth/mean": 3.2,
        "depth/fraction": 0.4,
        "depth/p10": 1.0,
        "depth/p90": 6.0,
        **{f"exit/{layer}": 0.2 for layer in (1, 2, 4, 6, 8)},
        "kl/teacher": 0.1,
        "entropy/tokens": 0.3,
        "entropy/depth": 0.6,
        "completion/length": 30.0,
        "completion/truncated": 0.02,
        "tokens_per_second": 9e3,
    },
}
FILES = {
    "pretrain": ["loss", "loss_parts", "other"],
    "sft": ["training", "loss", "kl", "exits", "loss_parts", "other"],
    "rl": [
        "training",
        "reward",
        "loss",
        "kl",
        "length",
        "entropy",
        "exits",
        "loss_parts",
        "other",
    ],
}


def write_run(workdir, command, steps=60):
    rng = np.random.default_rng(0)
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            values = METRICS[command]
            writer.write(
                step, {k: v * (1 + 0.1 * rng.standard_normal()) for k, v in values.items()}
            )
    return workdir


def texts(path):
    """All text in an SVG; parsing it proves that it is well-formed."""
    root = ET.fromstring(path.read_text())
    assert root.tag == f"{SVG}svg"
    return ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The plots of one run of each kind, main one first."""
    root = tmp_path_factory.mktemp("runs")
    return {command: plot_training(write_run(root / command, command)) for command in METRICS}


@pytest.mark.parametrize("command", METRICS)
def test_every_metric_of_a_run_is_drawn(files, command):
    assert [path.stem for path in files[command]] == FILES[command]
    assert all(path.parent.name == "plots" for path in files[command])
    drawn = {path.stem: texts(path) for path in files[command]}
    for metric in METRICS[command]:
        panels = [p for ps in plots.FIGURES.values() for p in ps if metric in p.metrics]
        titles = {p.title for p in panels} or {metric}
        if metric.startswith("exit/"):
            assert metric.removeprefix("exit/") in drawn["exits"]
        elif metric not in ("depth/mean", "depth/p10", "depth/p90"):  # the band around the depth
            assert any(titles & set(found) for found in drawn.values()), metric


def test_the_main_figure_has_accuracy_and_depth_in_per_cent(files):
    training = files["rl"][0]
    found = texts(training)
    assert {"Accuracy", "Depth", "training step", "0 %", "100 %"} <= set(found)
    assert "middle 80 % of tokens" in found
    curves = Curves(read_metrics(training.parent.parent))
    for metric in ("accuracy", "depth/fraction"):  # each line ends in its value
        assert f"{100 * running_mean(curves[metric][1], 3)[-1]:.0f} %" in found


def test_exits_are_stacked_in_the_order_of_their_layers(files):
    (path,) = (path for path in files["sft"] if path.stem == "exits")
    found = texts(path)
    assert "Where tokens leave" in found
    # The legend reads from the top band, the deepest, down.
    assert found[found.index("layers run") + 1 :] == ["24", "15", "10", "5"]


def test_a_run_without_metrics_gives_no_files(tmp_path):
    assert plot_training(tmp_path) == []
    write_run(tmp_path, "rl", steps=0)
    assert plot_training(tmp_path) == []
    assert not (tmp_path / "plots").exists()


def test_one_step_gaps_and_constants_are_drawn(tmp_path):
    assert len(plot_training(write_run(tmp_path / "one", "rl", steps=1))) == len(FILES["rl"])
    with MetricsWriter(tmp_path / "gaps", tensorboard=False) as writer:
        for step in range(1, 60):
            loss = math.nan if step % 7 == 0 or step > 50 else 1.0
            writer.write(step, {"loss": loss, "never": math.nan, "accuracy": 0.0, "share": [1, 2]})
    files = plot_training(tmp_path / "gaps")
    assert [path.stem for path in files] == ["training", "loss", "other"]
    other = texts(files[-1])
    assert {"share/00", "share/01"} <= set(other) and "never" not in other


def test_metric_names_cannot_break_the_page(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(step, {"a<b>&c": step, 'x"]]>': step})
    (path,) = plot_training(tmp_path)
    assert {"a<b>&c", 'x"]]>'} <= set(texts(path))
    assert "<script" not in path.read_text()


def test_the_same_curves_give_the_same_bytes(files, tmp_path):
    again = {p.name: p.read_bytes() for p in plot_training(write_run(tmp_path, "sft"))}
    assert {p.name: p.read_bytes() for p in files["sft"]} == again


def test_a_torn_log_is_drawn_as_far_as_it_is_whole(tmp_path):
    write_run(tmp_path, "pretrain")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    assert [path.stem for path in plot_training(tmp_path)] == FILES["pretrain"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    write_run(tmp_path, "pretrain")
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write .*plots/loss\.svg"):
        plot_training(tmp_path)


def test_the_running_mean_leaves_out_gaps():
    values = np.asarray([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    expected = [1.0, 2.0, 4.0, 4.0, 5.0, np.nan, np.nan]
    np.testing.assert_allclose(running_mean(values, 3), expected)


def test_lone_values_do_not_flatten_a_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 101):
            writer.write(step, {"step_seconds": 60.0 if step == 1 else 1.0 + 0.01 * step})
    plot_training(tmp_path)
    top = figures[0].axes[0].get_ylim()[1]
    assert 2.0 < top < 5.0


@pytest.mark.parametrize("command", METRICS)
@pytest.mark.parametrize("steps", [8, 300])
def test_no_text_lies_on_other_text_or_off_the_page(tmp_path, monkeypatch, command, steps):
    figures, drawn = {}, []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: figures.setdefault(path.stem, figure) and path
    )
    draw = mpl.text.Text.draw

    def recorded(self, renderer):
        drawn.append(self)
        draw(self, renderer)

    plot_training(write_run(tmp_path, command, steps))
    monkeypatch.setattr(mpl.text.Text, "draw", recorded)
    for name, figure in figures.items():
        with mpl.rc_context(plots.STYLE):
            drawn.clear()
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            boxes = [
                (text.get_text(), text.get_window_extent(canvas.get_renderer()))
                for text in drawn
                if text.get_visible() and text.get_text().strip()
            ]
        page = figure.bbox
        assert len(boxes) > 5
        for index, (label, box) in enumerate(boxes):
            inside = page.x0 <= box.x0 + 1 and box.x1 <= page.x1 + 1
            inside &= page.y0 <= box.y0 + 1 and box.y1 <= page.y1 + 1
            assert inside, f"{name}: {label!r} leaves the page"
            for other, second in boxes[index + 1 :]:
                overlap = mpl.transforms.Bbox.intersection(box, second)
                area = overlap.width * overlap.height if overlap else 0.0
                assert area < 4.0, f"{name}: {label!r} lies on {other!r}"


@pytest.mark.parametrize("command", METRICS)
def test_labels_are_legible(files, command):
    for path in files[command]:
        found = re.findall(r"font(?:-size)?: [^;]*?([\d.]+)px", path.read_text())
        sizes = [float(size) for size in found]
        assert sizes and min(sizes) >= 8.0, path
