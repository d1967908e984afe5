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
_LATEX_FRACTION = re.compile(
    r"(?:([0-9]{1,18}) ?)?\\[dt]?frac\s*\{\s*([0-9]{1,18})\s*\}\s*\{\s*([0-9]{1,18})\s*\}"
)
_SHORT_FRACTION = re.compile(r"(?:([0-9]{1,18}) ?)?\\[dt]?frac ?([0-9]) ?([0-9])")
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\,)(?=[0-9])")
_MIXED = re.compile(r"(?<![0-9.,/])([0-9]{1,9}) ([0-9]{1,9})/([0-9]{1,9})(?![0-9/])")
_MARKER = "####"
_SPAN = 200  # characters after a marker or an announcement that may hold its number
# What follows a `####` that is Markdown's: "#### Step 2" always, "#### 2. Find the price" and
# "#### Cost of 3 apples" where the text goes on with numbers.
_STEP = re.compile(r"[^\w\n#]*(?:step|part|case|phase|stage|day|option|method)\b", re.IGNORECASE)
_TITLE = re.compile(r"[^\w\n#]*(?:[0-9]+[.)] +[^\W\d]|[^\W\d][^\n0-9:=]*[0-9])")
_LEAD = re.compile(
    r"(?:[\s*_$:=]|\\?[(\[])*(?:(?:the +)?(?:final +)?answer(?: +is)?(?:[\s*_$:=]|\\?[(\[])*)?",
    re.IGNORECASE,
)
# "The answer is 18.", "**Answer:** 18" and "answer = 9 * 2 = 18", and where its clause ends.
_ANNOUNCED = re.compile(r"\banswer(?: is)?(?:[\s:*$=]|\\?[(\[]){1,8}", re.IGNORECASE)
_CLAUSE_END = re.compile(
    r"[;\n(]|[,.](?![0-9])|\b(?:as|because|since|so|where|which)\b", re.IGNORECASE
)
_OPERATION = re.compile(
    r"[0-9%)]\s?(?:[-+/\u00d7\u00f7\u2212]|\*(?!\*)|\*\*\s?[0-9]|x\s?[0-9]|\\times|\\cdot|\\div)"
)

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

    The last `\\boxed{}`, else the last line `#### ...` that is no heading, else the number that the
    text announces last ("The answer is 18."), else its last number. In a box, on a line and in an
    announcement it is the side of the last `=` that is one number.
    """
    boxes = _BOXED.findall(text)
    if boxes and (number := _result(boxes[-1])) is not None:
        return number
    marker = marker_place(text)
    if marker >= 0:
        return _result(_marked(text, marker) or "")
    for announced in reversed(list(_ANNOUNCED.finditer(text))):
        number = _announced(text[announced.end() : announced.end() + _SPAN])
        if number is not None:
            return number
    return last_number(text)


def marker_place(text: str) -> int:
    """Where the last `####` is that a number follows, and that is no heading; −1: none."""
    place = text.rfind(_MARKER)
    while place >= 0 and _marked(text, place) is None:
        place = text.rfind(_MARKER, 0, place)
    return place


def answer_mark(completion: str) -> tuple[int, int] | None:
    """Start and end of what marks the answer: the last `\\boxed{`, else the `####` of its line.

    None where nothing does, or while a think block is open.
    """
    text = visible_text(completion)
    if text is None:
        return None
    hidden = len(completion) - len(text)
    if boxes := list(_BOXED.finditer(text)):
        return hidden + boxes[-1].start(), hidden + boxes[-1].start(1)
    place = marker_place(text)
    return None if place < 0 else (hidden + place, hidden + place + len(_MARKER))


def _marked(text: str, place: int) -> str | None:
    """What the line of the `####` at `place` gives as the answer; None for a heading.

    Where the line says nothing but "Answer:" that is the next line, if it starts with a number.
    """
    start = place + len(_MARKER)
    if _STEP.match(text, start):
        return None
    lead = _LEAD.match(text, start, start + _SPAN)
    if _TITLE.match(text, lead.end(), lead.end() + _SPAN):
        after = text[lead.end() : lead.end() + 2 * _SPAN].partition("\n")[2]
        if _ANY_NUMBER.search(after):
            return None
    line = _plain(text[lead.end() : lead.end() + _SPAN].partition("\n")[0])
    number = (_ANY_NUMBER.match if "\n" in lead.group() else _ANY_NUMBER.search)(line)
    return None if number is None or line.rstrip(" *_").endswith(":") else line


def _announced(text: str) -> Fraction | None:
    """The number of the clause that follows "the answer is", if it starts with one."""
    end = _CLAUSE_END.search(_plain(text))
    clause = _plain(text)[: end.start() if end else None]
    if not _ANY_NUMBER.match(clause) or ("=" not in clause and _OPERATION.search(clause)):
        return None
    return _result(clause)


def _result(line: str) -> Fraction | None:
    """What a line comes to, remarks in parentheses aside.

    Of equal sides the last one that is a single number; else the number that the last side starts
    with, or the last one in it.
    """
    line = _plain(line)
    before = line.partition("(")[0]
    sides = (before if _ANY_NUMBER.search(before) else line).split("=")
    for side in reversed(sides):
        if len(_ANY_NUMBER.findall(side)) == 1:
            return last_number(side)
    last = sides[-1].lstrip(" *_$")
    return parse_number(last) if _ANY_NUMBER.match(last) else last_number(last)


def visible_text(completion: str) -> str | None:
    """What a completion says when it has done thinking: all of it, or what follows `</think>`.

    None while a think block is open: a thought that was cut short is no answer, whatever numbers
    are in it. After several blocks the last one counts.
    """
    after = completion.rpartition(THINK_END)[2]
    return None if THINK_START in after else after


def chain_of_thought(completion: str) -> str:
    """A completion up to its answer, without white space at the end.

    With a think block that is up to `</think>`; otherwise up to the last `####` that is no heading,
    or all of it.
    """
    head, closed, _ = completion.rpartition(THINK_END)
    if not closed and THINK_START not in completion:
        place = marker_place(completion)
        return (completion if place < 0 else completion[:place]).rstrip()
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
    text = _LATEX_COMMA.sub(",", text)
    for fraction in (_LATEX_FRACTION, _SHORT_FRACTION, _MIXED):
        text = fraction.sub(_slashed, text)
    return text


def _slashed(fraction: re.Match[str]) -> str:
    """A fraction with a slash; a mixed number, 2\\frac{1}{2} or 2 1/2, as one fraction."""
    whole, numerator, denominator = (int(part or 0) for part in fraction.groups())
    return f"{whole * denominator + numerator}/{denominator}"


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
