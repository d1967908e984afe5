"""What pretraining's rows hold."""

import pytest

from jexit.config import Config
from jexit.loops.pretrain import texts


def parts(**settings):
    """(shares of the rows by task, rows, length) of each part."""
    pretrain = {key: value for key, value in settings.items() if key in ("tom", "word_problems")}
    others = {key: value for key, value in settings.items() if key not in pretrain}
    values = {"command": "pretrain", "batch_size": 120, "pretrain": pretrain} | others
    found = []
    for part in texts(Config.from_dict(values)):
        whole = sum(weight for _, weight in part.mixture)
        shares = {task.name: part.rows * weight / whole / 120 for task, weight in part.mixture}
        found.append((shares, part.rows, part.length))
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [({"sums": 0.8, "word_problems": 0.2}, 120, 56)]),
        ({"tom": 0.3}, [({"sums": 0.5, "word_problems": 0.2}, 84, 56), ({"tom": 0.3}, 36, 144)]),
        ({"word_problems": 0.0}, [({"sums": 1.0}, 120, 56)]),
        (
            {"tom": 0.75, "word_problems": 0.25},
            [({"word_problems": 0.25}, 30, 56), ({"tom": 0.75}, 90, 144)],
        ),
        ({"tom": 1.0, "word_problems": 0.0}, [({"tom": 1.0}, 120, 144)]),
        (  # multiples of 8 rows
            {"tom": 0.3, "optim": {"accumulate": 4}, "mesh": {"data": 2}},
            [({"sums": 0.7 * 5 / 7 * 88 / 84, "word_problems": 0.2 * 88 / 84}, 88, 56),
             ({"tom": 32 / 120}, 32, 144)],
        ),
    ],
)  # fmt: skip
def test_shares_of_the_text(settings, expected):
    found = parts(**settings)
    assert len(found) == len(expected)
    for (shares, rows, length), wanted in zip(found, expected, strict=True):
        assert (rows, length) == wanted[1:]
        assert shares == pytest.approx(wanted[0])


def test_a_share_of_less_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"a share of 0\.003 of config\.batch_size 120 is less"):
        parts(tom=0.003)
    with pytest.raises(ValueError, match=r"a share of 0\.01 .* raise config\.batch_size"):
        parts(tom=0.99, word_problems=0.0, optim={"accumulate": 8})


def test_stories_have_prompts_of_every_granularity():
    config = Config.from_dict({"command": "pretrain", "pretrain": {"tom": 0.5}})
    ((task, _),) = texts(config)[1].mixture
    modes = {task.problem("train", index).fields["mode"] for index in range(60)}
    assert modes == {"free", "fine", "coarse", "at_once"}
