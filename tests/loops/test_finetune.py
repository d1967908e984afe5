"""Fine-tuning from end to end on a small random model."""

import json

import pytest

import jexit
from jexit.config import PROJECTIONS
from jexit.io.model_source import open_model
from small_runs import run


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_run_learns_and_writes_a_plain_trunk(model_dir, tmp_path, rank):
    workdir = tmp_path / "run"
    run(
        "finetune", model_dir, workdir, steps=20, batch_size=16, lora__rank=rank,
        finetune__max_new_tokens=48, lora__targets=PROJECTIONS,
        optim__full_lr=1e-2, optim__lora_lr=3e-2, eval__problems=4,
    )  # fmt: skip
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 20 and losses[-1] < 0.85 * losses[0]
    assert all(row["data/padding"] < 0.5 for row in rows if "loss" in row)
    source = open_model(workdir / "model")
    assert source.lora is None and not source.exit_layers and source.base == workdir / "model"
    before, after = (
        json.loads((workdir / name).read_text()) for name in ("before.json", "after.json")
    )
    assert before["policy"] == after["policy"] == "full"
    assert jexit.load(workdir)[0].lora is None


def test_a_run_that_was_stopped_ends_like_one_that_was_not(model_dir, tmp_path):
    settings = {
        "batch_size": 8,
        "eval__problems": 2,
        "checkpoint__every": 2,
        "lora__rank": 4,
        "finetune__max_new_tokens": 48,
    }
    run("finetune", model_dir, tmp_path / "whole", steps=6, **settings)
    run("finetune", model_dir, tmp_path / "parts", steps=4, **settings)
    run("finetune", model_dir, tmp_path / "parts", steps=6, **settings)

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    assert losses("parts") == losses("whole")


def test_a_reference_over_the_limit_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"over the limit of 4: .* raise config\.finetune\."):
        run("finetune", model_dir, tmp_path / "run", finetune__max_new_tokens=4)
