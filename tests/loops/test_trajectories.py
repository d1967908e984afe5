"""Completions of one prompt that share a row: nothing changes but the work."""

import shutil

import jax
import numpy as np
from random_models import random_model

import jexit
from jexit.config import TINY_PATH, LoRA
from jexit.data.teacher_store import Trajectory
from jexit.data.tokenizer import Tokenizer
from jexit.dist import host_rows
from jexit.io.model_dir import save_model
from jexit.loops import trajectories
from jexit.loops.continuation import rows_at_a_time
from jexit.loops.sft import exit_states
from jexit.loops.stage import Stage
from jexit.loops.trajectories import Trajectories, teacher_trajectories
from jexit.steps.state import split_model
from small_runs import make_config, small_model


def made(prompts=5, completions=4, lacking=2):
    """A prompt's completions are neighbours; number `lacking` has one less."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        prompt = rng.integers(0, 11, size=3 + number).tolist()
        for _ in range(completions - (number == lacking)):
            rows.append(Trajectory(prompt, rng.integers(0, 11, size=rng.integers(2, 9)).tolist()))
    return rows


def test_rows_hold_the_completions_of_one_prompt(model_dir):
    config = make_config("sft", model_dir, sft__completions=4)
    rows = Trajectories.of(config, made(), 0).rows
    assert [len(row) for row in rows] == [4, 4, 3, 4, 4]
    assert [one for row in rows for one in row] == made()
    # One prompt drawn twice in a row: no more of it than were asked for.
    twice = Trajectories.of(config, made(1) + made(1), 0).rows
    assert [len(row) for row in twice] == [4, 4]
    alone = Trajectories.of(make_config("sft", model_dir), made(), 0)
    assert [len(row) for row in alone.rows] == [1] * 19 and not alone.shared


class Watched:
    """A stage as `exit_states` needs it."""

    def __init__(self, config, split):
        self.config, self.split = config, split


def test_a_shared_prompt_gives_the_states_of_prompts_of_their_own(model_dir):
    split = split_model(small_model(11), full=False)
    found = {}
    for completions in (1, 4):
        config = make_config(
            "sft",
            model_dir,
            sft__completions=completions,
            batch_size=8,
            sft__lens_tokens=10_000,
            sft__sharpness=1e6,  # nobody leaves, for draws come in the order of the rows
        )
        trajectories = Trajectories.of(config, made(8, lacking=None), 0)
        assert trajectories.shared == (completions > 1)
        states, count = exit_states(Watched(config, split), trajectories, split.trainable)
        # As sets, for the rows come in another order.
        both = np.concatenate([states.kl_NE, states.residual_NED[:, 0]], axis=1)[:count]
        found[completions] = both[np.lexsort(np.round(both, 3).T)]
    assert found[4].shape == found[1].shape and len(found[1]) > 60
    np.testing.assert_allclose(found[4], found[1], atol=1e-4)


def test_states_end_at_the_number_of_tokens_that_was_asked_for(model_dir):
    """In the middle of the second batch, and at the end of the first."""
    split = split_model(small_model(11), full=False)

    def states(tokens):
        config = make_config("sft", model_dir, batch_size=8, sft__lens_tokens=tokens)
        trajectories = Trajectories.of(config, made(8, lacking=None), 0)
        here = host_rows(rows_at_a_time(config, len(trajectories)))
        first, second = (int(trajectories.batch(i, here)[0].action_BC.sum()) for i in (0, 1))
        return exit_states(Watched(config, split), trajectories, split.trainable), first, second

    (whole, positions), first, second = states(10_000)
    assert positions > first + second and second > 2
    for tokens in (first + second // 2, first):
        (some, count), *_ = states(tokens)
        assert count == tokens == len(some.kl_NE)
        for part, all_of_it in zip(*map(jax.tree.leaves, (some, whole)), strict=True):
            np.testing.assert_array_equal(part, all_of_it[:tokens])


def test_trajectories_are_the_base_models_at_full_depth(tmp_path):
    """Greedy ones of a model whose adapters and exits would write something else."""
    tokenizer = Tokenizer.load(TINY_PATH)
    model = random_model(
        vocab_size=tokenizer.vocab_size, layers=3, exit_layers=(1, 2),
        lora=LoRA(rank=2, alpha=4.0, targets=("q", "v", "up")),
    )  # fmt: skip
    save_model(tmp_path / "model", model, tokenizer)
    config = make_config(
        "sft", tmp_path / "model", sft__temperature=0.0, lora__alpha=4.0,
        lora__targets=("q", "v", "up"),
    )  # fmt: skip
    stage = Stage.open(config, tmp_path / "run", updates=config.steps)
    made = [one for row in teacher_trajectories(stage).rows for one in row]
    (batch,) = [stage.prompts(0, host_rows(6))]
    asked = {"max_new_tokens": config.sft.max_new_tokens, "temperature": 0.0}
    prompts = [problem.messages for problem in batch.problems]
    base = jexit.generate(model, tokenizer, prompts, adapters=False, **asked)
    longer = [ids for ids in base.tokens if len(ids) > 1]
    assert sorted(one.completion for one in made) == sorted(longer) and len(longer) > 3
    assert base.tokens != jexit.generate(model, tokenizer, prompts, **asked).tokens


def test_stored_trajectories_serve_larger_and_smaller_pools(model_dir, tmp_path, monkeypatch):
    generated = []

    def counted(stage, step, *rest):
        generated.append(step)
        return make(stage, step, *rest)

    make = trajectories._generated
    monkeypatch.setattr(trajectories, "_generated", counted)

    def completions(pool, name, store=None):
        if store:
            shutil.copytree(tmp_path / store / "teacher", tmp_path / name / "teacher")
        config = make_config("sft", model_dir, sft__pool=pool, sft__generate_batch=4)
        stage = Stage.open(config, tmp_path / name, updates=config.steps)
        rows = teacher_trajectories(stage).rows
        return sorted(one.completion for row in rows for one in row)

    first = completions(8, "first")
    assert len(first) > 4 and generated == [0, 1]
    larger = completions(12, "larger", "first")
    assert generated == [0, 1, 2]
    smaller = completions(6, "smaller", "first")
    assert generated == [0, 1, 2]
    assert larger == completions(12, "anew") != first
    assert smaller == completions(6, "anew too") != first


def test_positions_are_those_whose_pass_could_leave(model_dir):
    config = make_config("sft", model_dir, sft__completions=4)
    batch, rows = Trajectories.of(config, made(), 0).batch(0, host_rows(5))
    assert int(batch.action_BC.sum()) == sum(len(one.completion) - 1 for one in made())
    assert batch.tokens_BT.shape[1] < max(len(row) * len(row[0].prompt) for row in rows) + 36
    for place, row in enumerate(rows):
        text = [*row[0].prompt, *(token for one in row for token in one.completion)]
        assert batch.tokens_BT[place, : len(text)].tolist() == text
