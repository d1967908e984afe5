"""The page as a whole: what is on it, what is not, and that it depends on its files alone."""

import json
import re

import pytest

from jexit.report.__main__ import main
from jexit.report.html import missing_parts, render, write_report
from jexit.report.runs import read_run, read_runs
from parsed_page import parse
from report_files import NASTY, evaluation, write_evaluated, write_json, write_trained

SECTIONS = [
    "overview",
    "training",
    "policies",
    "exits",
    "tokens",
    "capacity",
    "faithfulness",
    "hazards",
    "settings",
    "absent",
]


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "eval": write_evaluated(root / "eval"),
        "old": write_evaluated(root / "old", 1, new_parts=False),
        "rl": write_trained(root / "rl"),
    }


def sections(page):
    return [section.attributes["id"] for section in page.all("section")]


def test_a_page_has_a_language_a_title_and_headings_in_order(workdirs):
    page = parse(render([read_run(workdirs["eval"])]))
    assert page.one("html").attributes["lang"] == "en"
    assert page.one("head").one("title").text == "eval – jexit report"
    assert page.one("h1").text == "eval"
    levels = [int(e.name[1]) for e in page if re.fullmatch("h[1-6]", e.name)]
    assert levels[0] == 1 and levels.count(1) == 1
    for section in page.all("section"):
        heading = section.one("h2")
        assert section.attributes["aria-labelledby"] == heading.attributes["id"]
    links = [link.attributes["href"] for link in page.one("nav").all("a")]
    assert links == [f"#{key}" for key in sections(page)]


def test_the_first_figures_are_accuracy_depth_tokens_and_layers(workdirs):
    overview = parse(render([read_run(workdirs["eval"])])).one("section", id="overview")
    cards = overview.one("dl", class_="cards").children
    sampled, full = (r for r in evaluation()["runs"] if r["policy"] in ("sample", "full"))
    if sampled["policy"] == "full":
        sampled, full = full, sampled
    assert [card.one("dt").text for card in cards] == [
        "right answers",
        "of all layers run",
        "tokens a completion",
        "layers a problem",
    ]
    assert f"{sampled['layers_per_problem']:.1f}" in cards[3].one("dd").text
    first = cards[0].one("dd").text
    low, high = (f"{100 * bound:.1f}" for bound in sampled["accuracy_ci95"])
    assert first == (
        f"{100 * sampled['accuracy']:.1f}\u00a0%95 % interval {low} to {high}\u00a0%"
        f"full: {100 * full['accuracy']:.1f}\u00a0%"
    )


@pytest.mark.parametrize(
    "names, absent",
    [
        (["eval"], {"training"}),
        (["old"], {"training", "capacity", "faithfulness", "hazards"}),
        (["rl"], {"policies", "exits", "capacity", "faithfulness", "hazards"}),
        (["rl", "eval"], set()),
    ],
)
def test_sections_are_there_when_their_files_are(workdirs, names, absent):
    page = parse(render(read_runs([workdirs[name] for name in names])))
    assert sections(page) == [key for key in SECTIONS if key not in absent]


def test_what_is_missing_is_named_with_what_would_produce_it(workdirs):
    assert missing_parts(read_run(workdirs["eval"])) == ["training curves"]
    old = read_run(workdirs["old"])
    assert missing_parts(old) == [
        "training curves",
        "depth by token class",
        "differences from controls",
        "head capacity",
        "faithfulness",
        "calibration of the hazards",
    ]
    assert missing_parts(read_run(workdirs["rl"])) == ["accuracy and depth under policies"]
    lines = parse(render([old])).one("section", id="absent").all("li")
    assert [line.text.partition(": ")[0] for line in lines] == missing_parts(old)
    assert all(line.one("code").text.startswith("python -m jexit.main") for line in lines)


def test_begun_steps_stand_beside_capacity_where_they_were_measured(workdirs, tmp_path):
    part = parse(render([read_run(workdirs["eval"])])).one("section", id="capacity")
    assert "The same without obedience" in part.text
    assert "Results of steps that were begun" in part.text
    write_json(tmp_path / "eval.json", evaluation() | {"begun_steps": None})
    part = parse(render([read_run(tmp_path)])).one("section", id="capacity")
    assert "Head capacity" in part.text and "without obedience" not in part.text


def test_a_run_with_metrics_alone_has_a_page(tmp_path, workdirs):
    (tmp_path / "metrics.jsonl").write_bytes((workdirs["rl"] / "metrics.jsonl").read_bytes())
    page = parse(render([read_run(tmp_path)]))
    assert sections(page) == ["overview", "training", "absent"]


def test_an_evaluation_alone_has_a_page(tmp_path):
    write_json(tmp_path / "eval.json", evaluation())
    page = parse(render([read_run(tmp_path)]))
    assert "tokens" not in sections(page) and "policies" in sections(page)


