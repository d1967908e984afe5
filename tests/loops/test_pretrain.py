"""What pretraining's text is made of."""

import pytest

from jexit.config import Config
from jexit.loops.pretrain import mixture


def shares(**settings):
    found = mixture(Config.from_dict({"command": "pretrain", "pretrain": settings}))
    return {task.name: share for task, share in found}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"sums": 0.8, "word_problems": 0.2}),
        ({"tom": 0.3}, {"sums": 0.5, "word_problems": 0.2, "tom": 0.3}),
        ({"word_problems": 0.0}, {"sums": 1.0}),
        ({"tom": 0.75, "word_problems": 0.25}, {"word_problems": 0.25, "tom": 0.75}),
        ({"tom": 1.0, "word_problems": 0.0}, {"tom": 1.0}),
        ({"tom": 0.9, "word_problems": 0.1}, {"tom": 0.9, "word_problems": 0.1}),
    ],
)
def test_shares_of_the_text(settings, expected):
    assert shares(**settings) == pytest.approx(expected)


def test_stories_have_prompts_of_every_granularity():
    config = Config.from_dict({"command": "pretrain", "pretrain": {"tom": 0.5}})
    *_, (task, _) = mixture(config)
    modes = {task.problem("train", index).fields["mode"] for index in range(60)}
    assert modes == {"free", "fine", "coarse", "at_once"}
