"""Depth by class of token, on completions whose depths are known."""

from jexit.evaluation.decoder import Attempt
from jexit.evaluation.depth import depth_by_class, token_classes
from jexit.results import ClassDepth
from jexit.tasks.sums import Sums
from jexit.tasks.word_problems import WordProblems

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
    # A marker may be pieces and may share a token with the answer.
    assert classes(["##", "##", " ", "7"]) == ["marker", "marker", "answer", "answer"]
    assert classes(["2", "\n####", "7"]) == ["digit", "marker", "answer"]
    assert classes(["##", "## 7", "<end>"]) == ["marker", "answer", "end"]
    assert classes(["2####7"]) == ["answer"]
    # The end is known by its id: the same text from another one is a word.
    assert classes(["+", "<end>", "end"]) == ["operator", "end", "word"]
    assert token_classes([0], ["<end>"], MARK, {END}) == ["word"]


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


def test_depth_by_class_leaves_out_the_prompts_last_pass():
    texts = {1: "4", 2: "+", 3: "####", END: "<end>"}
    made = [
        Attempt(ids=ids, text="", depths=depths, truncated=False)
        for ids, depths in (
            ([1, 2, 1, 3, 1, END], [8, 2, 3, 1, 2, 6]),
            ([1, 3, 1, END], [8, 2, 4, 7]),
        )
    ]
    assert depth_by_class(made, lambda ids: [texts[i] for i in ids], MARK, {END}) == {
        "digit": ClassDepth(tokens=1, depth_mean=3.0),
        "operator": ClassDepth(tokens=1, depth_mean=2.0),
        "marker": ClassDepth(tokens=2, depth_mean=1.5),
        "answer": ClassDepth(tokens=2, depth_mean=3.0),
        "end": ClassDepth(tokens=2, depth_mean=6.5),
    }
