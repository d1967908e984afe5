"""Tables and charts of studies, from numbers whose means and ranges are known."""

import codecs
import csv
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("pandas", reason="pandas is not installed (the studies extra)")

from jexit.report.colours import depth_class
from jexit.sweep.plan import Cell
from report_files import policy_figures, write_evaluated
from studies import collect
from studies.__main__ import main, with_tables
from studies.study import Study

ROOT = pathlib.Path(__file__).parents[1]
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


def study(tmp_path, heads, lines):
    write(tmp_path / "some.csv", heads, lines)
    return Study(tmp_path / "some.csv")


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
        "Before\n\n<!-- pressure: accuracy; depth; step size -->\nold\n<!-- end -->\n\nAfter\n"
    )
    return results


def text_of(path):
    root = ET.parse(path).getroot()
    return [(node.text or "").strip() for node in root.iter() if node.tag.endswith("}text")]


def test_a_table_has_means_over_seeds_and_their_range(directory, capsys):
    for path in directory.glob("*.csv"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())  # no part of a setting
    assert main([str(directory)]) == 0
    assert (directory.parent / "results.md").read_text() == (
        "Before\n\n<!-- pressure: accuracy; depth; step size -->\n\n"
        "| `rl.depth_coef` | seeds | accuracy | depth | step size |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| 0 | 2 | 62.5 (50.0 to 75.0) | 75.0 (62.5 to 87.5) | 2.50 (2.00 to 3.00) |\n"
        "| 2 | 1 | 100.0 | 50.0 | 2.00 |\n"
        "\n<!-- end -->\n\nAfter\n"
    )
    assert (directory.parents[1] / "README.md").read_text() == "# A\n"
    assert "results.md" in capsys.readouterr().out


def test_gaps_are_left_out_and_intervals_hold_those_of_all_seeds(tmp_path):
    ends = ("sample/accuracy_ci95/low", "sample/accuracy_ci95/high")
    lines = [("0", "0", "0.4", "0.6"), ("0", "1", "0.45", "0.7"), ("1", "0", "", "")]
    lines += [("2", "0", "0.4", ""), ("2", "1", "", "0.9"), ("2", "2", "0.5", "0.6")]
    table = study(tmp_path, ("rl.depth_coef", "seed", *ends), lines).table(["accuracy, interval"])
    assert "| 2 | 3 | 50.0 to 60.0, of 1 |" in table  # an interval has both ends
    assert "| 0 | 2 | 40.0 to 70.0 |" in table and "| 1 | 1 | – |" in table
    heads = ("seed", "sample/depth_mean", "sample/completion_length", "full/layers_per_problem")
    older = study(tmp_path, heads, [("0", "2.5", "12", "96"), ("1", "2", "11", "88")])
    table = older.table(["layers per problem", "layers per problem at full depth"])
    assert "| 2 | 26.00 (22.00 to 30.00) | 92.00 (88.00 to 96.00) |" in table


def test_compute_and_planning_follow_from_the_columns_of_a_table(tmp_path):
    heads = (
        "seed", "sample/depth_mean", "sample/depth_fraction", "sample/completion_length",
        "sample/compute_fraction", "sample/planning/2/1/accuracy",
        "sample/planning/2/1/accuracy_embedding", "sample/planning/4/1/accuracy",
        "sample/planning/4/1/accuracy_embedding", "sample/faithfulness/necessity/value",
        "sample/faithfulness/necessity/ci95/low", "sample/faithfulness/necessity/ci95/high",
    )  # fmt: skip
    lines = [
        ("0", "2", "0.25", "10", "0.3", "0.5", "0.25", "0.75", "0.25", "0.9", "0.8", "0.95"),
        ("1", "4", "0.5", "10", "0.6", "0.25", "0.25", "0.5", "0.25", "", "", ""),
    ]
    columns = ["compute per problem", "planning, 1 ahead", "necessity", "necessity, interval"]
    row = study(tmp_path, heads, lines).table(columns).splitlines()[-1]
    # Of 8 layers and 10 tokens 0.3 and 0.6; the probes of a run gain 0.25 and 0.5, 0 and 0.25.
    assert row == (
        "| 2 | 36.00 (24.00 to 48.00) | 25.0 (12.5 to 37.5) | 90.0, of 1 | 80.0 to 95.0, of 1 |"
    )


