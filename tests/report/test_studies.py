"""Tables and figures of studies, from numbers whose means and ranges are known."""

import codecs
import csv
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jexit.report import study_figures
from jexit.report.palette import depth_colours
from jexit.report.studies import main, with_tables
from jexit.report.study import COLUMNS, Study
from jexit.tasks import make_task

ROOT = pathlib.Path(__file__).parents[2]
LINES = [
    # λ, seed, accuracy, depth, of the fixed exit, step size
    ("0", "0", "0.5", "0.875", "0.25", "2"),
    ("0", "1", "0.75", "0.625", "", "3"),
    ("2", "0", "1", "0.5", "0.125", "2"),
]
HEADS = (
    "rl.depth_coef", "seed", "sample/accuracy", "sample/depth_fraction",
    "fixed:matched/accuracy", "sample/text/step_size",
)  # fmt: skip


def write(path, heads, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heads, *lines])


@pytest.fixture
def directory(tmp_path):
    """README.md, docs/results.md and docs/results with one study."""
    results = tmp_path / "docs" / "results"
    write(results / "pressure.csv", HEADS, LINES)
    curves = [
        (level, seed, step, float(seed) + step / 100, 0.5)
        for level, seed, *_ in LINES
        for step in (10, 20)
    ]
    heads = ("rl.depth_coef", "seed", "step", "accuracy", "task/step_size")
    write(results / "pressure-curves.csv", heads, curves)
    (tmp_path / "README.md").write_text("# A\n")
    (tmp_path / "docs" / "results.md").write_text(
        "Before\n\n<!-- pressure: right; depth; step size -->\nold\n<!-- end -->\n\nAfter\n"
    )
    return results