def test_samples_of_training_are_shown_from_the_last_step_and_the_first(workdirs):
    tokens = parse(render([read_run(workdirs["rl"])])).one("section", id="tokens")
    assert "Rollouts of steps 60 and 1" in tokens.text
    titles = [heading.one("strong").text for heading in tokens.one("details", open=None).all("h4")]
    assert titles == ["step 60"] * 3 + ["step 1"] * 3


def test_nothing_that_a_model_wrote_becomes_markup(workdirs, tmp_path):
    value = evaluation()
    evil = "<img src=x onerror=alert(1)>"
    value["model"]["path"] = value["task"]["name"] = value["runs"][1]["policy"] = evil
    value["faithfulness"][0]["policy"] = value["capacity"][0]["granularity"] = evil
    value["faithfulness"][0]["measures"][1]["name"] = evil
    value["runs"][0]["text"] = {evil: 1.0}
    value["runs"][0]["depth_by_class"] = {evil: {"tokens": 1, "depth_mean": 2.0}}
    write_evaluated(tmp_path / "<b>&'\"")
    write_json(tmp_path / "<b>&'\"" / "eval.json", value)
    rows = (workdirs["rl"] / "metrics.jsonl").read_text().splitlines()
    rows = [json.dumps({**json.loads(row), evil: 1.0}) for row in rows]
    (tmp_path / "<b>&'\"" / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    text = render([read_run(tmp_path / "<b>&'\"")])
    page = parse(text)
    assert not page.all("img") and not page.all("b")
    assert len(page.all("script")) == 1 and "alert" not in page.one("script").text
    assert page.one("h1").text == "<b>&'\""
    assert page.all("pre", class_="prompt")[0].text.startswith(NASTY[:30])
    text.encode("utf-8")


def test_the_page_asks_for_nothing_from_anywhere(workdirs):
    text = render(read_runs(list(workdirs.values())))
    page = parse(text)
    for element in page:
        assert "src" not in element.attributes and element.name not in ("img", "iframe", "use")
        href = element.attributes.get("href")
        assert href is None or href.startswith("#") or href == "data:,"
    style = page.one("style").text
    assert "url(" not in style and "@import" not in style
    assert "http" not in page.one("script").text + style
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert policy.startswith("default-src 'none'")


def test_it_can_be_read_without_scripts(workdirs):
    page = parse(render([read_run(workdirs["eval"])]))
    assert not any(key.startswith("on") for element in page for key in element.attributes)
    cells = [e for e in page if e.attributes.get("role") == "gridcell"]
    assert cells and all(cell.one("sub").text.isdigit() for cell in cells)
    assert all("depth" in cell.attributes["title"] for cell in cells)


def test_every_class_that_marks_carry_is_in_the_style_sheet(workdirs):
    page = parse(render(read_runs(list(workdirs.values()))))
    known = set(re.findall(r"\.([a-zA-Z][\w-]*)", page.one("style").text)) | {"dash0"}
    used = {name for element in page for name in element.classes}
    assert used - known <= {"figure", "problem", "small", "kind"}


def test_the_same_files_give_the_same_bytes(workdirs):
    paths = list(workdirs.values())
    first = write_report(paths, workdirs["rl"] / "one.html").read_bytes()
    assert write_report(paths, workdirs["rl"] / "two.html").read_bytes() == first


def test_it_is_written_beside_the_first_run(workdirs, capsys):
    assert main([str(workdirs["rl"]), str(workdirs["eval"])]) == 0
    path = workdirs["rl"] / "report.html"
    assert capsys.readouterr().out == f"Wrote {path}\n"
    parse(path.read_text(encoding="utf-8"))
    assert not (workdirs["eval"] / "report.html").exists()
    assert not list(workdirs["rl"].glob(".*partial"))


def test_another_place(workdirs, tmp_path, capsys):
    assert main([str(workdirs["eval"]), f"--output={tmp_path / 'new' / 'page.html'}"]) == 0
    assert (tmp_path / "new" / "page.html").stat().st_size > 10_000
    assert main([str(workdirs["eval"]), "--output", str(tmp_path)]) == 1
    assert "is a directory; give --output a file name" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(workdirs["eval"]), f"--output={tmp_path / 'file' / 'page.html'}"]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_mistake_is_one_sentence_and_leaves_no_page(workdirs, tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"jexit: {tmp_path} holds neither") and error.count("\n") == 1
    (tmp_path / "eval.json").write_text('{"task": ')
    assert main([str(workdirs["old"]), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'eval.json'} is not valid JSON" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]
    assert not (workdirs["old"] / "report.html").exists()


def test_a_torn_line_is_told_on_the_page_and_on_stderr(tmp_path, capsys):
    workdir = write_trained(tmp_path, steps=4)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert main([str(workdir)]) == 0
    sentence = f"The last line of {workdir / 'metrics.jsonl'} is not whole and is left out."
    assert capsys.readouterr().err == f"jexit: {sentence}\n"
    page = parse((workdir / "report.html").read_text(encoding="utf-8"))
    assert page.one("p", class_="note").text == sentence
