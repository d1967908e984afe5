"""Fine-tuning from end to end on a small random model."""

import numpy as np
import pytest

import jexit
from jexit.config import PROJECTIONS, TINY_PATH
from jexit.io.model_source import open_model
from small_runs import measured, metrics, parameters, run

SETTINGS = {"batch_size": 16, "finetune__max_new_tokens": 48, "eval__problems": 2}


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_a_run_learns_and_writes_a_plain_trunk(model_dir, tmp_path, rank):
    workdir = tmp_path / "run"
    run(
        "finetune", model_dir, workdir, steps=20, lora__rank=rank, lora__targets=PROJECTIONS,
        optim__full_lr=1e-2, optim__lora_lr=3e-2, **SETTINGS,
    )  # fmt: skip
    rows = metrics(workdir)
    assert len(rows) == 20 and rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert all(row["data/padding"] < 0.5 for row in rows)
    source = open_model(workdir / "model")
    assert source.lora is None and not source.exit_layers and source.base == workdir / "model"
    assert [result["policy"] for result in measured(workdir)] == ["full", "full"]
    assert jexit.load(workdir)[0].lora is None


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_like_one_that_was_not(model_dir, tmp_path):
    settings = SETTINGS | {"checkpoint__every": 2, "lora__rank": 4}
    run("finetune", model_dir, tmp_path / "whole", steps=6, **settings)
    for steps in (4, 6):
        run("finetune", model_dir, tmp_path / "parts", steps=steps, **settings)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_reference_over_the_limit_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"but the limit is 4; raise config\.finetune\."):
        run("finetune", model_dir, tmp_path / "run", finetune__max_new_tokens=4)


SAMPLED = SETTINGS | {"finetune__policy": "sample", "exits__layers": (1, 2), "lora__rank": 0}


def test_exits_that_have_not_been_trained_are_not_sampled(tmp_path):
    with pytest.raises(ValueError, match=r"is 'sample', but the model in .* has no trained exits"):
        run("finetune", TINY_PATH, tmp_path / "no", **SAMPLED)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_run_under_sampled_exits_keeps_them(model_dir, tmp_path):
    workdir = tmp_path / "run"
    run("finetune", model_dir, workdir, steps=8, optim__full_lr=1e-2, **SAMPLED)
    rows = metrics(workdir)
    assert rows[-1]["loss"] < rows[0]["loss"]
    before, after = parameters(model_dir), parameters(workdir)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert np.array_equal(after[name], values) == name.startswith("exits."), name
    assert [result["policy"] for result in measured(workdir)] == ["sample", "sample"]