def test_a_byte_order_mark_is_no_part_of_a_setting(directory):
    for path in directory.glob("*.csv"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert Study.read(directory / "pressure.csv").settings == ("rl.depth_coef",)


def test_a_table_has_means_over_seeds_and_their_range(directory, capsys):
    assert main([str(directory)]) == 0
    assert (directory.parent / "results.md").read_text() == (
        "Before\n\n<!-- pressure: right; depth; step size -->\n\n"
        "| `rl.depth_coef` | seeds | right | depth | step size |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| 0 | 2 | 62.5 (50.0 to 75.0) | 75.0 (62.5 to 87.5) | 2.50 (2.00 to 3.00) |\n"
        "| 2 | 1 | 100.0 | 50.0 | 2.00 |\n"
        "\n<!-- end -->\n\nAfter\n"
    )
    assert (directory.parents[1] / "README.md").read_text() == "# A\n"
    assert "Wrote the tables of" in capsys.readouterr().out


def test_what_a_page_shows_is_drawn(directory, capsys):
    page = directory.parent / "results.md"
    page.write_text("![a](results/pressure-plane.svg) ![b](https://a.test/results/some-plane.svg)")
    assert main([str(directory)]) == 0
    assert {path.name for path in directory.glob("*.svg")} == {"pressure-plane.svg"}
    capsys.readouterr()
    for shown in ("pressure-tokens", "other-plane", "pressure-plain"):
        page.write_text(f"![a](results/{shown}.svg)")
        assert main([str(directory)]) == 1
    said = capsys.readouterr().err
    assert "pressure-tokens.svg is in a page, and pressure has no numbers for it" in said
    assert "a page shows other-plane.svg, which is no figure of a study here" in said
    assert said.count("\n") == 3 and "{plane,curves,measures,classes,tokens}.svg" in said


def test_the_same_numbers_give_the_same_files(directory, capsys):
    assert main([str(directory), "--all"]) == 0
    first = {path.name: path.read_bytes() for path in directory.glob("*.svg")}
    assert set(first) == {"pressure-plane.svg", "pressure-curves.svg"}  # nothing was measured
    capsys.readouterr()
    assert main([str(directory), "--all"]) == 0
    assert {path.name: path.read_bytes() for path in directory.glob("*.svg")} == first
    assert "Wrote the tables" not in capsys.readouterr().out


def test_full_depth_is_dashed_beside_the_policy(tmp_path):
    heads = ("rl.depth_coef", "sample/begun_steps/3/accuracy", "full/begun_steps/3/accuracy")
    heads += ("sample/faithfulness/early_answering/value",)
    write(tmp_path / "some.csv", heads, [("0", "0.5", "0.75", "-0.3"), ("2", "0.25", "1", "0")])
    figure = study_figures._measures(Study.read(tmp_path / "some.csv"))
    step, chain = (axes for axes in figure.axes if axes.get_visible())
    values = {line.get_linestyle(): list(line.get_ydata()) for line in step.lines[:2]}
    assert values == {"-": [0.5, 0.25], "--": [0.75, 1.0]}
    assert step.get_legend_handles_labels()[1] == ["step of 3", "all layers run"]
    assert chain.get_legend_handles_labels()[1] == ["early answering"]  # at full depth unknown
    assert chain.get_ylim()[0] < -0.3


def test_measures_have_a_bar_over_the_seeds(tmp_path):
    heads = ("rl.depth_coef", "seed", "sample/begun_steps/3/accuracy")
    lines = [("0", "0", "0.5"), ("0", "1", "1"), ("0", "2", ""), ("2", "0", "0.25")]
    write(tmp_path / "some.csv", heads, lines)
    (axes, *_) = study_figures._measures(Study.read(tmp_path / "some.csv")).axes
    assert list(axes.lines[0].get_ydata()) == [0.75, 0.25]
    assert [bar.tolist() for bar in axes.collections[0].get_segments()] == [
        [[0, 0.5], [0, 1.0]],
        [[1, 0.25], [1, 0.25]],
    ]


def test_a_price_is_drawn_unless_it_is_what_the_study_sets(tmp_path):
    for setting in ("rl.depth_coef", "rl.accuracy_floor"):
        write(tmp_path / "some.csv", (setting, "sample/accuracy"), [("2", "0.5")])
        curves = [("2", "10", "0.5", "0"), ("2", "20", "0.5", "1.5")]
        write(tmp_path / "some-curves.csv", (setting, "step", "accuracy", "depth_coef"), curves)
        figure = study_figures._training(Study.read(tmp_path / "some.csv"))
        titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
        assert ("price of depth" in titles) == (setting == "rl.accuracy_floor")


def test_paths_and_names_need_no_name_of_their_setting(tmp_path):
    for setting, label in (("model.path", "runs/deep"), ("lora.rank", "rank runs/deep")):
        write(tmp_path / "some.csv", (setting, "sample/accuracy"), [("runs/deep", "0.5")])
        assert Study.read(tmp_path / "some.csv").label(("runs/deep",)) == label


def test_the_plane_has_the_interval_of_every_run(tmp_path):
    heads = ("seed", "sample/depth_fraction", "sample/accuracy")
    heads += ("sample/accuracy_ci95/low", "sample/accuracy_ci95/high")
    write(
        tmp_path / "some.csv",
        heads,
        [("0", "0.25", "0.5", "0.4", "0.7"), ("1", "0.5", "1", "", "")],
    )
    (axes,) = study_figures._plane(Study.read(tmp_path / "some.csv")).axes
    drawn = [line for bars in axes.collections for line in bars.get_segments()]
    known = [line.tolist() for line in drawn if np.isfinite(line).all() and line.size]
    assert known == [[[0.25, 0.4], [0.25, 0.7]]]


def test_a_grid_with_a_hole_is_drawn(tmp_path):
    heads = ("rl.depth_coef", "task.name", "sample/capacity/fine/accuracy")
    lines = [("0", "sums", ""), ("0", "tom", "0.75"), ("2", "tom", "0.5")]  # one run failed
    write(tmp_path / "both.csv", heads, lines)
    (axes, *_) = study_figures._measures(Study.read(tmp_path / "both.csv")).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [np.nan, 0.75, 0.5])
    assert main([str(tmp_path), "--all"]) == 0
    shown = text_of(tmp_path / "both-measures.svg")
    assert {"fine", "right, by the steps that are prescribed", "0, sums", "2, tom"} <= shown


def test_curves_of_another_sweep_are_refused(directory, capsys):
    write(directory / "pressure-curves.csv", ("seed", "step", "accuracy"), [("0", "1", "0.5")])
    assert main([str(directory)]) == 1
    error = capsys.readouterr().err
    assert "pressure-curves.csv has no column 'rl.depth_coef'" in error and error.count("\n") == 1


