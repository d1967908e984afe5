"""The page as a whole: what its files say is on it, and nothing else is."""

import json
import re

import pytest

from jexit.report.__main__ import main
from jexit.report.page import page, write_report
from jexit.report.runs import read_run, read_runs
from jexit.report.tables import MEASURES, duration, headline
from parsed_page import cells, parse
from report_files import (
    CLASSES,
    LAYERS,
    NASTY,
    evaluation,
    write_evaluated,
    write_json,
    write_trained,
)

SECTIONS = [
    *("overview", "training", "policies", "exits", "tokens", "capacity", "faithfulness"),
    *("hazards", "settings", "absent"),
]


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {"eval": write_evaluated(root / "eval"), "rl": write_trained(root / "rl")}


@pytest.fixture(scope="module")
def evaluated(workdirs):
    return parse(page([read_run(workdirs["eval"])]))


def sections(tree):
    return [section.attributes["id"] for section in tree.all("section")]


def rows_of(tree, caption):
    """The cells of the table whose caption begins so, its head first."""
    (table,) = [t for t in tree.all("table") if t.one("caption").text.startswith(caption)]
    return cells(table)


def column(rows, name):
    return [row[rows[0].index(name)] for row in rows[1:]]


def test_it_can_be_read_by_all_without_scripts_and_asks_for_nothing(workdirs, evaluated):
    assert evaluated.one("html").attributes["lang"] == "en"
    assert evaluated.one("head").one("title").text == "eval – jexit report"
    levels = [int(e.name[1]) for e in evaluated if re.fullmatch("h[1-6]", e.name)]
    assert levels[0] == 1 and levels.count(1) == 1
    for section in evaluated.all("section"):
        assert section.attributes["aria-labelledby"] == section.one("h2").attributes["id"]
    links = [link.attributes["href"] for link in evaluated.one("nav").all("a")]
    assert links == [f"#{key}" for key in sections(evaluated)]
    assert all(chart.attributes["aria-label"] for chart in evaluated.all("svg", role="img"))
    for box in evaluated.all("div", class_="scroll"):
        assert box.attributes["aria-label"] == box.one("caption").text
        assert box.attributes["tabindex"] == "0"  # who has no mouse can scroll it
        head, *rows = box.all("tr")
        assert all(cell.attributes["scope"] == "col" for cell in head.all("th"))
        for row in rows:
            assert [cell.attributes["scope"] for cell in row.all("th")] == ["row"]
            assert len(cells(row)[0]) == len(cells(head)[0])
    tree = parse(page(read_runs(list(workdirs.values()))))
    for element in tree:
        assert "src" not in element.attributes and element.name not in ("img", "iframe", "use")
        assert not any(key.startswith("on") for key in element.attributes)
        href = element.attributes.get("href")
        assert href is None or href.startswith("#") or href == "data:,"
    style = tree.one("style").text
    assert not re.search(r"url\(|@import|http", style + tree.one("script").text)
    policy = tree.all("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert policy.startswith("default-src 'none'")
    found = [e for e in tree if e.attributes.get("role") == "gridcell"]
    assert found and all("depth" in cell.attributes["title"] for cell in found)
    known = set(re.findall(r"\.([a-zA-Z][\w-]*)", style)) | {"dash0"}
    used = {name for element in tree for name in element.classes}
    assert used - known <= {"problem", "small", "map"}


def test_sections_are_there_when_their_files_are_and_what_is_missing_is_named(workdirs):
    for names, absent, missing in (
        (["eval"], {"training"}, ["training curves"]),
        (
            ["rl"],
            {"policies", "exits", "capacity", "faithfulness", "hazards"},
            ["accuracy and depth under policies"],
        ),
        (["rl", "eval"], set(), ["rl, accuracy and depth under policies", "eval, training curves"]),
    ):
        tree = parse(page(read_runs([workdirs[name] for name in names])))
        assert sections(tree) == [key for key in SECTIONS if key not in absent], names
        lines = [line.text.partition(": ") for line in tree.one("section", id="absent").all("li")]
        assert [what for what, _, _ in lines] == missing
        assert all(c.startswith("python -m jexit.main --config=configs/") for _, _, c in lines)


def test_cards_and_tables_say_what_the_evaluation_says(evaluated):
    value = evaluation()
    full, sampled, *_ = value["runs"]
    cards = [card.one("dd").text for card in evaluated.one("dl", class_="cards").all("div")]
    low, high = (f"{100 * bound:.1f}" for bound in sampled["accuracy_ci95"])
    assert cards[0] == (
        f"{100 * sampled['accuracy']:.1f}\u00a0%95 % interval {low} to {high}\u00a0%"
        f"full: {100 * full['accuracy']:.1f}\u00a0%"
    )
    assert cards[3].startswith(f"{sampled['layers_per_problem']:.1f}")
    rows = rows_of(evaluated, "Policies on 256 problems of the test split")
    assert column(rows, "accuracy") == [f"{100 * r['accuracy']:.1f}\u00a0%" for r in value["runs"]]
    assert column(rows, "mean depth") == [f"{r['depth_mean']:.2f}" for r in value["runs"]]
    assert column(rows, "policy")[-2:] == [
        f"{n} control of sample" for n in ("fixed:matched", "shuffled")
    ]
    assert set(column(rows, "strict / lenient / wrong / none")) == {"240 / 3 / 12 / 1"}
    assert set(column(rows, "s/problem")) == {f"{12.5 / 4321:.3f}"}
    layers = [f"{r['layers_per_problem']:.1f}" for r in value["runs"]]
    assert column(rows, "layers per problem") == layers
    rows = rows_of(evaluated, "Policy minus control")
    assert rows[1][:6] == [
        "sample", "shuffled", "+62.0", "+56.0 to +68.0", "+0.1", "−1.0 to +1.2",
    ]  # fmt: skip
    rows = rows_of(evaluated, "Mean depth in layers by token class")
    depths = sampled["depth_by_class"].values()
    assert rows[2][1:] == [f"{entry['depth_mean']:.2f}" for entry in depths]
    assert rows[-1][1:] == [str(500 + place) for place in range(len(CLASSES))]
    rows = rows_of(evaluated, "Accuracy for prescribed steps")
    assert column(rows, "step")[:5] == ["2", "3", "4", "5", "at once"]
    assert column(rows, "policy")[::5] == ["full", "sample", "shuffled"]
    assert column(rows, "steps as asked")[2:4] == ["98.0\u00a0%", "25.0\u00a0%"]
    rows = rows_of(evaluated, "Results of steps that were begun")
    assert rows[-1][:3] == ["sample", "3", "62.5\u00a0%"]
    rows = rows_of(evaluated, "Calibration of the hazards")
    assert column(rows, "KL to the teacher, nats")[:2] == ["0.276", ""]
    rows = rows_of(evaluated, "Measures of faithfulness")
    assert column(rows, "measure")[:4] == ["early answering"] * 2 + ["no chain"] * 2
    assert column(rows, "also")[0] == "with chain 0.970; answered 0.310"
    terms = evaluated.one("dl", class_="terms").all("dt")
    assert [term.text for term in terms] == [name.replace("_", " ") for name in MEASURES]
    rows = rows_of(evaluated, "Policy minus full depth")
    assert rows[1] == [
        "accuracy", "sample", "full", "0.750", "0.500", "0.250", "−0.125 to 0.625", "110",
    ]  # fmt: skip


def test_the_headline_is_of_a_policy_that_chooses_depths(tmp_path):
    value = evaluation()
    value["runs"] = [value["runs"][2] | {"policy": "fixed:3"}, *value["runs"][:0:-1]]
    value["runs"] = [run for run in value["runs"] if run["policy"] != "sample"]
    value["faithfulness"][0]["measures"][1]["name"] = "new_measure"
    write_json(tmp_path / "eval.json", value)
    run = read_run(tmp_path)
    assert [name for name, _ in headline(run)] == ["threshold:0.5"]
    assert rows_of(parse(page([run])), "Measures of faithfulness")[-1][0] == "new measure"


def test_a_training_run_says_what_it_was_and_came_to(workdirs, tmp_path):
    workdir = write_trained(tmp_path / "one", steps=3, depth_coef=1.25)
    start = {"time": "2026-05-04 03:02", "version": "0.9", "commit": "abc123-dirty"}
    later = start | {"time": "2026-05-05 01:01", "version": "1.0"}
    (workdir / "starts.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(later)}\n{{")
    tree = parse(page([read_run(workdir)]))
    about = dict(row for row in rows_of(tree, "What was run")[1:])
    assert about["depth penalty λ"] == "1.25 on mean depth"
    assert (about["started (UTC)"], about["jexit"]) == ("2026-05-04 03:02", "1.0 abc123-dirty")
    assert about["duration"] == "1 min 3 s in steps" and about["layers"] == str(LAYERS)
    assert [duration(s) for s in (0.4, 59.6, 7322, None)] == ["0 s", "1 min 0 s", "2 h 2 min", ""]
    tokens = tree.one("section", id="tokens")
    assert "Rollouts of steps 3 and 1" in tokens.text and "azard" not in tokens.text
    titles = [h.one("strong").text for h in tokens.one("details", open=None).all("h4")]
    assert titles == ["step 3"] * 3 + ["step 1"] * 3
    assert "A hazard is the probability" in page([read_run(workdirs["eval"])])
    differing = rows_of(tree, "Settings that differ from the defaults of rl:tiny")
    assert differing == [["setting", "default", "one"], ["rl.depth_coef", "0.5", "1.25"]]
    # The layer count follows from what was measured, else from the first token's pass.
    for name in ("before.json", "after.json"):
        (workdir / name).unlink()
    assert read_run(workdir).layers == LAYERS
    (workdir / "samples.jsonl").unlink()
    assert read_run(workdir).layers is None
    assert "Token by token" not in page([read_run(workdir)])
    write_json(workdir / "config.json", {"command": "fly", "seed": 3, "a": {"b": "<"}})
    rows = rows_of(parse(page([read_run(workdir)])), "All settings")
    assert rows[1:] == [["a.b", '"<"'], ["command", '"fly"'], ["seed", "3"]]


def test_runs_stand_side_by_side_under_their_shortest_names(workdirs, tmp_path):
    other = write_trained(tmp_path / "sft", steps=40, depth_coef=1.5)
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", config | {"command": "sft"})
    tree = parse(page(read_runs([workdirs["rl"], other, workdirs["eval"]])))
    rows = rows_of(tree, "Main results")
    trained = ["before training", "after training"]
    assert column(rows, "measured") == [*trained * 2, "sample", "full"]
    assert column(rows, "accuracy")[0] == "73.4\u00a0%"
    headings = [heading.text for heading in tree.one("section", id="training").all("h3")]
    assert headings == ["rl: rl", "sft: sft"]  # never two commands on one axis
    rows = rows_of(tree, "Settings that differ between the runs")
    assert rows[0] == ["setting", "rl", "sft", "eval"]
    assert ["rl.depth_coef", "2.0", "1.5", "0.5"] in rows
    paths = [write_trained(tmp_path / place, steps=2) for place in ("a/rl", "b/rl", "b/sft")]
    assert [run.label for run in read_runs(paths)] == ["a/rl", "b/rl", "b/sft"]


def test_nothing_that_a_model_wrote_becomes_markup(workdirs, tmp_path):
    value = evaluation()
    evil = "<img src=x onerror=alert(1)>"
    value["model"]["path"] = value["task"]["name"] = value["runs"][1]["policy"] = evil
    value["faithfulness"][0]["policy"] = value["capacity"][0]["granularity"] = evil
    value["faithfulness"][0]["measures"][1]["name"] = evil
    value["runs"][0]["text"] = {evil: 1.0}
    value["runs"][0]["depth_by_class"] = {evil: {"tokens": 1, "depth_mean": 2.0}}
    workdir = write_evaluated(tmp_path / "<b>&'\"")
    write_json(workdir / "eval.json", value)
    write_json(workdir / "config.json", {"command": evil, "seed": evil})
    rows = (workdirs["rl"] / "metrics.jsonl").read_text().splitlines()
    rows = [json.dumps({**json.loads(row), evil: 1.0}) for row in rows]
    (workdir / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    start = dict.fromkeys(("time", "version", "commit"), evil)
    (workdir / "starts.jsonl").write_text(json.dumps(start))
    text = page([read_run(workdir)])
    tree = parse(text)
    assert not tree.all("img") and not tree.all("b")
    assert len(tree.all("script")) == 1 and "alert" not in tree.one("script").text
    assert tree.one("h1").text == "<b>&'\""
    assert tree.all("pre", class_="prompt")[0].text.startswith(NASTY[:30])
    text.encode("utf-8")


def test_it_is_written_beside_the_first_run_or_elsewhere_and_always_the_same(
    workdirs, tmp_path, capsys
):
    assert main([str(workdirs["rl"]), str(workdirs["eval"])]) == 0
    path = workdirs["rl"] / "report.html"
    assert capsys.readouterr().out == f"Wrote {path}\n"
    assert not (workdirs["eval"] / "report.html").exists()
    assert not list(workdirs["rl"].glob(".*partial"))
    runs = read_runs([workdirs["rl"], workdirs["eval"]])
    again = write_report(runs, tmp_path / "new" / "page.html")
    assert again.read_bytes() == path.read_bytes()
    (tmp_path / "file").write_text("")
    for output, why in (
        (tmp_path, "is a directory, but --output must be a file; give a file name"),
        (tmp_path / "file" / "page.html", "cannot write"),
    ):
        assert main([str(workdirs["eval"]), f"--output={output}"]) == 1
        assert why in capsys.readouterr().err


def test_a_mistake_is_one_sentence_and_leaves_no_page(workdirs, tmp_path, capsys):
    def said(*paths):
        assert main([str(path) for path in paths]) == 1
        error = capsys.readouterr().err
        assert error.startswith("jexit: ") and error.count("\n") == 1
        return error

    assert "is not a directory; give the --workdir of a run" in said(tmp_path / "absent")
    assert "contains neither metrics.jsonl nor eval.json" in said(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert "metrics.jsonl does not contain a complete line yet" in said(tmp_path)
    write_evaluated(tmp_path)
    for name in ("eval.json", "completions.json", "config.json", "before.json"):
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        for content in (b'{"task": {', b"", b'"\xff"', b"[" * 100_000):
            (tmp_path / name).write_bytes(content)
            assert f"{name} is not valid JSON" in said(workdirs["rl"], tmp_path)
        (tmp_path / name).unlink()
        if kept is not None:
            (tmp_path / name).write_bytes(kept)
    write_json(tmp_path / "config.json", {"command": 3})
    assert "config.json: command is 3, but it must be a string" in said(tmp_path)
    assert "is given twice" in said(tmp_path, tmp_path / "." / "..", tmp_path)
    assert not list(tmp_path.glob("*.html"))


def test_what_is_torn_or_cut_short_is_told_written_out_and_on_stderr(tmp_path, capsys):
    workdir = write_trained(tmp_path, steps=4)
    metrics = workdir / "metrics.jsonl"
    whole = metrics.read_text()
    write_json(workdir / "eval.json", evaluation() | {"complete": False})
    for text, told in (
        (whole + '{"step": 5, "lo', f"The last line of {metrics} is incomplete and is left out."),
        (
            "nonsense\n" + whole + "[1]\n",
            f"2 of the 6 lines of {metrics} are not records of a step and are left out.",
        ),
    ):
        metrics.write_text(text)
        assert main([str(workdir)]) == 0
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"jexit: {told}" and "ended before all of its measures" in second
        tree = parse((workdir / "report.html").read_text(encoding="utf-8"))
        assert tree.all("p", class_="note")[0].text == told
        assert len(read_run(workdir).curves["loss"][0]) == 4
