import dataclasses

import pytest

import jexit
from jexit.config import TaskConfig
from jexit.loops.setup import load_task
from jexit.tasks import Attempt, Rewards, make_task
from jexit.tasks.blend import PARTS, Blend


def parts(**options):
    return [make_task(name, **options) for name in PARTS]


def test_problems_come_from_the_tasks_in_turn_which_judge_and_count_them():
    rewards = Rewards(strict=3.0, wrong=-2.0)
    blend, tasks = Blend(parts(rewards=rewards)), parts()
    problems = [blend.problem("train", index) for index in range(30)]
    for index, problem in enumerate(problems):
        task, other = tasks[index % 3], problems[index - 1]
        own = task.problem("train", index // 3)
        assert (problem.own, problem.part) == (own, task.name)
        assert vars(own).items() <= vars(problem).items()
        assert blend.verify(problem, problem.completion).reward == 3.0
        if other.answer != problem.answer:
            assert not blend.verify(problem, other.completion).correct
    attempts = [Attempt(text=p.completion if i < 15 else "hm") for i, p in enumerate(problems)]
    verdicts = blend.judge(problems, attempts)
    attempts = [dataclasses.replace(a, verdict=v) for a, v in zip(attempts, verdicts, strict=True)]
    totals = blend.text_totals(problems, attempts)
    for number, (name, task) in enumerate(blend.tasks.items()):
        assert totals[f"{name}/accuracy"] == (5, 10)
        for key, value in task.text_totals(problems[number::3], attempts[number::3]).items():
            assert totals[f"{name}/{key}"] == value
    assert {"sums/step_size", "tom/chain_lines"} < totals.keys()


def rows_of(name):
    """A task whose rows have a column `task`, as in TRL's documentation, which its reward sees."""

    def right(completions, task, **columns):
        return [float(text == name == own) for text, own in zip(completions, task, strict=True)]

    rows = [{"prompt": f"{name} {n}", "task": name} for n in range(40)]
    made = jexit.rows_task(train=rows, rewards=right)
    made.name = name
    return made


def test_columns_and_rewards_stay_those_of_the_parts():
    """Also in a blend of a blend."""
    inner = Blend([rows_of("math"), rows_of("code")])
    blend = Blend([inner, rows_of("logic")])
    problems = [blend.problem("train", index) for index in range(4)]
    assert [problem.fields["task"] for problem in problems] == ["math", "logic", "code", "logic"]
    texts = ["math", "wrong", "code", "logic"]
    verdicts = blend.judge(problems, [Attempt(text=text) for text in texts])
    assert [verdict.correct for verdict in verdicts] == [True, False, True, True]
    assert [dict(verdict.parts) for verdict in verdicts] == [
        {"blend/math/right": 1.0}, {"logic/right": 0.0}, {"blend/code/right": 1.0},
        {"logic/right": 1.0},
    ]  # fmt: skip
    assert blend.verify(problems[2], "code").correct


def test_a_blend_is_as_long_as_its_shortest_part_lasts(tmp_path):
    assert Blend(parts()).size("train") is None
    (tmp_path / "stories.csv").write_text(
        "story,question,answer\n"
        + "".join(f"Tom is in room {i}.,Where is Tom?,room\n" for i in range(40))
    )
    stories = make_task("exploretom", str(tmp_path / "stories.csv"))
    blend, size = Blend([make_task("sums"), stories]), stories.size("train")
    assert blend.size("train") == 2 * size
    assert blend.problem("train", 2 * size - 1).prompt == stories.problem("train", size - 1).prompt


def test_it_takes_two_tasks_or_more_each_once():
    for names, said in (
        ([], "is empty, but a blend needs at least two tasks; add"),
        (["sums"], "is sums, but a blend needs at least two tasks; add"),
        (["sums", "tom", "sums"], "names sums 2 times, but .* must differ; name it once"),
    ):
        with pytest.raises(ValueError, match=rf"config\.task\.options\.parts {said}"):
            Blend([make_task(name) for name in names])


def test_every_part_gets_the_settings_that_it_knows():
    for steps in ("free", "at_once", "mixed"):
        options = {"steps": steps, "operands_max": 4, "people_max": 4}
        config = TaskConfig(name="blend", options=options, reward_none=-3.0)
        blend = load_task(config, "train")
        assert list(blend.tasks) == list(PARTS)
        assert blend.tasks["sums"].mode == blend.tasks["tom"].mode == steps
        for index in range(30):
            problem = blend.problem("train", index)
            assert len(problem.fields.get("operands", ())) <= 4
            assert blend.verify(problem, "").reward == -3.0
    with pytest.raises(ValueError, match=r"'seeed', but none of the tasks sums, tom has"):
        make_task("blend", parts=("sums", "tom"), seeed=3)
