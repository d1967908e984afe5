import pytest

from jexit.loops.setup import load_task
from jexit.sections import TaskConfig
from jexit.tasks import ExploreToM, Gsm8k, Sums, Tom

STORY = "Ann entered the den. Ann moved the key to the tray, which is also located in the den."


def test_a_generated_task_has_the_configs_settings():
    config = TaskConfig(
        name="tom", steps="coarse", people_min=3, people_max=4, moves_min=4, moves_max=5,
        kinds=("memory", "belief"), reward_lenient=0.25,
    )  # fmt: skip
    task = load_task(config, "train")
    assert isinstance(task, Tom)
    assert (task.mode, task.people, task.moves) == ("coarse", (3, 4), (4, 5))
    assert (task.kinds, task.rewards.lenient) == (("memory", "belief"), 0.25)
    assert len(load_task(TaskConfig(name="tom"), "train").kinds) == 6
    sums = load_task(TaskConfig(steps="3", operands_min=4), "train")
    assert isinstance(sums, Sums) and (sums.steps, sums.operands) == (3, (4, 8))


@pytest.mark.parametrize("name", ["tom", "exploretom"])
def test_stories_come_from_files_where_a_path_is_given(tmp_path, name):
    file = tmp_path / "test.csv"
    file.write_text(f'story,question,answer\n"{STORY}",In which container is the key now?,tray\n')
    task = load_task(TaskConfig(name=name, path=str(file)), "test")
    assert isinstance(task, ExploreToM)
    assert task.problem("test", 0).answer == "tray"
    with pytest.raises(ValueError, match="no problem in its train split"):
        load_task(TaskConfig(name=name, path=str(file)), "train")


def test_a_task_of_files_takes_no_generators_settings(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert isinstance(load_task(TaskConfig(name="gsm8k", path=str(tmp_path)), "train"), Gsm8k)
