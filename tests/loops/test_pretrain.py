"""What pretraining's text is made of, and what it starts from."""

import pytest

from jexit.config import Config
from jexit.loops.pretrain import mixture
from small_runs import assert_same_model, metrics, run

SMALL = {
    "pretrain__layers": 3, "pretrain__width": 16, "pretrain__mlp_width": 24, "steps": 1,
}  # fmt: skip


def test_shares_of_the_text():
    for settings, expected in [
        ({}, {"sums": 0.8, "word_problems": 0.2}),
        ({"tom": 0.3}, {"sums": 0.5, "word_problems": 0.2, "tom": 0.3}),
        ({"word_problems": 0.0}, {"sums": 1.0}),
        ({"tom": 0.9, "word_problems": 0.1}, {"tom": 0.9, "word_problems": 0.1}),
    ]:
        found = mixture(Config.from_dict({"command": "pretrain", "pretrain": settings}))
        assert {task.name: share for task, share in found} == pytest.approx(expected)


def test_stories_have_prompts_of_every_granularity():
    config = Config.from_dict({"command": "pretrain", "pretrain": {"tom": 0.5}})
    *_, (task, _) = mixture(config)
    modes = {task.problem("train", index).fields["mode"] for index in range(60)}
    assert modes == {"free", "fine", "coarse", "at_once"}


@pytest.fixture(scope="module")
def trunk(model_dir, tmp_path_factory):
    """A run of one step on all three tasks."""
    workdir = tmp_path_factory.mktemp("trunk") / "run"
    stories = {"pretrain__tom": 0.3, "pretrain__length": 256}
    run("pretrain", model_dir, workdir, **SMALL, **stories, batch_size=8)
    return workdir


@pytest.mark.slow
def test_training_goes_on_from_another_runs_trunk(trunk, model_dir, tmp_path):
    (row,) = metrics(trunk)
    for name in ("step_2", "story"):
        assert 0 < row[f"p_correct/{name}"] < 0.1, name
    still = {"pretrain__start": str(trunk), "optim__full_lr": 0.0, "seed": 5}
    run("pretrain", model_dir, tmp_path / "on", **SMALL, **still)
    assert_same_model(trunk, tmp_path / "on")

    wide = SMALL | {"pretrain__width": 32, "pretrain__start": str(trunk)}
    message = r"start=\S+ contains a model with width 16, but the config requires width 32; "
    with pytest.raises(ValueError, match=message):
        run("pretrain", model_dir, tmp_path / "wide", **wide)
    assert not (tmp_path / "wide").exists()


def test_a_length_that_later_texts_are_over_stops_the_run_at_once(model_dir, tmp_path):
    """The first step's texts would fit."""
    short = {"pretrain__length": 51, "steps": 100, "batch_size": 2}
    with pytest.raises(
        ValueError, match=r"a training example has \d+ tokens, over the limit of 51"
    ):
        run("pretrain", model_dir, tmp_path / "short", **SMALL | short)
    assert not (tmp_path / "short").exists()
