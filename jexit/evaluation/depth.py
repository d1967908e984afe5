"""Computes the mean depth per class of token, which shows where completions spend their layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from jexit.results import ClassDepth
from jexit.tasks import Attempt

CLASSES = ("digit", "operator", "word", "other", "marker", "answer", "end")
_OPERATORS = frozenset("+-*/=<>^%×÷−")
# Returns the start and end of the marker before a completion's answer, or None without a marker.
Mark = Callable[[str], tuple[int, int] | None]


def token_class(token: str) -> str:
    text = token.strip()
    if text and all(character in _OPERATORS for character in text):
        return "operator"
    if any(character.isdigit() for character in text):
        return "digit"
    return "word" if any(character.isalpha() for character in text) else "other"


def token_classes(
    ids: Sequence[int], tokens: Sequence[str], mark: Mark, end_ids: Collection[int]
) -> list[str]:
    """Returns the class of each token of a completion, where `tokens[i]` is the text of `ids[i]`.

    A token whose id is in `end_ids` has the class `end`. `mark(text)` finds the marker before the
    answer. The tokens of the marker have the class `marker`, and the tokens after it `answer`. A
    token that contains both the end of the marker and part of the answer has the class `answer`.
    All other tokens have the class that `token_class` returns.
    """
    text = "".join(tokens)
    start, stop = mark(text) or (-1, -1)
    classes, end = [], 0
    for number, token in zip(ids, tokens, strict=True):
        end += len(token)
        if number in end_ids:
            classes.append("end")
        elif start < 0 or end <= start:
            classes.append(token_class(token))
        else:
            begins_before = end - len(token) < stop
            beyond = text[stop:end].strip()
            classes.append("marker" if begins_before and not beyond else "answer")
    return classes


def depth_by_class(
    attempts: Sequence[Attempt],
    tokens: Callable[[Sequence[int]], Sequence[str]],
    mark: Mark,
    end_ids: Collection[int],
) -> dict[str, ClassDepth]:
    """Returns the number of tokens and the mean number of layers run for each class of token.

    `tokens(ids)` returns the text of each token id; see `token_classes` for `mark` and `end_ids`.
    The first token of each completion is left out, because the prefill produces it, with all
    layers. A class without tokens is left out too.
    """
    depths: dict[str, list[int]] = {name: [] for name in CLASSES}
    for made in attempts:
        classes = token_classes(made.ids, tokens(made.ids), mark, end_ids)
        for name, depth in list(zip(classes, made.depths, strict=True))[1:]:
            depths[name].append(depth)
    return {
        name: ClassDepth(tokens=len(some), depth_mean=sum(some) / len(some))
        for name, some in depths.items()
        if some
    }
