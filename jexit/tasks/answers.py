"""Finds and compares numeric answers in free text, in time linear in the length of the text.

These rules define which number is the answer of a completion. Text inside a think block (`<think>`
to `</think>`) is ignored (see `visible_text`).

A number may have a sign, a dollar sign, commas between groups of three digits, and decimals. It may
also be a fraction in lowest terms, with or without a whole number before it: `-3`, `$1,000.00`,
`.5`, `3/4`, `\\frac{3}{4}`, `2 1/2`. Numbers are compared by value. Expressions are not evaluated:
neither an expression such as `36/2`, `9 times 2`, `18-20`, `12:30`, `2^3`, `2³` or `sqrt(9)` nor a
part of it counts as a number. An exclamation mark is punctuation, not a factorial.

Strict rule: if the last line of the text consists of `#### `, one number and at most a full stop,
this number is the answer.

Lenient rule: if the last line does not have this form, the answer is in the first of these four
places that the text contains:

1. the last `\\boxed{}`, if it contains a number or an expression;
2. the last line that is not a heading and contains a `####` with a number after it. If the line
   contains only "Answer:" after the `####`, the next line counts. A heading names a step
   ("#### Step 2"), or reads as a title before lines that contain numbers ("#### 2. Find the price",
   "#### Cost of 3 apples");
3. the last "the answer is" or "answer:" that a number or an expression follows;
4. the whole text, where the last number is the answer.

In places 1 to 3, remarks in parentheses are left out, and the sides of an equals sign are read
separately. The last side that gives a number decides, so "9 * 2 = 18" and "18 = 9 * 2" both give
18. A side gives the number with which it starts ("18 dollars for 9 eggs"), or else its last number
("the 3 friends pay 18 dollars"). If the side is an item of a list, it gives the number that its
sentence states ("3. The total is 18."). If the number to give is part of an expression, the side
gives no number. In places 1 to 3, expressions also include several numbers: a list or a range ("18
or 20", "18; 20", "18~20"), numbers with nothing between them ("18 20"), a quantity in two units
("18 hours 30 minutes", "12h30"), and a number with a LaTeX command ("2\\pi").
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from jexit.tasks.base import VerdictKind

# Longer digit strings are not sensible answers, and converting huge ones is quadratic (and refused
# by Python above 4,300 digits).
_MAX_DIGITS = 60
_SPAN = 400  # characters that are read of a line, a box, a clause, or the text after a heading
_LAST = 32  # markers and announcements that are read, counted from the end of the text

# A sign touches its number ("- 3 apples" is a list item) but not an operand before it ("10-3").
_NUMBER = (
    r"(?:(?<![\w)])[-\u2212]\$?|\$ ?[-\u2212]?)?"
    r"(?:(?:[0-9]++ )?[0-9]++ ?/ ?[0-9]++"
    r"|[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])(?:\.[0-9]++)?"
    r"|[0-9]++(?:\.[0-9]++)?|\.[0-9]++)"
)
_ONLY_NUMBER = re.compile(rf"({_NUMBER})\.?\Z")
_PARTS = re.compile(r"-?(?:(?P<whole>[0-9]+) )?(?P<numerator>[0-9]+)/(?P<denominator>[0-9]+)")
# A minus with a space before it only is the sign of another number ("3, then -4").
_OPERATORS = (
    r"[-\u2212\u2013](?= )|(?<! )[-\u2212\u2013]|[+*/\u00d7\u00f7x]|\*\*|\\times|\\cdot|\\div"
    r"|(?<= )(?:plus|minus|times|over|mod|(?:divided|multiplied) by)(?= )"
)
_SEVERAL = r",|[~\u2014|;]|\.{2,}|\u2026|(?<= ):(?= )|(?<= )(?:and|of|or|to)(?= )"
_UNIT = (
    r"(?:h|hr|hour|min|minute|second|day|week|month|year|dollar|pound|lb|feet|foot|ft|yard|mile|kg"
    r"|km|kilo(?:gram|meter|metre)|m|meter|metre)s?\.?"
)


def _expressions(operators: str) -> str:
    """Returns a regular expression for a number together with all operands joined to it.

    The group `number` contains the number. The group `more` matches if an operand is joined to the
    number by one of `operators`, or directly by a point, comma, colon or exponent. A unit of up to
    two words may stand before an operator. An exponent of anything but a number (`x^2`) does not
    match. The group `function` matches if the number is the argument of a function.
    """
    join = rf"[%)]?(?: ?[A-Za-z]++){{0,2}} ?(?:{operators}) ?\(?"
    joined = rf"(?:{join}|[.,:](?=[0-9])|\^\{{?|[eE][-+]?(?=[0-9])){_NUMBER}|[\u00b2\u00b3\u00b9]"
    return (
        rf"(?<![0-9^])(?<!\^\{{)(?P<function>(?<![A-Za-z])[A-Za-z]++\()?"
        rf"(?P<number>{_NUMBER})(?P<more>{joined})*+"
    )


_IN_TEXT = re.compile(_expressions(_OPERATORS))
_IN_ANSWER = re.compile(
    _expressions(rf"{_OPERATORS}|{_SEVERAL}|(?<=[0-9]) |(?<=[0-9])h(?=[0-9])|(?<= ){_UNIT}(?= )")
    + r"|\\[A-Za-z]"
)

# LaTeX markup around numbers, and its equivalent in plain text.
_LATEX = (
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\,)(?=[0-9])"), ","),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^(?:\\circ\b|\{\\circ\})"), ""),
    (re.compile(r"(?<=[0-9]) ?\\[dt]?frac"), r" \\frac"),
    (re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac ?([0-9]) ?([0-9])"), r"\1/\2"),
)

_EQUALS = re.compile(r"=|\u2248|\\approx\b")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+)\}")
_MARKER = "####"
_MARKED = re.compile(r"####(?!#)")
# "18. That is all" is an answer with a remark, "3. The total is 18" an item of a list.
_ITEM = re.compile(r"[0-9]{1,2}[.)] +[*_]*(?=[^\W\d])(?!(?:[Tt]hat|[Tt]his|[Ii]t|[Ww]hich)\b)")
_STATES = re.compile(r"(?:\b(?:is|are|equals)|:)[\s*_]*\Z")
_STEP = re.compile(r"[^\w\n#]*(?:step|part|case|phase|stage|day|option|method)\b", re.IGNORECASE)
_TITLE = re.compile(r"[^\w\n#]*[^\W\d][^\n0-9:=]*[0-9]")
_LEAD = re.compile(
    r"(?:[\s*_$:=]|\\?[(\[])*(?:(?:the +)?(?:final +)?answer(?: +is)?(?:[\s*_$:=]|\\?[(\[])*)?",
    re.IGNORECASE,
)
# "The answer is 18.", "**Answer:** 18" and "answer = 9 * 2 = 18", and where its clause ends.
_ANNOUNCED = re.compile(r"\banswer(?: is)?(?:[\s:*$=]|\\?[(\[]){1,8}", re.IGNORECASE)
_CLAUSE_END = re.compile(
    r"[;\n(]|,(?! ?\$?[0-9])|(?<!\.)\.(?!\.*+[0-9])|\b(?:as|because|since|so|where|which)\b",
    re.IGNORECASE,
)

THINK_START, THINK_END = "<think>", "</think>"


def parse_number(text: str) -> Fraction | None:
    """Returns the first number in `text`, or None if there is none or an expression comes first."""
    match = _IN_TEXT.search(_plain(text))
    return None if match is None else _value(match)


def last_number(text: str) -> Fraction | None:
    """Returns the last number in `text` that is not part of an expression, or None.

    Numbers more than `_SPAN` (400) characters before the last digit are not considered.
    """
    end = 1 + max(map(text.rfind, "0123456789"))
    start = max(end - _SPAN, 0)
    found = list(_IN_TEXT.finditer(_plain(text[start : end + _SPAN])))
    if start:
        del found[:1]  # may be a part of what begins before
    return next((value for match in reversed(found) if (value := _value(match)) is not None), None)


def strict_number(text: str) -> Fraction | None:
    """Returns the number n if the last line of `text` is `#### n` or `#### n.`, otherwise None."""
    line = text.rstrip().rpartition("\n")[2]
    if not line.startswith(_MARKER + " "):
        return None
    match = _ONLY_NUMBER.match(line, len(_MARKER) + 1)
    return None if match is None else _to_fraction(match.group(1))


def lenient_number(text: str) -> Fraction | None:
    """Returns the answer that the lenient rule in this module's docstring finds, or None."""
    answer = _boxed(text)
    if answer is None and (place := marker_place(text)) >= 0:
        answer = _marked(text, place)
    if answer is None:
        answer = _announced(text)
    return last_number(text) if answer is None else _given(answer)


