"""Finding and comparing answers in free text. Every function here is total."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from jexit.tasks.base import VerdictKind

# Longer digit strings are no sensible answer, and converting huge ones is quadratic (and refused
# by Python above 4,300 digits).
_MAX_DIGITS = 60

# A sign touches its number ("- 3 apples" is a list item), thousands are groups of three.
_NUMBER = (
    r"(?:[-\u2212]\$?|\$ ?[-\u2212]?)?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?: ?/ ?[0-9]+(?:\.[0-9]+)?)?"
)
_ANY_NUMBER = re.compile(_NUMBER)
_ONLY_NUMBER = re.compile(rf"({_NUMBER})\.?\Z")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_LATEX_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9])")
_MARKER = "####"

THINK_START, THINK_END = "<think>", "</think>"


def parse_number(text: str) -> Fraction | None:
    """The first number in `text`, exactly, or None.

    Reads "1,000", "$18.00", "18.", "-3", "-$3", "1/2", "18 dollars", "\\boxed{18}" and
    "\\frac{1}{2}"; a fraction over zero is no number.
    """
    match = _ANY_NUMBER.search(_plain(text))
    return None if match is None else _to_fraction(match.group())


def last_number(text: str) -> Fraction | None:
    """The last number in `text`, or None."""
    text = _plain(text)
    matches = list(_ANY_NUMBER.finditer(text))
    if not matches:
        return None
    literal, start = matches[-1].group(), matches[-1].start()
    # "10-3" and "(a+b)-3": a minus with an operand right before it is an operator, not a sign.
    if literal[0] in "-\u2212" and re.match(r"[\w)]", text[start - 1 : start]):
        literal = literal[1:]
    return _to_fraction(literal)


def strict_number(text: str) -> Fraction | None:
    """The number of a final line `#### n`, or None when the text does not end in exactly that."""
    line = text.rstrip().rpartition("\n")[2]
    if not line.startswith(_MARKER + " "):
        return None
    match = _ONLY_NUMBER.match(line[len(_MARKER) + 1 :])
    return None if match is None else _to_fraction(match.group(1))


def lenient_number(text: str) -> Fraction | None:
    """The answer wherever it stands.

    The last `\\boxed{}`, else what follows the last `####` (on its line what follows the last `=`),
    else the last number of the text.
    """
    boxes = _BOXED.findall(text)
    if boxes and (number := parse_number(boxes[-1])) is not None:
        return number
    _, marker, tail = text.rpartition(_MARKER)
    result = tail.partition("\n")[0].rpartition("=")[2]
    for part in (result, tail) if marker else ():
        if (number := parse_number(part)) is not None:
            return number
    return last_number(text)


def visible_text(completion: str) -> str | None:
    """What a completion says when it has done thinking: all of it, or what follows `</think>`.

    None while a think block is open: a thought that was cut short is no answer, whatever numbers
    are in it. After several blocks the last one counts.
    """
    after = completion.rpartition(THINK_END)[2]
    return None if THINK_START in after else after


def chain_of_thought(completion: str) -> str:
    """A completion up to its answer, without white space at the end.

    With a think block that is up to `</think>`; otherwise up to the last `####`, or all of it.
    """
    head, closed, _ = completion.rpartition(THINK_END)
    if not closed and THINK_START not in completion:
        head, closed, _ = completion.rpartition(_MARKER)
    return (head if closed else completion).rstrip()


def with_think_start(steps: Sequence[str]) -> list[str]:
    """The steps of a chain of thought, the line that opens a think block with the one after it."""
    if steps and steps[0].strip() == THINK_START:
        return ["".join(steps[:2]), *steps[2:]]
    return list(steps)


def final_number(completion: str) -> Fraction | None:
    """The answer that a completion gives: `strict_number` of its visible text, else the lenient."""
    text = visible_text(completion)
    if text is None:
        return None
    strict = strict_number(text)
    return lenient_number(text) if strict is None else strict


def judge(completion: str, answer: str) -> VerdictKind:
    """How a completion compares with the right answer, numbers as numbers.

    The format decides first: when the text ends in a line `#### n`, n is the answer, whatever else
    the text says. Thoughts do not count, and an unfinished one leaves no answer (`visible_text`).
    """
    found = final_number(completion)
    if found is None:
        return "none"
    if found != parse_number(answer):
        return "wrong"
    return "lenient" if strict_number(visible_text(completion) or "") is None else "strict"


def _plain(text: str) -> str:
    return _LATEX_FRACTION.sub(r"\1/\2", _LATEX_COMMA.sub(",", text))


def _to_fraction(literal: str) -> Fraction | None:
    cleaned = re.sub(r"[ ,$]", "", literal).replace("\u2212", "-")
    if len(cleaned) > _MAX_DIGITS:
        return None
    numerator, slash, denominator = cleaned.partition("/")
    try:
        value = Fraction(numerator)
        return value / Fraction(denominator) if slash else value
    except ZeroDivisionError:
        return None
