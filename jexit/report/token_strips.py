"""Completions of a study as lines of coloured tokens, each with the layers that its pass ran."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pydantic import model_validator

from jexit.report.heatmap import visible
from jexit.report.palette import depth_colours
from jexit.results import Count, Positive, Record, check_one_a_token, checked
from jexit.untrusted import read_json

# In inches: the figure, a line's height, one of the title's, a letter's width in tokens.
WIDTH, LEFT, LINE, HEAD, LETTER, GAP = 9.0, 0.1, 0.36, 0.2, 0.085, 0.03
MONO = "monospace"


class Strip(Record):
    """A completion of a run with `settings`: its tokens, and how many of `layers` each ran."""

    settings: dict[str, str]
    layers: Positive
    prompt: str
    tokens: tuple[str, ...]
    depths: tuple[Count, ...]

    @model_validator(mode="after")
    def _one_a_token(self) -> Self:
        check_one_a_token(self.tokens, depths=self.depths)
        return self


def read_strips(path: Path) -> tuple[Strip, ...]:
    """A sweep's completions.json; raises UserError where it is none."""
    entries = read_json(path, "copy a sweep's completions.json there")
    return checked(tuple[Strip, ...], entries, str(path))


def draw(title: str, strips: Sequence[tuple[str, Strip]]) -> Figure:
    """Each strip under its label: a cell a token, the depth below its text."""
    heads = textwrap.wrap(title, 95)
    placed = [(label, strip.layers, _lines(strip)) for label, strip in strips]
    above = HEAD * len(heads) + 0.1
    height = above + LINE * sum(1 + len(lines) for *_, lines in placed) + 0.1
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    colours = depth_colours()
    rows = itertools.count()

    def write(middle: float, text: str, **style: Any) -> None:
        axes.text(LEFT, middle, text, va="center", **style)

    for number, head in enumerate(heads):
        write((number + 0.6) * HEAD, head, fontsize=10, fontweight="bold")
    for label, layers, lines in placed:
        write(above + (next(rows) + 0.6) * LINE, label, fontsize=9, color="#3a444d")
        for line in lines:
            top = above + next(rows) * LINE
            for left, width, text, depth in line:
                share = min(max(depth / layers, 0.0), 1.0)
                back, ink = colours[round((len(colours) - 1) * share)]
                cell = Rectangle((left, top), width - GAP, LINE - GAP, facecolor=back)
                axes.add_patch(cell)
                style = {"ha": "center", "va": "center", "color": ink}
                middle = left + (width - GAP) / 2
                axes.text(middle, top + 0.35 * LINE, text, fontsize=8.5, family=MONO, **style)
                axes.text(middle, top + 0.75 * LINE, str(depth), fontsize=6, **style)
    return figure


def _lines(strip: Strip) -> list[list[tuple[float, float, str, int]]]:
    """Lines of cells: left edge, width, text and depth, as many as go into the figure's width."""
    lines: list[list[tuple[float, float, str, int]]] = [[]]
    left = LEFT
    for token, depth in zip(strip.tokens, strip.depths, strict=True):
        text = visible(token)
        width = LETTER * max(len(text), 2) + 0.08
        if lines[-1] and left + width > WIDTH - LEFT:
            lines.append([])
            left = LEFT
        lines[-1].append((left, width, text, depth))
        left += width
    return lines
