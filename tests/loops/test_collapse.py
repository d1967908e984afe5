"""Reinforcement from a start that is hardly ever correct, and what the defaults make of it."""

import json
import re

import numpy as np
import pytest

from configs.rl import get_config
from jexit.config import Config
from jexit.loops.trainer import Collapsed
from jexit.main import dispatch
from small_runs import metrics

UPDATES = 24
FULL_DEPTH = 10.0  # tokens of a completion, about, by this trunk at full depth


def reinforced(workdir, settings):
    """Lengths and penalties of the shipped trunk's updates; fresh heads that leave at once."""
    config = get_config("tiny")
    config.model.path = "jexit/assets/tiny"
    config.exits.layers = (1, 2, 3, 4, 6)
    config.exit_head.bias = 0.0
    config.steps = UPDATES
    config.optim.schedule = "constant"
    config.rl.depth_coef = 0.5
    config.rl.length_coef = 0.5
    config.rl.length_ref = 20.0
    config.eval.problems = 64
    with config.unlocked():
        config.update_from_flattened_dict(settings)
    dispatch(Config.from_dict(config), workdir)
    rows = metrics(workdir)
    assert len(rows) == UPDATES and rows[0]["accuracy"] < 0.1
    return np.asarray([row["completion/length"] for row in rows]), rows


@pytest.mark.slow
def test_the_defaults_of_real_presets_keep_the_text_of_a_weak_start(tmp_path):
    real = get_config("qwen2.5-0.5b")
    settings = {
        "rl.accuracy_floor": real.rl.accuracy_floor,
        "rl.floor_of": real.rl.floor_of,
        "task.reward_none": real.task.reward_none,
    }
    lengths, rows = reinforced(tmp_path / "real", settings)
    assert lengths[-8:].min() > FULL_DEPTH
    assert all(row["depth_coef"] == row["length_coef"] == 0 for row in rows)
    # What they are there for: with penalties from the first update the text shrinks.
    lengths, _ = reinforced(tmp_path / "penalised", {})
    assert lengths[-8:].max() < 0.75 * FULL_DEPTH


@pytest.mark.slow
def test_a_run_that_collapses_leaves_the_model_from_before(tmp_path):
    """A penalty twenty times the reward: all tokens come to leave at the first exit."""
    config = get_config("tiny")
    config.steps = 60
    config.rl.depth_coef = 20.0
    config.rl.warmup_steps = 20
    config.checkpoint.every = 1
    config.checkpoint.keep = 60
    config.eval.problems = 64
    with pytest.raises(Collapsed, match="collapse: nearly every token leaves at the first") as told:
        dispatch(Config.from_dict(config), tmp_path)
    rows = metrics(tmp_path)
    step = int(re.search(r"contains the model of step (\d+)", str(told.value)).group(1))
    assert 0 < step < len(rows) < config.steps
    assert rows[-1]["accuracy"] < 0.5 * rows[0]["accuracy"]
    assert rows[step]["accuracy"] >= 0.8 * rows[0]["accuracy"]  # of the model of step `step`
    before, after = (
        json.loads((tmp_path / f"{when}.json").read_text())["accuracy"]
        for when in ("before", "after")
    )
    assert after > 0.8 * before
