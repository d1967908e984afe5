"""A run's files as the report reads them, whole, torn or wrong."""

import json

import pytest

from jexit.report.html import render
from jexit.report.runs import default_settings, read_run, read_runs, settings
from report_files import LAYERS, write_evaluated, write_json, write_trained


def test_an_evaluation_and_a_training_run_are_read(tmp_path):
    evaluated = read_run(write_evaluated(tmp_path / "eval"))
    assert (evaluated.command, evaluated.label) == ("eval", "eval")
    assert len(evaluated.completions) == 9 and not evaluated.samples and not evaluated.notes
    assert not evaluated.curves.names and evaluated.before is None
    trained = read_run(write_trained(tmp_path / "rl", steps=7))
    assert trained.command == "rl" and trained.evaluation is None
    assert len(trained.curves["accuracy"][0]) == 7
    assert {sample.step for sample in trained.samples} == {1, 7}
    assert trained.before.accuracy == 0.7344 and trained.after is not None


def test_the_layer_count_comes_from_whatever_says_it(tmp_path):
    evaluated = write_evaluated(tmp_path / "eval")
    assert read_run(evaluated).layers == LAYERS
    trained = write_trained(tmp_path / "rl")
    assert read_run(trained).layers == LAYERS
    for name in ("after.json", "before.json"):
        (trained / name).unlink()
    assert read_run(trained).layers == LAYERS  # mean depth over its share of all layers
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    kept = [{k: v for k, v in json.loads(line).items() if k != "depth/mean"} for line in lines]
    (trained / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    assert read_run(trained).layers == LAYERS  # the first token's pass never leaves
    (trained / "samples.jsonl").unlink()
    assert read_run(trained).layers is None


def test_no_files_imply_a_model_of_no_layers(tmp_path):
    trained = write_trained(tmp_path / "rl")
    figures = json.loads((trained / "after.json").read_text())
    write_json(trained / "after.json", figures | {"depth_mean": 0.0, "depth_fraction": 0.5})
    (trained / "before.json").unlink()
    assert read_run(trained).layers == LAYERS  # the metrics imply it
    (trained / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    sample = {"prompt": "p", "completion": "c", "tokens": ["a"], "depths": [0], "step": 1}
    (trained / "samples.jsonl").write_text(f"{json.dumps(sample)}\n")
    assert read_run(trained).layers is None
    assert "Token by token" not in render(read_runs([trained]))


def test_an_evaluation_that_was_cut_short_says_so(tmp_path):
    evaluated = write_evaluated(tmp_path / "eval")
    value = json.loads((evaluated / "eval.json").read_text())
    write_json(evaluated / "eval.json", value | {"complete": False})
    (note,) = read_run(evaluated).notes
    assert "ended before all of its measures were done" in note and note in render(
        [read_run(evaluated)]
    )
    write_json(evaluated / "eval.json", value | {"complete": True})
    assert not read_run(evaluated).notes


def test_what_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="is no directory; give the --workdir of a run"):
        read_run(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds neither metrics\.jsonl nor eval\.json"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no whole line yet"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["eval.json", "completions.json", "config.json", "before.json"])
@pytest.mark.parametrize(
    "content, why",
    [
        (b'{"task": {', "line 1: "),
        (b"", "line 1: "),
        (b"{\n3}", "line 2: "),
        (b'"\xff"', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_json_is_named(tmp_path, name, content, why):
    write_evaluated(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name} is not valid JSON \({why}.*\); remove it"
    ) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("eval.json", {"runs": []}, r"eval\.json lacks 'task'"),
        ("completions.json", {}, r"completions\.json is \{\} where a list"),
        ("config.json", [], r"config\.json holds no JSON object"),
        ("after.json", {}, r"after\.json lacks 'policy'"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, name, value, sentence):
    write_evaluated(tmp_path)
    write_json(tmp_path / name, value)
    with pytest.raises(ValueError, match=sentence):
        read_run(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write_evaluated(tmp_path)
    (tmp_path / "completions.json").unlink()
    (tmp_path / "completions.json").mkdir()
    with pytest.raises(
        ValueError, match=r"completions\.json is a directory, not a file; remove it"
    ):
        read_run(tmp_path)


def test_torn_and_broken_lines_are_left_out_and_told(tmp_path):
    workdir = write_trained(tmp_path, steps=5)
    path = workdir / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 6, "accu')
    run = read_run(workdir)
    assert run.notes == (f"The last line of {path} is not whole and is left out.",)
    assert len(run.curves["loss"][0]) == 5
    path.write_text("nonsense\n" + whole + "[1]\n")
    assert read_run(workdir).notes == (f"2 of the 7 lines of {path} are no records of a step.",)


def test_labels_are_as_short_as_they_can_be(tmp_path):
    paths = [write_trained(tmp_path / place, steps=2) for place in ("a/rl", "b/rl", "b/sft")]
    assert [run.label for run in read_runs(paths[1:])] == ["rl", "sft"]
    assert [run.label for run in read_runs(paths)] == ["a/rl", "b/rl", "b/sft"]
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([paths[0], tmp_path / "b" / ".." / "a" / "rl"])


def test_settings_are_flat_and_compared_with_the_defaults_of_their_command(tmp_path):
    run = read_run(write_trained(tmp_path, steps=2, depth_coef=1.25))
    flat, defaults = settings(run.config), default_settings(run.config)
    assert {key for key in flat if flat[key] != defaults[key]} == {"rl.depth_coef"}
    assert default_settings({"command": "fly"}) is None
    assert default_settings({"command": "rl", "preset": "none such"}) is None