def marker_place(text: str) -> int:
    """Returns the offset of the last `####` that marks an answer and not a heading, or −1."""
    places = (marker.start() for marker in _last(_MARKED, text))
    return next((place for place in places if _marked(text, place) is not None), -1)


def answer_mark(completion: str) -> tuple[int, int] | None:
    """Returns the offsets (start, end) of the mark that introduces the answer, or None.

    The mark is the `\\boxed{` of the last `\\boxed{}`, or else the last `####` that marks an
    answer. If a `<think>` is not closed, there is no mark.
    """
    text = visible_text(completion) or ""
    hidden = len(completion) - len(text)
    if box := next(_last(_BOXED, text), None):
        return hidden + box.start(), hidden + box.start(1)
    place = marker_place(text)
    return None if place < 0 else (hidden + place, hidden + place + len(_MARKER))


def _last(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    return reversed(collections.deque(pattern.finditer(text), maxlen=_LAST))


def _boxed(text: str) -> str | None:
    box = next(_last(_BOXED, text), None)
    answer = "" if box is None else _plain(box[1][:_SPAN])
    return answer if _IN_ANSWER.search(answer) else None


def _marked(text: str, place: int) -> str | None:
    """Returns the text that contains the answer after the `####` at offset `place`, or None.

    The text is the rest of the line or, if the rest is only "Answer:", the next line, which must
    then start with a number. Returns None after a heading, or if the text contains no number.
    """
    start = place + len(_MARKER)
    if _STEP.match(text, start):
        return None
    lead = _LEAD.match(text, start, start + _SPAN)
    line, _, after = text[lead.end() : lead.end() + _SPAN].partition("\n")
    if (_ITEM.match(line) or _TITLE.match(line)) and _IN_TEXT.search(after):
        return None
    line = _plain(line)
    found = (_IN_TEXT.match if "\n" in lead.group() else _IN_TEXT.search)(line)
    return None if found is None or line.rstrip(" *_").endswith(":") else line


def _announced(text: str) -> str | None:
    """Returns the last clause that follows "answer" and starts with a number or an expression.

    Between the two there may be "is", ":" or "=". Returns None if there is no such clause.
    """
    for announced in _last(_ANNOUNCED, text):
        clause = _plain(text[announced.end() : announced.end() + _SPAN])
        end = _CLAUSE_END.search(clause)
        clause = clause[: end.start() if end else None]
        if _IN_ANSWER.match(clause):
            return clause
    return None


def _given(answer: str) -> Fraction | None:
    """Returns the number of the last side of `answer` that gives one, or None if no side does.

    The sides are the parts between equals signs.
    """
    before = answer.partition("(")[0]
    sides = _EQUALS.split(before if _IN_ANSWER.search(before) else answer)
    return next((value for side in reversed(sides) if (value := _side(side)) is not None), None)


def _side(side: str) -> Fraction | None:
    side = side.lstrip(" *_$")
    found = list(_IN_ANSWER.finditer(side))
    if not found or any(expression["number"] is None for expression in found):
        return None
    item = _ITEM.match(side)
    if item and len(found) == 2 and _STATES.search(side[item.end() : found[1].start()]):
        return _value(found[1])
    return _value(found[-1 if found[0].start() else 0])


def visible_text(completion: str) -> str | None:
    """Returns the text after the last `</think>`, or None if it contains an unclosed `<think>`."""
    after = completion.rpartition(THINK_END)[2]
    return None if THINK_START in after else after


def chain_of_thought(completion: str) -> str:
    """Returns the part of `completion` before its answer, without white space at the end.

    This part ends at the last `</think>` or, without a think block, at the last `####` that marks
    an answer. Without either, and after a `<think>` that is not closed, it is the whole completion.
    """
    head, closed, _ = completion.rpartition(THINK_END)
    if not closed and THINK_START not in completion:
        place = marker_place(completion)
        return (completion if place < 0 else completion[:place]).rstrip()
    return (head if closed else completion).rstrip()


def with_think_start(steps: Sequence[str]) -> list[str]:
    """Returns `steps`, where a first step that is only `<think>` is joined to the second step."""
    if steps and steps[0].strip() == THINK_START:
        return ["".join(steps[:2]), *steps[2:]]
    return list(steps)


def final_number(completion: str) -> Fraction | None:
    """Returns the number that the rules of this module find in a completion, or None."""
    text = visible_text(completion) or ""
    strict = strict_number(text)
    return lenient_number(text) if strict is None else strict


def judge(completion: str, answer: str) -> VerdictKind:
    """Compares a completion's answer with the correct answer `answer` by value.

    If the last line is `#### n`, returns `strict` or `wrong`. Otherwise, returns `lenient` or
    `wrong` for the number that the lenient rule finds, or `none` if there is no number.
    """
    found = final_number(completion)
    if found is None:
        return "none"
    if found != parse_number(answer):
        return "wrong"
    return "lenient" if strict_number(visible_text(completion) or "") is None else "strict"


def _plain(text: str) -> str:
    """Returns `text` with LaTeX markup around numbers replaced by plain text."""
    if "\\" in text or "{" in text:
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
    return text


def _value(expression: re.Match[str]) -> Fraction | None:
    """Returns the value of a match of `_IN_TEXT` or `_IN_ANSWER`, or None for an expression."""
    several = expression["more"] or expression["function"]
    return None if several else _to_fraction(expression["number"])


def _to_fraction(literal: str) -> Fraction | None:
    if len(literal) > _MAX_DIGITS:
        return None
    literal = re.sub(r"[,$]", "", literal).replace("\u2212", "-")
    parts = _PARTS.fullmatch(literal.replace(" /", "/").replace("/ ", "/").strip())
    if parts is None:
        return Fraction(literal.replace(" ", ""))
    whole, numerator, denominator = (int(part or 0) for part in parts.groups())
    if (
        denominator < 2
        or math.gcd(numerator, denominator) > 1
        or (whole and numerator > denominator)
    ):
        return None  # a division that is left to the reader
    value = whole + Fraction(numerator, denominator)
    return -value if literal.startswith("-") else value