def test_what_a_page_shows_is_drawn_and_all_the_same_each_time(directory, capsys):
    page = directory.parent / "results.md"
    page.write_text("![a](results/pressure-plane.svg) ![b](https://a.test/results/some-plane.svg)")
    assert main([str(directory)]) == 0
    assert {path.name for path in directory.glob("*.svg")} == {"pressure-plane.svg"}
    assert main([str(directory), "--all"]) == 0
    first = {path.name: path.read_bytes() for path in directory.glob("*.svg")}
    assert set(first) == {"pressure-plane.svg", "pressure-curves.svg"}  # nothing was measured
    assert {"depth_coef 0", "depth_coef 2", "sampled exits", "one exit per completion"} <= set(
        text_of(directory / "pressure-plane.svg")
    )
    assert {"accuracy", "operands per step", "update"} <= set(
        text_of(directory / "pressure-curves.svg")
    )
    assert main([str(directory), "--all"]) == 0
    assert {path.name: path.read_bytes() for path in directory.glob("*.svg")} == first
    capsys.readouterr()
    for shown in ("pressure-tokens", "other-plane", "pressure-plain"):
        page.write_text(f"![a](results/{shown}.svg)")
        assert main([str(directory)]) == 1
    said = capsys.readouterr().err
    assert "a page shows pressure-tokens.svg, but its studies have no numbers for this" in said
    assert "a page shows other-plane.svg, but a chart must be called NAME-CHART.svg" in said
    assert (
        said.count("\n") == 3
        and "one of plane, cost, curves, measures, classes, tokens, or" in said
    )


def test_several_studies_are_compared_by_accuracy_and_compute(directory, capsys):
    def write_study(name, setting, policy, lines):
        columns = ("depth_mean", "depth_fraction", "completion_length", "compute_fraction")
        heads = (*setting, "seed", *(f"{policy}/{c}" for c in ("accuracy", *columns)))
        write(directory / f"{name}.csv", heads, lines)

    # Of 8 layers; 10 tokens at 0.5, 0.25 and 1 of the compute: 40, 20 and 80 layers.
    lines = [
        ("0", "0", "1", "4", "0.5", "10", "0.5"),
        ("2", "0", "0.75", "2", "0.25", "10", "0.25"),
    ]
    write_study("penalised", ("rl.depth_coef",), "sample", lines)
    write_study("single", (), "full", [("0", "0.9", "8", "1", "10", "1")])
    page = directory.parent / "results.md"
    page.write_text("![a](results/penalised+single-cost.svg)")
    assert main([str(directory)]) == 0
    made = directory / "penalised+single-cost.svg"
    assert {told.replace("\xa0", " ") for _, told in marks_of(made)[0] if told} == {
        "0: 100.0 % correct for 40.0 layers",
        "2: 75.0 % correct for 20.0 layers",
        "full: 90.0 % correct for 80.0 layers",
    }
    assert {"penalised", "single", "0", "2", "full"} <= set(text_of(made))
    for shown, why in (
        ("penalised+single-plane", "or NAME+OTHER-cost.svg; rename or remove"),
        ("penalised+other-cost", "where NAME.csv exists"),
        ("pressure-cost", "have no numbers for this chart"),
    ):
        page.write_text(f"![a](results/{shown}.svg)")
        assert main([str(directory)]) == 1
        assert why in capsys.readouterr().err


def test_tokens_are_drawn_with_their_depths(directory, capsys):
    heads = (*HEADS, *(f"sample/depth_by_class/{name}/depth_mean" for name in ("digit", "end")))
    write(directory / "pressure.csv", heads, [(*line, "3", "") for line in LINES])
    strips = [
        {"settings": {"rl.depth_coef": level, "seed": seed}, "layers": 8, "prompt": "1 + $2?",
         "tokens": ["7", " eight", "\n"] * 20, "depths": [int(seed) + 1, 8, 2] * 20}
        for level, seed, *_ in LINES
    ]  # fmt: skip
    path = directory / "pressure-completions.json"
    path.write_text(json.dumps(strips))
    assert main([str(directory), "--all"]) == 0
    texts = text_of(directory / "pressure-tokens.svg")
    assert texts[0] == "Layers run for each token of the answer to: 1 + $2?"
    assert texts.count("depth_coef 0") == 1  # of its first seed
    assert texts.count("7") == texts.count("eight") == texts.count("8") == 40
    assert {"digit", "end", "depth_coef 2"} <= set(text_of(directory / "pressure-classes.svg"))
    drawn = (directory / "pressure-tokens.svg").read_text()
    assert all(drawn.count(f'class="{depth_class(depth, 8)}"') == 40 for depth in (1, 2, 8))
    for wrong, why in (
        ([strips[0] | {"depths": [8]}], "1 depths for 60 tokens, but one per token is needed"),
        ([strips[1] | {"layers": 0}], "at 0/layers (Input should be greater than or equal to 1)"),
        ([strips[1] | {"settings": {"seed": "0"}}], "has completions without 'rl.depth_coef'"),
        ("[", "Input should be a valid array"),
    ):
        path.write_text(json.dumps(wrong))
        assert main([str(directory)]) == 1
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1


