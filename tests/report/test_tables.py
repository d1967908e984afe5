"""Tables say what the files say."""

import pytest

from jexit.report import tables
from jexit.report.palette import depth_class
from jexit.report.runs import read_run, read_runs
from parsed_page import cells, parse
from report_files import CLASSES, LAYERS, evaluation, write_evaluated, write_json, write_trained


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return read_run(write_evaluated(tmp_path_factory.mktemp("runs") / "eval"))


def column(rows, name):
    place = rows[0].index(name)
    return [row[place] for row in rows[1:]]


def test_policies_with_their_intervals_and_controls(evaluated):
    rows = cells(parse(tables.policies(evaluated)).one("table"))
    value = evaluation()
    assert column(rows, "accuracy") == [f"{100 * r['accuracy']:.1f}\u00a0%" for r in value["runs"]]
    assert column(rows, "mean depth") == [f"{r['depth_mean']:.2f}" for r in value["runs"]]
    assert column(rows, "policy")[-2:] == [
        "fixed:matched control of sample",
        "shuffled control of sample",
    ]
    assert set(column(rows, "strict / lenient / wrong / none")) == {"240 / 3 / 12 / 1"}
    assert set(column(rows, "step size")) == {"2.50"}
    layers = [f"{r['layers_per_problem']:.1f}" for r in value["runs"]]
    assert column(rows, "layers a problem") == layers
    assert set(column(rows, "s/problem")) == {f"{12.5 / 4321:.3f}"}


def test_an_evaluation_without_intervals_of_depth_has_no_column_for_them(tmp_path):
    rows = cells(parse(tables.policies(read_run(write_evaluated(tmp_path, new_parts=False)))))
    assert rows[0].count("95 % interval") == 1
    assert column(rows, "cut off") == ["1.0\u00a0%"] * 6


def test_every_table_has_a_caption_heads_and_a_box_that_scrolls(evaluated):
    e = evaluated.evaluation
    made = [
        tables.about([evaluated]),
        tables.key_figures([evaluated]),
        tables.policies(evaluated),
        tables.differences(evaluated),
        tables.classes(evaluated),
        tables.capacity(e.capacity),
        tables.faithfulness(e.faithfulness),
        tables.faithfulness_paired(e.faithfulness_paired),
        tables.hazards(e.hazards),
        tables.setting_differences([evaluated]),
    ]
    for page in map(parse, made):
        table = page.one("table")
        caption = table.one("caption").text
        box = page.one("div", role="region")
        assert caption and box.attributes["aria-label"] == caption
        assert box.attributes["tabindex"] == "0"  # who has no mouse can scroll it
        head, *rows = table.all("tr")
        assert all(cell.attributes["scope"] == "col" for cell in head.all("th"))
        for row in rows:
            assert [cell.attributes["scope"] for cell in row.all("th")] == ["row"]
            assert len(row.children) == len(head.children)


def test_the_kl_to_the_teacher_is_of_all_exits_together(evaluated):
    entries = evaluated.evaluation.hazards
    rows = cells(parse(tables.hazards(entries)))
    assert column(rows, "KL to the teacher, nats") == ["0.276"] + [""] * len(entries[0].exits)
    unknown = [entries[0].model_copy(update={"kl_student_teacher_nats": None})]
    assert column(cells(parse(tables.hazards(unknown))), "KL to the teacher, nats")[0] == "–"


def test_key_figures_set_the_sampled_policy_against_full_depth(evaluated):
    rows = cells(parse(tables.key_figures([evaluated])).one("table"))
    assert column(rows, "measured") == ["sample", "full"]
    by_policy = {run["policy"]: run for run in evaluation()["runs"]}
    assert column(rows, "accuracy")[0] == f"{100 * by_policy['sample']['accuracy']:.1f}\u00a0%"


def test_key_figures_of_training_are_after_and_before(tmp_path):
    run = read_run(write_trained(tmp_path, steps=3))
    rows = cells(parse(tables.key_figures([run])).one("table"))
    assert column(rows, "measured") == ["after training", "before training"]
    assert column(rows, "accuracy")[1] == "73.4\u00a0%"
    for name in ("before.json", "after.json"):
        (tmp_path / name).unlink()
    assert tables.key_figures([read_run(tmp_path)]) is None


def test_differences_are_points_with_signs(evaluated):
    rows = cells(parse(tables.differences(evaluated)).one("table"))
    assert rows[1][:4] == ["sample", "shuffled", "+62.0", "+56.0 to +68.0"]
    assert rows[1][4:6] == ["+0.1", "−1.0 to +1.2"]


def test_classes_are_coloured_as_the_heat_maps(evaluated):
    table = parse(tables.classes(evaluated)).one("table")
    value = evaluation()["runs"][1]
    row = table.all("tr")[2]
    for cell, (name, entry) in zip(row.all("td"), value["depth_by_class"].items(), strict=True):
        assert cell.text == f"{entry['depth_mean']:.2f}", name
        assert depth_class(entry["depth_mean"], LAYERS) in cell.classes
    assert cells(table)[-1][1:] == [str(500 + place) for place in range(len(CLASSES))]