def test_curves_of_a_run_that_the_table_has_not_are_refused(directory, capsys):
    curves = (directory / "pressure-curves.csv").read_text()
    (directory / "pressure-curves.csv").write_text(curves.replace("\n0,", "\n0.5,"))
    assert main([str(directory)]) == 1
    assert "has a run with 0.5 and pressure.csv has none" in capsys.readouterr().err


def test_nothing_is_drawn_where_a_page_is_wrong(directory):
    page = "![a](results/pressure-plane.svg)\n<!-- pressure: rihgt -->\n<!-- end -->\n"
    (directory.parent / "results.md").write_text(page)
    assert main([str(directory)]) == 1
    assert not list(directory.glob("*.svg"))


def test_a_grid_of_two_settings_has_a_hue_for_each_of_the_second(tmp_path):
    lines = [(level, target, "0.5") for level in ("0", "1") for target in ("teacher", "student")]
    write(tmp_path / "some.csv", ("sft.explore", "sft.target", "sample/accuracy"), lines)
    colours = study_figures._colours(Study.read(tmp_path / "some.csv"))
    assert len({tuple(colour) for colour in colours.values()}) == 4
    strongest = {group: int(np.argmax(colour[:3])) for group, colour in colours.items()}
    assert {strongest[group] for group in colours if group[1] == "teacher"} == {2}  # blue
    assert {strongest[group] for group in colours if group[1] == "student"} == {0}
    for target in ("teacher", "student"):
        assert sum(colours["0", target][:3]) < sum(colours["1", target][:3])  # the first is darker


def text_of(path):
    tree = ElementTree.parse(path)
    return {(node.text or "").strip() for node in tree.iter() if node.tag.endswith("text")}


def marks_of(path):
    """The colours of a figure's shapes, and the numbers in their outlines and places."""
    shapes = [node.attrib for node in ElementTree.parse(path).iter() if "text" not in node.tag]
    told = [" ".join(shape.get(key, "") for key in ("d", "x", "y", "style")) for shape in shapes]
    colours = [re.findall(r"#[0-9a-f]{6}\b", text) for text in told]
    numbers = [re.findall(r"-?\d+\.?\d*", re.sub(r"#\w+", "", text)) for text in told]
    return colours, np.array([float(n) for of in numbers for n in of])


def test_figures_name_what_they_show(directory):
    heads = (*HEADS, "sample/capacity/2/accuracy", "full/capacity/2/accuracy")
    write(directory / "pressure.csv", heads, [(*line, "0.5", "1") for line in LINES])
    assert main([str(directory), "--all"]) == 0
    plane = text_of(directory / "pressure-plane.svg")
    assert {"depth_coef 0", "depth_coef 2", "sampled exits", "one exit a completion"} <= plane
    assert {"right answers", "operands a step", "update"} <= text_of(
        directory / "pressure-curves.svg"
    )
    assert "right, by the steps that are prescribed" in text_of(directory / "pressure-measures.svg")