def test_a_mistake_is_one_sentence_and_nothing_is_drawn(directory, tmp_path, capsys):
    def refused(name, content):
        kept = (directory / name).read_bytes() if (directory / name).exists() else None
        (directory / name).write_bytes(content)
        assert main([str(directory), "--all"]) == 1
        if kept is not None:
            (directory / name).write_bytes(kept)
        assert not list(directory.glob("*.svg"))
        said = capsys.readouterr().err
        assert said.startswith("jexit: ") and said.count("\n") == 1
        return said

    assert (
        "has the column 'rihgt', which does not exist; use columns from 'accuracy before'"
        in refused(
            "../results.md",
            b"![a](results/pressure-plane.svg)\n<!-- pressure: rihgt -->\n<!-- end -->\n",
        )
    )
    head = b"rl.depth_coef,seed,sample/accuracy,sample/depth_fraction\n"
    curves = b"rl.depth_coef,step,accuracy\n"
    for name, content, why in (
        ("pressure.csv", head, "has no rows"),
        ("pressure.csv", b"", "is not a valid CSV table"),
        ("pressure.csv", b"\xff\xfe\n", "is not a valid CSV table"),
        ("pressure.csv", head + b"0,0,most,1\n2,0,1,1\n", "has 'most' in the column sample/acc"),
        ("pressure.csv", head + b"0,0,1e308,1\n2,0,1,1\n", "has '1e308' in the column sample/acc"),
        ("pressure.csv", head + b"0,0,1,0.5,7\n", "is not a valid CSV table"),
        ("pressure-curves.csv", b"seed,step,accuracy\n0,1,1\n", "has no column 'rl.depth_coef'"),
        ("pressure-curves.csv", b"rl.depth_coef,accuracy\n0,1\n", "has no column 'step'"),
        ("pressure-curves.csv", curves + b"0.5,1,1\n", "has a run with 0.5, but pressure.csv"),
        ("pressure-curves.csv", curves + b"0,1,low\n", "has 'low' in the column accuracy, but"),
    ):
        assert why in refused(name, content), content
    assert main([str(tmp_path)]) == 1
    assert "contains no .csv file, but at least one is needed; make" in capsys.readouterr().err
    for page, alone in (
        ("<!-- a: right -->\nprose\n<!-- a: depth -->\n<!-- end -->", "<!-- a: right -->"),
        ("<!-- a right -->\nold\n<!-- end -->", "<!-- end -->"),
        ("<!-- a: right -->\nold", "<!-- a: right -->"),
    ):
        with pytest.raises(
            ValueError, match=f"^the marker {alone} stands alone, but a table must be between"
        ):
            with_tables(page, {})


def test_models_of_a_sweep_are_grouped_by_their_settings(tmp_path):
    def cells(*settings):
        return [Cell(each, tmp_path) for each in settings]

    def settings(found):
        return [cell.settings for cell in found]

    paths = [f"runs/sums/rl.depth_coef={level},seed={seed}" for level in (0, 2) for seed in (0, 1)]
    ours = collect.by_settings_of_models(cells(*({"model.path": path} for path in paths)))
    assert settings(ours) == [
        {"rl.depth_coef": level, "seed": seed} for level in "02" for seed in "01"
    ]
    ours = collect.by_settings_of_models(cells({"model.path": "runs/a/x.y=1", "seed": "2"}))
    assert settings(ours) == [{"x.y": "1", "seed": "2"}]
    for kept in (
        cells({"model.path": "runs/a/x.y=1"}, {"model.path": "runs/b/x.z=1"}),  # other settings
        cells({"model.path": "runs/a/x.y=1"}, {"model.path": "jexit/assets/tiny"}),  # of no sweep
        cells({"model.path": "runs/a/seed=1", "seed": "2"}),  # both have a seed
        cells({"seed": "0"}, {"seed": "1"}),
    ):
        assert collect.by_settings_of_models(kept) == kept


