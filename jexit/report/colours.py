"""The colours of pages and charts, for light and dark pages.

Charts use colours for unordered series, for the levels of one quantity from low to high, and for
depths from no layers to all layers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence

SERIES = 8  # classes s0 … s7: unordered series
LEVELS = 8  # classes v0 … v8: levels of one quantity, from low to high
STEPS = 32  # classes c0 … c32: depth, from no layer to all layers

# Name → its colour on light pages and on dark ones.
COLOURS: Mapping[str, tuple[str, str]] = {
    "page": ("#fdfdfc", "#14171a"),
    "panel": ("#f3f4f2", "#1e2327"),
    "text": ("#1b1f23", "#e4e7ea"),
    "quiet": ("#57606a", "#a3adb6"),
    "rule": ("#d5d9dc", "#3a4249"),
    "link": ("#0b5cad", "#7cb8f2"),
    "grid": ("#e3e6e8", "#2c3338"),
    "s0": ("#0072b2", "#5fb4ee"),
    "s1": ("#b84a00", "#ff9a4d"),
    "s2": ("#007a5e", "#35c79c"),
    "s3": ("#8a1c7c", "#a06bff"),
    "s4": ("#7a6000", "#dcb62f"),
    "s5": ("#57606a", "#a3adb6"),
    "s6": ("#b3261e", "#f58077"),
    "s7": ("#3d4fc4", "#d3d8ff"),
}
SCHEMES = ("light", "dark")

# From shallow to deep. Light pages use Cividis from its light end (Nuñez, Anderton, Renslow 2018).
# Dark pages use a lighter blue, which stands out from the page. Lightness falls at every step, also
# for readers with any of the common forms of colour blindness.
_DEPTHS = {
    "light": ("#fee838", "#bcae6c", "#7d7c78", "#434e6c", "#00224e"),
    "dark": ("#fee838", "#cbbf6b", "#a2a08c", "#7b8bb0", "#4f74c8"),
}
# From low to high: Viridis, without the end that is invisible on the page; reversed on dark pages.
_LEVELS = {
    "light": ("#440154", "#3b528b", "#21918c", "#2e9d5b", "#8a9a00"),
    "dark": ("#fde725", "#8fd744", "#35b779", "#3f9fb0", "#8a72d2"),
}


def depth_class(depth: float, layers: int) -> str:
    """Returns the CSS class of a depth, from `c0` (no layers) to `c32` (`layers` or more)."""
    return f"c{round(STEPS * min(max(depth / layers, 0.0), 1.0))}"


def level_class(index: int, count: int) -> str:
    return f"v{round(LEVELS * index / max(count - 1, 1))}"


def depth_colours(scheme: str) -> list[tuple[str, str]]:
    """Returns the background and text colours of the classes c0 to c32 on light or dark pages.

    The text is black or white, whichever has the higher contrast with the background (WCAG 2.2,
    1.4.3): at least 4.5.
    """
    backgrounds = [_between(_DEPTHS[scheme], step / STEPS) for step in range(STEPS + 1)]
    return [(b, "#000000" if luminance(b) > 0.179 else "#ffffff") for b in backgrounds]


def level_colours(scheme: str) -> list[str]:
    return [_between(_LEVELS[scheme], level / LEVELS) for level in range(LEVELS + 1)]


def named_colours(scheme: str) -> dict[str, str]:
    return {name: pair[SCHEMES.index(scheme)] for name, pair in COLOURS.items()}


def page_colours() -> str:
    """Returns the CSS of a page: colour variables, and the classes of series, levels and depths."""

    def rules(scheme: str) -> str:
        named = "".join(f"--{name}:{colour};" for name, colour in named_colours(scheme).items())
        return f":root{{{named}}}\n{_classes(scheme)}"

    return _in_both(rules)


@functools.cache
def file_style(rules: str) -> str:
    """Returns the CSS of an SVG file: colour classes, and `rules` with `var(--NAME)` resolved."""

    def coloured(scheme: str) -> str:
        named = named_colours(scheme)
        return _classes(scheme) + re.sub(r"var\(--(\w+)\)", lambda m: named[m[1]], rules)

    return _in_both(coloured)


def luminance(colour: str) -> float:
    """Returns the relative luminance, from 0 to 1 (WCAG 2.2), of an sRGB colour as `#rrggbb`."""
    shares = (channel / 255 for channel in _channels(colour))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _classes(scheme: str) -> str:
    series = [
        (name, f"color:{c}") for name, c in named_colours(scheme).items() if name[1].isdigit()
    ]
    levels = [(f"v{index}", f"color:{c}") for index, c in enumerate(level_colours(scheme))]
    depths = [
        (f"c{step}", f"background:{background};fill:{background};color:{text}")
        for step, (background, text) in enumerate(depth_colours(scheme))
    ]
    return "".join(f".{name}{{{rule}}}\n" for name, rule in (*series, *levels, *depths))


def _in_both(rules: Callable[[str], str]) -> str:
    light, dark = map(rules, SCHEMES)
    return f"{light}@media (prefers-color-scheme: dark){{\n{dark}}}\n"


def _between(anchors: Sequence[str], share: float) -> str:
    """Interpolates between evenly spaced colours `#rrggbb`; 0 gives the first and 1 the last."""
    place = share * (len(anchors) - 1)
    first = min(int(place), len(anchors) - 2)
    ends = zip(_channels(anchors[first]), _channels(anchors[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02x}" for a, b in ends)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
