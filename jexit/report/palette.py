"""The colours of depth: one sequential palette for heat maps, histograms and legends."""

from __future__ import annotations

import matplotlib as mpl

STEPS = 32  # of the palette, from no layer to all
INK, PAPER = "#000000", "#ffffff"


def depth_class(depth: float, layers: int) -> str:
    """The style class of a depth: c0 for no layer to c32 for all."""
    return f"c{round(STEPS * min(max(depth / layers, 0.0), 1.0))}"


def depth_colours() -> list[tuple[str, str]]:
    """Background and text colour of every step, `c0` first.

    Cividis from light to dark: its lightness is monotone, and it looks the same to readers with
    any of the common colour blindnesses (Nuñez, Anderton, Renslow 2018). The text is whichever of
    ink and paper has the higher contrast (WCAG 2.2, 1.4.3), which is at least 4.5 for each.
    """
    cividis = mpl.colormaps["cividis_r"]
    backgrounds = [mpl.colors.to_hex(cividis(step / STEPS)) for step in range(STEPS + 1)]
    return [(b, max((INK, PAPER), key=lambda text: contrast(text, b))) for b in backgrounds]


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2.2)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in mpl.colors.to_rgb(colour)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
