"""Depth by class of token, and the two controls, on completions whose figures are known."""

import dataclasses

import numpy as np
import pytest

from jexit.eval.depth import (
    Completion,
    compared,
    depth_by_class,
    matched_depths,
    shuffled_depths,
    token_classes,
)
from jexit.tasks import Sums, WordProblems


def completion(depths, right=True):
    verdict = "strict" if right else "wrong"
    return Completion(
        ids=list(range(len(depths))), text="", depths=depths, verdict=verdict, truncated=False
    )


END = 9


MARK = Sums().answer_mark


def classes(tokens, mark=MARK):
    ids = [END if token == "<end>" else 0 for token in tokens]
    return token_classes(ids, tokens, mark, {END})


def test_classes_of_tokens():
    tokens = ["3", "+", " 4", "=", "7", "\n", "So", " it", " is", "####", " 7", ".", "<end>"]
    assert classes(tokens) == [
        "digit", "operator", "digit", "operator", "digit", "other", "word", "word", "word",
        "marker", "answer", "answer", "end",
    ]  # fmt: skip
    assert classes(["a", "####", "b", "####", "c"]) == ["word", "other", "word", "marker", "answer"]


def test_a_marker_may_be_pieces_and_may_share_a_token_with_the_answer():
    assert classes(["##", "##", " ", "7"]) == ["marker", "marker", "answer", "answer"]
    assert classes(["##", "## 7", "<end>"]) == ["marker", "answer", "end"]
    assert classes(["2", "\n####", "7"]) == ["digit", "marker", "answer"]
    assert classes(["2", "#### ", "7"]) == ["digit", "marker", "answer"]
    assert classes(["2####7"]) == ["answer"]


def test_prose_marks_its_answer_with_a_box_or_a_line_of_its_own():
    mark = WordProblems().answer_mark
    tokens = ["####", " Step", " 2", "\n", "9", "*", "2", "\n", "\\boxed{", "18", "}", "<end>"]
    assert classes(tokens, mark) == [
        "other", "word", "digit", "other", "digit", "operator", "digit", "other",
        "marker", "answer", "answer", "end",
    ]  # fmt: skip
    tokens = ["<think>", "####", " 7", "</think>", "####", " 8", "####", " Note"]
    assert classes(tokens, mark)[-5:] == ["word", "marker", "answer", "answer", "answer"]
    assert classes(["<think>", "####", " 7"], mark)[1:] == ["other", "digit"]


def test_the_end_is_known_by_its_id():
    assert classes(["7", "<end>"]) == ["digit", "end"]
    assert classes(["the", "end"]) == ["word", "word"]
    # The same text from another id is a word, and an end without a marker is an end.
    assert token_classes([0], ["<end>"], MARK, {END}) == ["word"]
    assert classes(["+", "<end>"]) == ["operator", "end"]


def test_depth_by_class_leaves_out_the_prompts_last_pass():
    texts = {1: "4", 2: "+", 3: "####", END: "<end>"}
    made = [
        dataclasses.replace(completion(depths), ids=ids)
        for ids, depths in (
            ([1, 2, 1, 3, 1, END], [8, 2, 3, 1, 2, 6]),
            ([1, 3, 1, END], [8, 2, 4, 7]),
        )
    ]
    assert depth_by_class(made, lambda ids: [texts[i] for i in ids], MARK, {END}) == {
        "digit": {"tokens": 1, "depth_mean": 3.0},
        "operator": {"tokens": 1, "depth_mean": 2.0},
        "marker": {"tokens": 2, "depth_mean": 1.5},
        "answer": {"tokens": 2, "depth_mean": 3.0},
        "end": {"tokens": 2, "depth_mean": 6.5},
    }


def matched(completions, exits=(1, 2, 4), seed=0):
    """One depth a completion, of a model of 8 layers."""
    depth_BT = matched_depths(completions, 8, exits, columns=5, seed=seed)
    assert (depth_BT == depth_BT[:, :1]).all() and depth_BT.dtype == np.int32
    return depth_BT[:, 0]


def test_matched_depths_are_the_exits_around_the_mean():
    made = [completion([8, 3, 4]), completion([8, 3])] * 30  # mean 10 / 3, between 2 and 4
    depths = matched(made)
    assert set(depths) == {2, 4}
    assert (depths == 4).sum() == 40  # two in three, exactly, as that is a whole number
    assert set(matched([completion([8, 6])] * 10)) == {4, 8}
    assert set(matched([completion([8, 4])] * 10)) == {4}
    assert set(matched([completion([8])] * 10)) == {8}  # nothing could leave
    assert set(matched([completion([8, 2])] * 10, exits=(4,))) == {4}  # none is shallower
    assert set(matched([completion([8, 2])] * 10, exits=())) == {8}


def test_matched_depths_have_the_policys_mean_whatever_the_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 60)
    made = [completion([8, *rng.choice([1, 2, 4, 8], n).tolist()]) for n in lengths]
    mean = np.mean([d for c in made for d in c.depths[1:]])
    assert 2 < mean < 4
    reached = [np.average(matched(made, seed=seed), weights=lengths) for seed in range(400)]
    assert abs(np.mean(reached) - mean) < 4 * np.std(reached) / np.sqrt(400)
    assert np.std(reached) < 0.15  # of one draw
    assert len({tuple(matched(made, seed=seed)) for seed in range(5)}) == 5
    np.testing.assert_array_equal(matched(made, seed=3), matched(made, seed=3))


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
