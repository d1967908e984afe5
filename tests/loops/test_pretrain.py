import pytest

from jexit.loops.pretrain import text_mixture
from jexit.sections import PretrainConfig


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, {"sums": 0.8, "word_problems": 0.2}),
        ({"tom": 0.3}, {"sums": 0.5, "word_problems": 0.2, "tom": 0.3}),
        ({"tom": 0.0, "word_problems": 0.0}, {"sums": 1.0}),
        ({"tom": 0.75, "word_problems": 0.25}, {"word_problems": 0.25, "tom": 0.75}),
    ],
)
def test_shares_of_the_text(shares, expected):
    mixture = text_mixture(PretrainConfig(**shares))
    assert {task.name: share for task, share in mixture} == pytest.approx(expected)


def test_the_text_has_prompts_of_every_granularity():
    (task,) = [task for task, _ in text_mixture(PretrainConfig(tom=0.5)) if task.name == "tom"]
    modes = {task.problem("train", index).fields["mode"] for index in range(60)}
    assert modes == {"free", "fine", "coarse", "at_once"}