def test_tokens_are_drawn_with_their_depths(directory, capsys):
    heads = (*HEADS, *(f"sample/depth_by_class/{name}/depth_mean" for name in ("digit", "end")))
    write(directory / "pressure.csv", heads, [(*line, "3", "") for line in LINES])
    strips = [
        {"settings": {"rl.depth_coef": level, "seed": seed}, "layers": 8, "prompt": "1 + 2?",
         "tokens": ["7", " eight", "\n"] * 20, "depths": [int(seed) + 1, 8, 2] * 20}
        for level, seed, *_ in LINES
    ]  # fmt: skip
    path = directory / "pressure-completions.json"
    path.write_text(json.dumps(strips))
    assert main([str(directory), "--all"]) == 0
    picture = ElementTree.parse(directory / "pressure-tokens.svg")
    texts = [(node.text or "").strip() for node in picture.iter() if node.tag.endswith("text")]
    assert texts[0] == "Layers run for each token of the answer to: 1 + 2?"
    assert texts.count("depth_coef 0") == 1  # of its first seed
    assert texts.count("7") == texts.count("eight") == texts.count("8") == 40
    assert texts.count("1") == 40 and "2" in texts and "3" not in texts
    assert {"digit", "end", "depth_coef 2"} <= text_of(directory / "pressure-classes.svg")
    drawn = (directory / "pressure-tokens.svg").read_text()
    shades = [depth_colours()[4 * depth][0] for depth in (1, 2, 8)]  # of 8 layers and 32 steps
    assert all(f"fill: {shade}" in drawn for shade in shades)

    strips[0]["depths"] = [8]
    path.write_text(json.dumps(strips))
    assert main([str(directory)]) == 1
    path.write_text("[")
    assert main([str(directory)]) == 1
    path.write_text(json.dumps([strips[1] | {"layers": 0}]))
    assert main([str(directory)]) == 1
    path.write_text(json.dumps([strips[1] | {"settings": {"seed": "0"}}]))
    assert main([str(directory)]) == 1
    said = capsys.readouterr().err
    assert (
        "1 depths for 60 tokens" in said and "is not valid JSON" in said and "layers is 0" in said
    )
    assert "has completions without 'rl.depth_coef'" in said and said.count("\n") == 4
    path.unlink()
    write(directory / "pressure-curves.csv", ("rl.depth_coef", "accuracy"), [("0", "0.5")])
    assert main([str(directory)]) == 1
    assert "has no column 'step'" in capsys.readouterr().err


def test_dollar_signs_are_dollar_signs(directory):
    strip = {"settings": {"rl.depth_coef": "0"}, "layers": 8, "prompt": "A $40 coat, $3 less?",
             "tokens": ["$$", "$x$"], "depths": [1, 2]}  # fmt: skip
    (directory / "pressure-completions.json").write_text(json.dumps([strip]))
    assert main([str(directory), "--all"]) == 0
    assert {"$$", "$x$", "Layers run for each token of the answer to: A $40 coat, $3 less?"} <= (
        text_of(directory / "pressure-tokens.svg")
    )


def test_gaps_are_left_out_of_means(directory):
    study = Study.read(directory / "pressure.csv")
    assert study.settings == ("rl.depth_coef",)
    np.testing.assert_array_equal(study.values(("0",), "fixed:matched/accuracy"), [0.25, np.nan])
    assert COLUMNS["step of 3, full depth"].source == "full/begun_steps/3/accuracy"
    assert COLUMNS["right"].text([0.25, float("nan")]) == "25.0, of 1"
    nothing = COLUMNS["by 2"]
    assert nothing.text(study.values(("2",), nothing.source)) == "–"
    assert study.mean(("0",), "right") == 0.625


def test_the_interval_of_several_runs_holds_those_of_all(tmp_path):
    ends = ("sample/accuracy_ci95/low", "sample/accuracy_ci95/high")
    lines = [("0", "0", "0.4", "0.6"), ("0", "1", "0.45", "0.7"), ("1", "0", "", "")]
    lines += [("2", "0", "0.4", ""), ("2", "1", "", "0.9"), ("2", "2", "0.5", "0.6")]
    write(tmp_path / "some.csv", ("rl.depth_coef", "seed", *ends), lines)
    table = Study.read(tmp_path / "some.csv").table(["right, interval"])
    assert "| 2 | 3 | 50.0 to 60.0, of 1 |" in table  # an interval has both ends
    assert "| 0 | 2 | 40.0 to 70.0 |" in table and "| 1 | 1 | – |" in table


def test_a_summary_has_the_figures_that_there_are(directory):
    assert Study.read(directory / "pressure.csv").summary() == (
        "rl.depth_coef  seeds  right                depth\n"
        "0              2      62.5 (50.0 to 75.0)  75.0 (62.5 to 87.5)\n"
        "2              1      100.0                50.0"
    )


def test_layers_a_problem_of_an_older_table_follow_from_its_means(tmp_path):
    heads = ("seed", "sample/depth_mean", "sample/completion_length", "full/layers_per_problem")
    write(tmp_path / "some.csv", heads, [("0", "2.5", "12", "96"), ("1", "2", "11", "88")])
    table = Study.read(tmp_path / "some.csv").table(
        ["layers a problem", "layers a problem at full depth"]
    )
    assert "| 2 | 26.00 (22.00 to 30.00) | 92.00 (88.00 to 96.00) |" in table


