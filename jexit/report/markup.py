"""HTML and SVG put together from Python, with everything that is not markup escaped."""

from __future__ import annotations

import math
import re

# Elements that have no closing tag in HTML.
VOID = ("br", "hr", "meta", "link")
NO_BREAK = "\u00a0"

_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
# What HTML cannot hold: control characters (but for tab and newline) and halves of surrogate pairs.
_SPECIAL = re.compile(r"[&<>\"'\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is markup already; any other text is escaped where it goes into a page."""

    __slots__ = ()


def escape(value: object) -> Html:
    """`value` as text inside an element or a quoted attribute; markup comes back as it is.

    Control characters are written as in Python (`\\x1b`), other characters that HTML cannot hold as
    U+FFFD, so that whatever a model wrote can be seen and nothing breaks the page.
    """
    return value if isinstance(value, Html) else Html(_SPECIAL.sub(_replace, str(value)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element; `class_` stands for class, `_` in names for `-`.

    An attribute that is None or False is left out, one that is True has no value, and a child that
    is None is left out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{_attribute(value)}"')
    start = f"<{' '.join(parts)}>"
    return Html(start) if name in VOID else Html(f"{start}{join(*children)}</{name}>")


def join(*children: object, by: str = "") -> Html:
    """All children in a row, None left out."""
    return Html(by.join(escape(child) for child in children if child is not None))


def number(value: float | None, digits: int = 2) -> str:
    """A figure with thousands apart; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def per_cent(value: float | None, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    known = value is not None and math.isfinite(value)
    return f"{number(100 * value, digits)}{NO_BREAK}%" if known else "–"


def interval(bounds: tuple[float, float] | None, digits: int = 1) -> str:
    """An interval of shares in per cent; nothing for one that is not known."""
    if bounds is None or not all(map(math.isfinite, bounds)):
        return ""
    low, high = (number(100 * bound, digits) for bound in bounds)
    return f"{low} to {high}{NO_BREAK}%"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, with its sign."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{'+' if value > 0 else ''}{number(100 * value, 1)}"


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(value)


def _replace(match: re.Match[str]) -> str:
    character = match.group()
    if character in _ESCAPES:
        return _ESCAPES[character]
    return f"\\x{ord(character):02x}" if ord(character) < 0xA0 else "\ufffd"
