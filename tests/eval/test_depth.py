"""Depth by class of token, and the two controls, on completions whose figures are known."""

import numpy as np
import pytest

from jexit.eval.depth import (
    Completion,
    compared,
    depth_by_class,
    matched_layers,
    shuffled_depths,
    token_classes,
)


def completion(depths, right=True):
    verdict = "strict" if right else "wrong"
    return Completion(
        ids=list(range(len(depths))), text="", depths=depths, verdict=verdict, truncated=False
    )


def test_classes_of_tokens():
    tokens = ["3", "+", " 4", "=", "7", "\n", "So", " it", " is", "####", " 7", "."]
    assert token_classes(tokens, "####") == [
        "digit", "operator", "digit", "operator", "digit", "other", "word", "word", "word",
        "answer", "answer", "answer",
    ]  # fmt: skip
    assert token_classes(["##", "## 7"], "####") == ["answer", "answer"]
    assert token_classes(["a", "####", "b", "####", "c"], "####")[1:3] == ["other", "word"]
    assert token_classes(["7"], None) == ["digit"]


def test_depth_by_class_leaves_out_the_prompts_last_pass():
    rows = [(["4", "+", "4", "####", "8"], [8, 2, 3, 1, 1]), (["1", "####", "1"], [8, 2, 4])]
    assert depth_by_class(rows, "####") == {
        "digit": {"tokens": 1, "depth_mean": 3.0},
        "operator": {"tokens": 1, "depth_mean": 2.0},
        "answer": {"tokens": 4, "depth_mean": 2.0},
    }


def test_the_matched_layer_is_never_shallower():
    assert matched_layers([completion([8, 3, 4]), completion([8, 3])], 8) == 4  # mean 10 / 3
    assert matched_layers([completion([8, 3, 3])], 8) == 3
    assert matched_layers([completion([8])], 8) == 8  # nothing could leave


def test_shuffling_deals_out_the_same_depths():
    rng = np.random.default_rng(0)
    made = [completion([8, *rng.choice([1, 2, 4, 8], n).tolist()]) for n in (5, 9, 2, 30)]
    deal_BT = shuffled_depths(made, 8, columns=40, seed=3)
    dealt = [deal_BT[row, 1 : len(c.depths)] for row, c in enumerate(made)]
    before = sorted(d for c in made for d in c.depths[1:])
    assert sorted(np.concatenate(dealt).tolist()) == before
    assert np.concatenate(dealt).tolist() != [d for c in made for d in c.depths[1:]]
    assert set(np.unique(deal_BT)) <= {1, 2, 4, 8}  # passes beyond draw from the same
    np.testing.assert_array_equal(deal_BT, shuffled_depths(made, 8, columns=40, seed=3))


def test_a_comparison_is_paired():
    ours = [completion([8, 2, 2], right=i % 10 != 0) for i in range(100)]
    theirs = [completion([8, 2, 2], right=i % 2 == 1) for i in range(100)]
    made = compared("sample", "shuffled", ours, theirs, 8)
    assert made["accuracy_difference"] == pytest.approx(0.9 - 0.5)
    low, high = made["accuracy_difference_ci95"]
    assert 0.25 < low < 0.35 < 0.45 < high < 0.55
    assert made["depth_fraction_difference"] == 0.0
    assert made["depth_fraction_difference_ci95"] == (0.0, 0.0)
    assert made["problems"] == 100
