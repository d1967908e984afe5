import dataclasses

import pytest

from jexit.config import BLENDABLE, STEPS, TaskConfig
from jexit.loops.setup import load_task
from jexit.tasks import Rewards, make_task
from jexit.tasks.blend import Blend


def parts(**options):
    return [make_task(name, **options) for name in BLENDABLE]


def test_problems_come_from_the_tasks_in_turn():
    blend, tasks = Blend(tasks=parts()), parts()
    for index in range(30):
        problem, task = blend.problem("test", index), tasks[index % 3]
        own = task.problem("test", index // 3)
        assert problem == dataclasses.replace(own, fields={**own.fields, "task": task.name})


def test_each_completion_is_judged_by_its_own_task():
    blend = Blend(tasks=parts(rewards=Rewards(strict=3.0, wrong=-2.0)))
    for index in range(60):
        problem, other = blend.problem("train", index), blend.problem("train", index + 1)
        assert blend.verify(problem, problem.completion).reward == 3.0
        if other.answer != problem.answer:
            assert not blend.verify(problem, other.completion).correct


def test_totals_are_the_tasks_own_and_their_accuracy():
    blend = Blend(tasks=parts())
    problems = [blend.problem("train", index) for index in range(30)]
    texts = [p.completion if i < 15 else "hm" for i, p in enumerate(problems)]
    totals = blend.text_totals(problems, texts)
    for name, task in blend.tasks.items():
        own = [(p, t) for p, t in zip(problems, texts, strict=True) if p.fields["task"] == name]
        assert totals[f"{name}/accuracy"] == (5, 10)
        for key, value in task.text_totals(*map(list, zip(*own, strict=True))).items():
            assert totals[f"{name}/{key}"] == value
    assert {"sums/step_size", "tom/chain_lines"} < totals.keys()


def test_a_blend_is_as_long_as_its_shortest_part_lasts(tmp_path):
    assert Blend(tasks=parts()).size("train") is None
    (tmp_path / "stories.csv").write_text(
        "story,question,answer\n"
        + "".join(f"Tom is in room {i}.,Where is Tom?,room\n" for i in range(40))
    )
    stories = make_task("exploretom", str(tmp_path / "stories.csv"))
    blend, size = Blend(tasks=[make_task("sums"), stories]), stories.size("train")
    assert blend.size("train") == 2 * size
    assert blend.problem("train", 2 * size - 1).prompt == stories.problem("train", size - 1).prompt


def test_it_takes_two_tasks_or_more_each_once():
    for names in [[], ["sums"], ["sums", "tom", "sums"]]:
        with pytest.raises(ValueError, match=r"two or more, each once, got .*config\.task\.parts"):
            Blend(tasks=[make_task(name) for name in names])


def test_every_part_gets_the_settings_that_it_knows():
    for steps in STEPS["blend"]:
        config = TaskConfig(
            name="blend", steps=steps, operands_max=4, people_max=3, reward_none=-3.0
        )
        blend = load_task(config, "train")
        assert list(blend.tasks) == list(BLENDABLE)
        assert blend.tasks["sums"].mode == blend.tasks["tom"].mode == steps
        for index in range(60):
            problem = blend.problem("train", index)
            assert len(problem.fields.get("operands", ())) <= 4
            assert blend.verify(problem, "").reward == -3.0
