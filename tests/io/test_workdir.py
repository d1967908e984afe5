"""A run's directory belongs to one config."""

import json

import pytest

from jexit.config import Config
from jexit.io.workdir import check_same_run, start_run, trained_law


def config(**changes):
    values = Config(command="rl").to_dict()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    return values


def test_a_new_directory_is_made_with_the_whole_config(tmp_path):
    start_run(tmp_path / "runs" / "a", config(rl__rollouts=3))
    stored = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    assert Config.from_dict(stored) == Config.from_dict(config(rl__rollouts=3))


def test_checking_writes_nothing(tmp_path):
    check_same_run(tmp_path / "run", config())
    assert not (tmp_path / "run").exists()


def test_the_same_config_continues(tmp_path):
    start_run(tmp_path, config())
    start_run(tmp_path, config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl__depth_coef": 0.9}, r"config\.rl\.depth_coef=0\.5, and this one has 0\.9"),
        ({"exits__layers": (2, 4)}, r"config\.exits\.layers=\[\], and this one has \[2, 4\]"),
        ({"command": "sft"}, r"config\.command=rl, and this one has sft"),
        ({"seed": 1, "batch_size": 4}, r"config\.batch_size=32, and this one has 4"),
    ],
)
def test_another_config_is_refused_by_its_first_difference(tmp_path, changes, words):
    start_run(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    for check in (check_same_run, start_run):
        with pytest.raises(ValueError, match=words) as caught:
            check(tmp_path, config(**changes))
        assert str(tmp_path) in str(caught.value)
        assert "choose another --workdir, or the same settings" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_does_not_alter_the_past_may_change(tmp_path):
    start_run(tmp_path, config())
    longer = config(steps=500, checkpoint__every=7, log__samples=2, mesh__fsdp=2)
    start_run(tmp_path, longer)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 500


@pytest.mark.parametrize("text", ['{"seed": 0', "[1, 2]", ""])
def test_a_damaged_config_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not readable as a JSON object; remove"):
        check_same_run(tmp_path, config())
    assert (tmp_path / "config.json").read_text() == text


def test_a_full_disk_leaves_the_config_that_was_there(tmp_path, full_disk):
    start_run(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    full_disk(100)
    with pytest.raises(ValueError, match=r"cannot write .*config\.json: No space left"):
        start_run(tmp_path, config(steps=500))
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_law_of_depths_is_that_of_the_run(tmp_path):
    start_run(tmp_path / "rl", config(rl__min_hazard=0.02, rl__hazard_temperature=1.5))
    law = {"rl": {"min_hazard": 0.02, "hazard_temperature": 1.5}}
    assert trained_law(tmp_path / "rl") == law
    assert trained_law(tmp_path / "rl" / "model") == {}
    aim = {"sharpness": 7.0, "target": "student"}
    start_run(tmp_path / "sft", config(command="sft", **{f"sft__{k}": v for k, v in aim.items()}))
    start_run(tmp_path / "on", config(model__path=str(tmp_path / "sft"), rl__min_hazard=0.02))
    assert trained_law(tmp_path / "on")["sft"] == aim
    assert trained_law(tmp_path / "on")["rl"]["min_hazard"] == 0.02
    start_run(tmp_path / "pretrain", config(command="pretrain"))
    assert trained_law(tmp_path / "pretrain") == {}
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert trained_law(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"command": "rl", "rl"', r"config\.json is not readable as a JSON object"),
        (
            '{"command": "rl", "rl": {"min_hazard": 0}, "model": {}}',
            r"lacks rl\.min_hazard and rl\.hazard_temp",
        ),
        ('{"command": "sft"}', r"is of a run of sft and lacks sft\.sharpness and sft\.target"),
    ],
)
def test_a_law_that_cannot_be_read_is_one_sentence(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words + r".*give the path of the run's model/"):
        trained_law(tmp_path)