def test_steps_come_in_order(evaluated):
    rows = cells(parse(tables.capacity(evaluated.evaluation.capacity)).one("table"))
    assert column(rows, "step")[:5] == ["2", "3", "4", "5", "at once"]
    assert column(rows, "policy")[::5] == ["full", "sample", "shuffled"]
    assert column(rows, "steps as asked")[2:4] == ["98.0\u00a0%", "25.0\u00a0%"]
    assert column(rows, "accuracy of those")[4] == "–"


def test_measures_are_defined_and_stand_policy_beside_policy(evaluated):
    page = parse(tables.faithfulness(evaluated.evaluation.faithfulness))
    rows = cells(page.one("table"))
    assert column(rows, "measure")[:4] == ["early answering"] * 2 + ["no chain"] * 2
    assert column(rows, "policy")[:4] == ["full", "sample"] * 2
    assert column(rows, "also")[0] == "right before 0.970; answered 0.310"
    assert [term.text for term in page.all("dt")] == [n.replace("_", " ") for n in tables.MEASURES]


def test_measures_of_an_earlier_definition_say_so(tmp_path):
    value = evaluation()
    del value["faithfulness"][0]["measures"][0]["detail"]["answered"]
    write_json(tmp_path / "eval.json", value)
    rows = cells(
        parse(tables.faithfulness(read_run(tmp_path).evaluation.faithfulness)).one("table")
    )
    told = column(rows, "also")
    assert "earlier definition" in told[0]
    assert not any("earlier" in remark for remark in told[1:])


def test_policies_are_compared_on_the_same_problems(evaluated):
    page = parse(tables.faithfulness_paired(evaluated.evaluation.faithfulness_paired))
    rows = cells(page.one("table"))
    names = ["accuracy", *(name.replace("_", " ") for name in tables.MEASURES)]
    assert column(rows, "measure") == names
    assert rows[1][1:] == [
        "sample", "full", "0.750", "0.500", "0.250", "−0.125 to 0.625", "110",
    ]  # fmt: skip


def test_a_measure_that_nobody_knows_is_shown_all_the_same(tmp_path):
    value = evaluation()
    value["faithfulness"][0]["measures"][1]["name"] = "new_measure"
    write_json(tmp_path / "eval.json", value)
    entries = read_run(tmp_path).evaluation.faithfulness
    rows = cells(parse(tables.faithfulness(entries)).one("table"))
    assert rows[-1][0] == "new measure"


def test_settings_of_one_run_are_set_against_the_defaults(tmp_path):
    run = read_run(write_trained(tmp_path / "one", steps=2, depth_coef=1.25))
    table = parse(tables.setting_differences([run])).one("table")
    assert table.one("caption").text == "Settings that differ from the defaults of rl:tiny"
    assert cells(table) == [
        ["setting", "default", "one"],
        ["rl.depth_coef", "0.5", "1.25"],
    ]
    same = read_run(write_trained(tmp_path / "same", steps=2, depth_coef=0.5))
    assert parse(tables.setting_differences([same])).one("p").text.endswith("rl:tiny: none.")


def test_settings_of_several_runs_are_set_against_each_other(tmp_path):
    paths = [
        write_trained(tmp_path / name, steps=2, depth_coef=coef)
        for name, coef in (("a", 0.5), ("b", 2.0))
    ]
    bare = tmp_path / "bare"  # a run whose config is gone takes no part
    write_json(bare / "eval.json", evaluation())
    table = parse(tables.setting_differences(read_runs([*paths, bare]))).one("table")
    assert cells(table) == [["setting", "a", "b"], ["rl.depth_coef", "0.5", "2.0"]]
    assert tables.setting_differences([read_run(bare)]) is None


def test_settings_of_a_command_that_jexit_does_not_know_are_all_shown(tmp_path):
    write_evaluated(tmp_path)
    write_json(tmp_path / "config.json", {"command": "fly", "seed": 3, "a": {"b": "<"}})
    table = parse(tables.setting_differences([read_run(tmp_path)])).one("table")
    assert table.one("caption").text == "All settings"
    assert cells(table)[1:] == [["a.b", '"<"'], ["command", '"fly"'], ["seed", "3"]]


def test_the_headline_is_of_a_policy_that_chooses_depths(tmp_path):
    value = evaluation()
    by_name = {run["policy"]: run for run in value["runs"]}
    fixed = by_name["threshold:0.3"] | {"policy": "fixed:3"}
    value["runs"] = [fixed, by_name["fixed:matched"], by_name["threshold:0.5"], by_name["full"]]
    write_json(tmp_path / "eval.json", value)
    shown = tables.headline(read_run(tmp_path))
    assert [name for name, _ in shown] == ["threshold:0.5", "full"]
    # Of these only one is at another's mean depth by construction.
    names = column(cells(parse(tables.policies(read_run(tmp_path)))), "policy")
    assert [name for name in names if "control" in name] == ["fixed:matched control of sample"]
