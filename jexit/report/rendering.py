"""Renders HTML and SVG templates with escaping, and formats numbers."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jinja2
from markupsafe import Markup

NO_BREAK = "\u00a0"

# Characters that HTML and XML cannot contain: control characters other than tab and newline, halves
# of surrogate pairs, and two code points that are not characters.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, **values: Any) -> Markup:
    """Renders a template of `jexit/report/templates`; `values` are escaped unless they are markup.

    Control characters are written as in Python (`\\x1b`), and other characters that a page cannot
    contain become U+FFFD. A model's text is therefore visible and cannot break the page.
    """
    return Markup(printable(_environment().get_template(template).render(values)))


def asset(name: str) -> Markup:
    """Returns the contents of the file `name` in the template folder, unchanged."""
    environment = _environment()
    return Markup(environment.loader.get_source(environment, name)[0])


def printable(text: str) -> str:
    return _UNPRINTABLE.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0xA0 else "\ufffd"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jexit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "per_cent": per_cent, "interval": interval}
    return environment


def number(value: float | None, digits: int = 2) -> str:
    """Formats a number with `digits` decimals and thousands separators, or a dash if unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def short_number(value: float, digits: int = 3) -> str:
    """Formats a number with `digits` significant digits, and a power of ten if it is far from 1."""
    mantissa, _, power = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}{f'e{int(power)}' if power else ''}".replace("-", "−")


def per_cent(value: float | None, digits: int = 1) -> str:
    """Formats a fraction from 0 to 1 in per cent, or as a dash if it is unknown."""
    known = value is not None and math.isfinite(value)
    return f"{number(100 * value, digits)}{NO_BREAK}%" if known else "–"


def interval(bounds: tuple[float, float] | None) -> str:
    """Formats an interval of fractions, such as "1.0 to 2.0 %", or as "" if it is unknown."""
    if bounds is None or not all(map(math.isfinite, bounds)):
        return ""
    low, high = (number(100 * bound, 1) for bound in bounds)
    return f"{low} to {high}{NO_BREAK}%"


def points(value: float | None) -> str:
    """Formats a difference of fractions in signed percentage points, or as a dash if unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{'+' if value > 0 else ''}{number(100 * value, 1)}"
