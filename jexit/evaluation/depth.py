"""Where completions spend their layers: depth by class of token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from jexit.results import ClassDepth
from jexit.tasks import Attempt

CLASSES = ("digit", "operator", "word", "other", "marker", "answer", "end")
_OPERATORS = frozenset("+-*/=<>^%×÷−")
# Where a completion's answer is marked: the marker's start and end, None without one.
Mark = Callable[[str], tuple[int, int] | None]


def token_class(token: str) -> str:
    """The class of a token of the chain of thought, by what its text holds."""
    text = token.strip()
    if text and all(character in _OPERATORS for character in text):
        return "operator"
    if any(character.isdigit() for character in text):
        return "digit"
    return "word" if any(character.isalpha() for character in text) else "other"


def token_classes(
    ids: Sequence[int], tokens: Sequence[str], mark: Mark, end_ids: Collection[int]
) -> list[str]:
    """The class of each token of a completion, from its ids and their texts.

    `end` by the id; `marker` for what `mark` finds, `answer` for what follows it, a token that
    holds both included; before it, or without one, by `token_class`.
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
    """Tokens and mean layers run of each class; `tokens` gives the ids' own texts.

    A completion's first token is left out: its pass is the prompt's last and never leaves.
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
