import pytest

from jexit.tasks import make_task
from jexit.tasks.base import split_of
from jexit.tasks.streams import NoMoreProblems, ProblemStream
from jexit.tasks.tom.task import canonical


def test_training_draws_are_independent_and_random_access():
    stream = ProblemStream("digits", 0, lambda draw: draw.integer(0, 9), str)
    drawn = [stream.at("train", index) for index in range(400)]
    assert stream.at("train", 10**12) in drawn
    assert all(split_of(str(digit)) == "train" for digit in drawn)
    assert len(set(drawn)) == sum(split_of(str(digit)) == "train" for digit in range(10))


def test_held_out_draws_are_all_there_is_once():
    for split in ("val", "test"):
        there = [n for n in range(100) if split_of(str(n)) == split]
        stream = ProblemStream("numbers", 0, lambda draw: draw.integer(0, 99), str)
        last = len(there) - 1
        assert stream.at(split, last) == stream.at(split, last)
        assert sorted(stream.at(split, index) for index in range(len(there))) == there
        said = rf"{split} split of 'numbers' has only about {len(there)} "
        with pytest.raises(NoMoreProblems, match=said):
            stream.at(split, len(there))


def test_the_first_problems_of_a_held_out_split_are_distinct():
    quick = {"people_min": 2, "people_max": 2, "kinds": ("memory", "reality"), "steps": "at_once"}
    for name, options in (("sums", {"steps": "at_once"}), ("word_problems", {}), ("tom", quick)):
        task = make_task(name, **options)
        for split in ("val", "test"):
            prompts = [task.problem(split, index).prompt for index in range(48)]
            assert len(set(map(canonical, prompts))) == 48


def test_the_same_problems_whatever_their_steps():
    for index in range(20):
        asked = {
            make_task("sums", steps=steps).problem("test", index).fields["operands"]
            for steps in ("free", "at_once", "3", "mixed")
        }
        assert len(asked) == 1