def test_a_study_is_collected_from_its_sweep(tmp_path, capsys):
    for seed in (0, 2, 1):  # the last has not finished
        workdir = tmp_path / "sweep" / f"seed={seed}"
        (workdir / "eval").mkdir(parents=True)
        asked = {"settings": {"seed": str(seed)}, "run": [], "eval": []}
        (tmp_path / "sweep" / f"seed={seed}.json").write_text(json.dumps(asked))
        rows = [{"step": n, "accuracy": seed + n, "step_seconds": 1.0} for n in range(1, 42)]
        rows[40]["accuracy"] = None  # not a number, as metrics.jsonl has it
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if seed != 1:
            result = policy_figures("sample", random.Random(0)) | {"accuracy": 0.25 + seed / 4}
            (workdir / "after.json").write_text(json.dumps(result))
    write_evaluated(tmp_path / "sweep" / "seed=2" / "eval")
    target = tmp_path / "docs" / "page"
    assert collect.main([str(tmp_path / "sweep"), str(target)]) == 0
    assert capsys.readouterr().out.count("Wrote ") == 3
    first, second = csv.DictReader(target.with_name("page.csv").open())
    assert (first["seed"], first["after/accuracy"], first["full/accuracy"]) == ("0", "0.25", "")
    assert float(second["full/accuracy"]) > 0.9 and "full/tokens_per_second" not in second
    lines = list(csv.DictReader(target.with_name("page-curves.csv").open()))
    assert [line["seed"] for line in lines] == ["0"] * 20 + ["2"] * 20
    assert lines[0] == {"seed": "0", "step": "2", "accuracy": "1.5"}
    assert lines[19] == {"seed": "0", "step": "41", "accuracy": "39.5"}  # of 39, 40 and a gap
    shown = json.loads(target.with_name("page-completions.json").read_text())
    assert len(shown) == 2 and {entry["settings"]["seed"] for entry in shown} == {"2"}
    assert Study(target.with_name("page.csv")).strips[0].layers == 8
    assert collect.main([str(tmp_path), str(target)]) == 1
    assert "contains no finished run of a sweep" in capsys.readouterr().err


def marks_of(path):
    """A figure's texts and classes, and the numbers in its outlines."""
    shapes = [node for node in ET.parse(path).getroot().iter() if node.tag.endswith("}path")]
    told = [(node.get("class"), node.findtext("{*}title")) for node in shapes]
    return told, np.array(
        [float(n) for s in shapes for n in re.findall(r"-?\d+\.?\d*", s.get("d"))]
    )


def script(name, checkout, *arguments):
    """Runs a script of studies/ from a checkout that has the environment of this process."""
    for folder in ("studies", "jexit"):
        if not (checkout / folder).exists():
            (checkout / folder).symlink_to(ROOT / folder)
    (checkout / "launch").mkdir(exist_ok=True)
    (checkout / "launch" / "env.sh").write_text(f"venv={sys.prefix}\nensure_env() {{ :; }}\n")
    command = ["bash", str(checkout / "studies" / name), *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_records_are_packed_without_weights_and_give_the_same_tables(tmp_path):
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    run = tmp_path / "runs" / "evidence-initial-sums" / "seed=0"
    write_evaluated(run)
    (run.parent / "seed=0.json").write_text(json.dumps({"settings": {"seed": "0"}, "run": []}))
    for weights in ("checkpoints/7/_METADATA.json", "model/jexit.json", "teacher/ab/store.json"):
        (run / weights).parent.mkdir(parents=True)
        (run / weights).write_text("{}")
    (run / "report.html").write_text("")
    assert script("pack.sh", tmp_path, "evidence-initial-sums").returncode == 0
    results = tmp_path / "docs" / "results"
    with tarfile.open(results / "records" / "evidence-initial-sums.tar.xz") as archive:
        names = {pathlib.PurePath(name).name for name in archive.getnames()}
    assert names == {"seed=0.json", "config.json", "eval.json", "completions.json"}
    collect.main([str(run.parent), str(tmp_path / "page")])
    shutil.rmtree(tmp_path / "runs")
    made = script("tables.sh", tmp_path)
    assert made.returncode == 0, made.stderr
    table = results / "evidence-initial-sums.csv"
    assert table.read_bytes() == (tmp_path / "page.csv").read_bytes()
    refused = script("pack.sh", tmp_path, "missing")
    assert refused.returncode == 2 and "run its study first" in refused.stderr


def test_the_published_tables_and_charts_are_those_of_the_records(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.svg"))
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    shutil.copy(ROOT / "README.md", tmp_path)
    made = script("tables.sh", tmp_path)
    assert made.returncode == 0, made.stderr
    for path in (tmp_path / "docs" / "results").iterdir():
        if path.suffix in (".csv", ".json"):
            assert path.read_bytes() == (ROOT / "docs" / "results" / path.name).read_bytes()
    for name in ("README.md", "docs/results.md"):
        text = (tmp_path / name).read_text()
        assert text == (ROOT / name).read_text(), name
        pictures = re.findall(r"!\[.*?\]\((?:docs/)?(results/[^)]+)\)", text)
        for picture in pictures:
            drawn, kept = (root / "docs" / picture for root in (tmp_path, ROOT))
            assert text_of(drawn) == text_of(kept)
            (told, numbers), (kept_told, kept_numbers) = marks_of(drawn), marks_of(kept)
            assert told == kept_told
            np.testing.assert_allclose(numbers, kept_numbers, atol=0.2)
