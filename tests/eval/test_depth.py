"""Depth by class of token, and the two controls, on completions whose figures are known."""

import dataclasses

import numpy as np
import pytest

from jexit.eval.depth import (
    Completion,
    compared,
    depth_by_class,
    mean_depth,
    mixed,
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


def stopped(exit, lengths):
    """Completions of these lengths that all leave at an exit of a model of 8 layers."""
    return [completion([8, *[exit] * (n - 1)]) for n in lengths]


def deeper(made, deep):
    return sum(here is there for here, there in zip(made, deep, strict=True))


def test_a_mixture_of_two_exits_has_the_mean_asked_for():
    shallow, deep = stopped(2, [4] * 60), stopped(4, [4] * 60)
    assert (mean_depth(shallow), mean_depth(deep)) == (3.5, 5.0)
    made = mixed(shallow, deep, 4.5, seed=0)
    assert deeper(made, deep) == 40 and mean_depth(made) == 4.5
    assert all(m is s or m is d for m, s, d in zip(made, shallow, deep, strict=True))
    for mean, count in ((3.5, 0), (1.0, 0), (5.0, 60), (7.0, 60)):
        assert deeper(mixed(shallow, deep, mean, seed=0), deep) == count


def test_a_mixture_has_its_mean_whatever_the_lengths():
    """Completions of a shallow exit ramble on, so that the first pass, which runs all layers,
    counts less in them; and lengths differ between problems."""
    rng = np.random.default_rng(0)
    shallow, deep = (stopped(exit, rng.integers(2, n, 200)) for exit, n in ((1, 50), (2, 12)))
    low, high = mean_depth(shallow), mean_depth(deep)
    chosen = set()
    for seed in range(20):
        made = mixed(shallow, deep, (low + high) / 2, seed=seed)
        # Half of what a completion of 50 tokens moves, of the 2,200 that half and half have.
        assert abs(mean_depth(made) - (low + high) / 2) < 0.5 * 53 / 2200
        assert made == mixed(shallow, deep, (low + high) / 2, seed=seed)
        chosen.add(tuple(here is there for here, there in zip(made, deep, strict=True)))
    assert len(chosen) == 20
    # Which problems are drawn for the deeper exit does not depend on how many are.
    few, many = (mixed(shallow, deep, low + share * (high - low), seed=0) for share in (0.3, 0.7))
    assert all(m is d for m, f, d in zip(many, few, deep, strict=True) if f is d)


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