def test_what_is_not_there_is_one_sentence(directory, tmp_path, capsys):
    study = {"pressure": Study.read(directory / "pressure.csv")}
    block = "<!-- {} -->\n<!-- end -->"
    with pytest.raises(ValueError, match=r"a table of the study 'other', which has no other\.csv"):
        with_tables(block.format("other: right"), study)
    with pytest.raises(ValueError, match=r"has the column 'rihgt'; choose among right before; "):
        with_tables(block.format("pressure: rihgt"), study)
    assert main([str(tmp_path)]) == 1
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for content in (
        b"seed\n",
        b"\xff\xfe\n",
        b"seed,sample/accuracy,sample/depth_fraction\n0,most,0.5\n",
    ):
        (wrong / "a.csv").write_bytes(content)
        assert main([str(wrong), "--all"]) == 1
    (wrong / "a.csv").write_text("seed,sample/accuracy\n0,1\n")
    (wrong / "a-curves.csv").write_text("")
    assert main([str(wrong), "--all"]) == 1
    for curve in ("step,accuracy\n10,low\n", "step,accuracy\ninf,1\n", "step,accuracy\n10,1,2\n"):
        (wrong / "a-curves.csv").write_text(curve)
        assert main([str(wrong), "--all"]) == 1
    (wrong / "a-curves.csv").unlink()
    for lines in ("2,0,1\n\n\n2,1\n", "2,0,1,5\n", "2\n"):
        (wrong / "a.csv").write_text(f"rl.depth_coef,seed,sample/accuracy\n{lines}")
        assert main([str(wrong), "--all"]) == 1
    said = capsys.readouterr().err
    assert "has no .csv file; copy a sweep's table.csv there" in said
    assert "a-curves.csv has 'low' under accuracy, which is no number" in said
    assert "a.csv has no line; copy a sweep's table.csv there" in said
    assert "a.csv is no CSV file ('utf-8' codec can't decode" in said
    assert "a.csv has 'most' under sample/accuracy, which is no number" in said
    assert "a-curves.csv has no line; copy a sweep's curves.csv there" in said
    assert "a-curves.csv has 'inf' under step, which is no number up to 1e+15" in said
    assert "line 2 of" in said and "line 5 of" in said and said.count("as many cells as") == 4
    assert said.count("\n") == 11


@pytest.mark.parametrize(
    "page, alone",
    [
        ("<!-- a: right -->\nprose\n<!-- a: depth -->\n<!-- end -->", "<!-- a: right -->"),
        ("<!-- a right -->\nold\n<!-- end -->", "<!-- end -->"),
        ("<!-- a: right -->\nold", "<!-- a: right -->"),
    ],
)
def test_a_line_of_a_table_without_the_other_is_refused(page, alone):
    with pytest.raises(ValueError, match=f"^{alone} stands alone; a table is between"):
        with_tables(page, {})


def test_every_curve_and_measure_is_a_column():
    assert {label for labels in study_figures.MEASURED.values() for label in labels} <= set(COLUMNS)


def test_curves_of_texts_are_what_the_tasks_tell():
    told = {
        f"task/{name}" for task in ("sums", "tom") for name in make_task(task).text_totals([], [])
    }
    assert {name for name in study_figures.CURVES if name.startswith("task/")} <= told


def test_the_published_tables_and_figures_are_those_of_the_numbers(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.svg"))
    shutil.copy(ROOT / "README.md", tmp_path)
    assert main([str(tmp_path / "docs" / "results")]) == 0
    for name in ("README.md", "docs/results.md"):
        text = (tmp_path / name).read_text()
        assert text == (ROOT / name).read_text(), name
        pictures = re.findall(r"!\[.*?\]\((?:docs/)?(results/[^)]+)\)", text)
        assert pictures
        for picture in pictures:
            made, kept = (root / "docs" / picture for root in (tmp_path, ROOT))
            assert text_of(made) == text_of(kept)
            (colours, numbers), (kept_colours, kept_numbers) = marks_of(made), marks_of(kept)
            assert colours == kept_colours
            # In points: the fonts of another machine may move the axes a little.
            np.testing.assert_allclose(numbers, kept_numbers, atol=1.0)
