"""Finding and comparing answers in free text. Every function here is total."""

from __future__ import annotations

import re
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
_MARKER = "####"


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

    The last `\\boxed{}`, else what follows the last `####`, else the last number of the text.
    """
    boxes = _BOXED.findall(text)
    if boxes and (number := parse_number(boxes[-1])) is not None:
        return number
    _, marker, tail = text.rpartition(_MARKER)
    if marker and (number := parse_number(tail)) is not None:
        return number
    return last_number(text)


def judge(completion: str, answer: str) -> VerdictKind:
    """How a completion compares with the right answer, numbers as numbers.

    The format decides first: when the text ends in a line `#### n`, n is the answer, whatever else
    the text says.
    """
    expected = parse_number(answer)
    strict = strict_number(completion)
    if strict is not None:
        return "strict" if strict == expected else "wrong"
    found = lenient_number(completion)
    if found is None:
        return "none"
    return "lenient" if found == expected else "wrong"


def _plain(text: str) -> str:
    return _LATEX_FRACTION.sub(r"\1/\2", text)


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
