"""Draws completions of a study as rows of coloured tokens, each with its number of layers run."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pydantic

from jexit.errors import UserError
from jexit.report import charts
from jexit.report.charts import ShapeGroup, Text, drawing
from jexit.report.colours import depth_class
from jexit.report.heat_maps import visible

WIDTH, LINE, CELL = 860.0, 36.0, 33.0  # of the picture, from line to line, of a cell's height
LETTER = 8.2  # a letter's width in tokens


class Strip(pydantic.BaseModel, extra="ignore"):
    """A completion under `settings`: its tokens and their depths, in a model of `layers` layers."""

    settings: dict[str, str]
    layers: Annotated[int, pydantic.Field(ge=1)]
    prompt: str
    tokens: list[str]
    depths: list[int]

    @pydantic.model_validator(mode="after")
    def _a_depth_each(self) -> Strip:
        if len(self.depths) != len(self.tokens):
            raise ValueError(
                f"{len(self.depths)} depths for {len(self.tokens)} tokens, but one per token is "
                "needed"
            )
        return self


def read_strips(path: Path, settings: Sequence[str]) -> list[Strip]:
    """Reads NAME-completions.json; raises UserError if it is invalid or from another study."""
    try:
        strips = pydantic.TypeAdapter(list[Strip]).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = "/".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{path} is invalid{f' at {where}' if where else ''} ({message}); collect it from its "
            "sweep again"
        ) from error
    if missing := [key for strip in strips for key in settings if key not in strip.settings]:
        raise UserError(
            f"{path} has completions without {missing[0][:80]!r}, which their study has; collect "
            "both from the same sweep"
        )
    return strips


def draw(title: str, strips: Sequence[tuple[str, Strip]]) -> str:
    """Returns an SVG file of the strips: a cell per token, with the depth below its text."""
    heads = textwrap.wrap(title, 110)
    shapes: list[charts.Path | Text] = [
        Text(0.0, 14.0 + 17.0 * row, head, "title") for row, head in enumerate(heads)
    ]
    top = 9.0 + 17.0 * len(heads)
    for label, strip in strips:
        shapes.append(Text(0.0, top + 22.0, label, "label"))
        top += LINE
        left = 0.0
        for token, depth in zip(strip.tokens, strip.depths, strict=True):
            text = visible(token)
            width = LETTER * max(len(text), 2) + 8.0
            if left and left + width > WIDTH:
                left, top = 0.0, top + LINE
            colour, middle = depth_class(depth, strip.layers), left + (width - 3.0) / 2
            cell = f"M{left:.1f} {top:.1f}h{width - 3.0:.1f}v{CELL:g}h{3.0 - width:.1f}Z"
            shapes.append(charts.Path(cell, colour, f"{depth} of {strip.layers} layers"))
            shapes.append(Text(middle, top + 16.0, text, f"{colour} token", "middle"))
            shapes.append(Text(middle, top + 28.0, str(depth), f"{colour} depth", "middle"))
            left += width
        top += LINE + 6.0
    return drawing([ShapeGroup(0.0, 0.0, shapes)], WIDTH, top)
