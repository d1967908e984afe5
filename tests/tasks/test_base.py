"""What holds of every task: draws, splits, rewards, and chains that are changed at one step."""

import collections
import dataclasses
import itertools

import pytest

from jexit.tasks import Attempt, Rewards, make_task
from jexit.tasks.base import Draw, split_of, stable_hash

GENERATED = ("sums", "word_problems", "tom")


def test_problems_depend_on_seed_split_and_index_alone():
    for name in GENERATED:
        first, second = make_task(name), make_task(name)
        forward = [first.problem("train", i) for i in range(20)]
        backward = [second.problem("train", i) for i in reversed(range(20))]
        assert forward == backward[::-1]
        assert forward != [make_task(name, seed=1).problem("train", i) for i in range(20)]


def test_reference_completions_are_strict_and_their_totals_add_up():
    for name in GENERATED:
        task = make_task(name)
        problems = [task.problem(split, i) for split in ("train", "test") for i in range(12)]
        texts = [problem.completion for problem in problems]
        for problem, text in zip(problems, texts, strict=True):
            verdict = task.verify(problem, text)
            assert (verdict.kind, verdict.correct, verdict.reward) == ("strict", True, 1.0)
        attempts = [Attempt(text=text) for text in texts]
        whole = task.text_totals(problems, attempts)
        halves = [
            task.text_totals(problems[part], attempts[part]) for part in (slice(7), slice(7, 24))
        ]
        for key, total in whole.items():
            assert total == tuple(map(sum, zip(*(half[key] for half in halves), strict=True)))
        assert whole.keys() == task.text_totals([], []).keys()


def test_a_changed_step_is_undone_at_the_very_place_where_it_was_made():
    for name, settings in (
        ("sums", {"steps": 2}),
        ("tom", {"steps": "fine"}),
        ("tom", {"steps": "coarse"}),
        ("word_problems", {}),
    ):
        task, seen = make_task(name, **settings), 0
        for index in range(30):
            problem = task.problem("train", index)
            steps = task.steps(problem.completion)
            made = task.corrupted(problem, problem.completion, Draw("undone", index))
            if made is None:
                continue
            seen += 1
            assert made.undone(steps) == "".join(steps[: made.step + 1]) != made.prefix
            assert made.prefix.startswith("".join(steps[: made.step]))
            assert len(task.steps(made.prefix)) == made.step + 1
        assert seen > 10


def test_unknown_splits_tasks_and_options_are_refused(tmp_path):
    for name in GENERATED:
        for ask in (
            make_task(name).size,
            lambda split, name=name: make_task(name).problem(split, 0),
        ):
            with pytest.raises(ValueError, match="split is 'dev', but it must be 'train', "):
                ask("dev")
    with pytest.raises(ValueError, match=r"no task 'summs'; .*sums.*FILE.py:NAME"):
        make_task("summs")
    with pytest.raises(ValueError, match=r"no option 'stepps'; use one of .*steps"):
        make_task("sums", stepps=2)
    with pytest.raises(ValueError, match=r"does not read files; leave config.task.path empty"):
        make_task("sums", "some/file")


def test_rewards_are_configurable():
    rewards = Rewards(strict=2.0, lenient=1.5, wrong=-0.25, none=-3.0)
    task = make_task("word_problems", rewards=rewards)
    problem = task.problem("train", 0)
    texts = {
        "strict": f"#### {problem.answer}",
        "lenient": f"It is {problem.answer}",
        "wrong": "#### 100000",
        "none": "no idea",
    }
    for kind, text in texts.items():
        verdict = task.verify(problem, text)
        assert (verdict.kind, verdict.reward) == (kind, dataclasses.asdict(rewards)[kind])
        assert verdict.correct == (kind in ("strict", "lenient"))


def test_hash_and_draws_are_fixed_for_good():
    # Written down once: a change here silently changes every data set and its split.
    assert stable_hash("held out", "123") == 0xC0B071A0B6F89912  # b2sum -l 64
    draw = Draw("fixed", 0)
    assert [draw.integer(0, 9) for _ in range(8)] == [6, 2, 6, 8, 6, 3, 7, 5]
    for task, expected in (
        (make_task("sums", steps="mixed"), 0x90597D6B63CEC0FD),
        (make_task("word_problems"), 0xF9A6AB77D847595B),
        (
            make_task("tom", steps="mixed", people_max=4, moves_min=4, moves_max=5),
            0x60F9A6AA8DE1EEFE,
        ),
    ):
        prompts = [task.problem("train", index).prompt for index in range(24)]
        assert stable_hash(*prompts) == expected


def test_draws_cover_their_range_and_follow_weights():
    draw = Draw("cover")
    assert {draw.integer(2, 5) for _ in range(200)} == {2, 3, 4, 5}
    assert {draw.sample("abc", 2) for _ in range(200)} == set(itertools.permutations("abc", 2))
    picked = [draw.weighted({"a": 3, "never": 0, "b": 1}) for _ in range(2000)]
    assert set(picked) == {"a", "b"}
    assert 0.70 < picked.count("a") / len(picked) < 0.80
    counts = collections.Counter(split_of(str(i)) for i in range(8000))
    assert counts.keys() == {"train", "val", "test"}
    assert 0.11 < counts["val"] / 8000 < 0.14 and 0.11 < counts["test"] / 8000 < 0.14
