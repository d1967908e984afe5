"""Makes docs/configuration.md, which explains every setting, from the dataclasses of jexit.config.

    python docs/configuration.py

A test fails while the page is not what this writes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pathlib
import textwrap
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from jexit.config import Config
from jexit.settings import Bounds, annotations

INTRODUCTION = """
Every setting is an option of the command line, such as `--config.rl.depth_coef=0.6`, and a field of
a dataclass in `jexit/config.py`, from which `docs/configuration.py` makes this page. Defaults are
those of the dataclasses; presets and the files in `configs/` set some of them anew. One that does
not exist, is of the wrong type or contradicts another stops the run before anything is compiled.
"""
PAGE = pathlib.Path(__file__).with_suffix(".md")


def page() -> str:
    """The text of docs/configuration.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from ("# Configuration", "", *textwrap.wrap(" ".join(INTRODUCTION.split()), 100))
    yield from _section(Config, "")
    for name, hint in annotations(Config).items():
        if dataclasses.is_dataclass(hint):
            yield from _section(hint, f"{name}.")


def _section(cls: type, prefix: str) -> Iterator[str]:
    told = _sentences(cls)
    yield from ("", f"## {prefix.rstrip('.') or 'A run'}", "")
    yield from (*textwrap.wrap(" ".join(cls.__doc__.split()), 100), "")
    yield from ("| setting | type | default | allowed | meaning |", "|---|---|---|---|---|")
    for field in dataclasses.fields(cls):
        hint = annotations(cls)[field.name]
        if not dataclasses.is_dataclass(hint):
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            default = "`{}`" if field.default_factory is dict else default
            kind, allowed = _type_and_rule(hint)
            cells = (f"`{prefix}{field.name}`", kind, default, allowed, told[field.name])
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type_and_rule(hint: Any) -> tuple[str, str]:
    """What a setting's annotation says, for people."""
    arguments = get_args(hint)
    if typing.get_origin(hint) is Annotated:
        kind, inner = _type_and_rule(arguments[0])
        rule = arguments[1]
        return kind, str(rule) if isinstance(rule, Bounds) else inner
    if typing.get_origin(hint) is Literal:
        return "text", ", ".join(arguments)
    if typing.get_origin(hint) is tuple:
        kind, rule = _type_and_rule(arguments[0])
        return f"several: {kind}", rule
    names = {str: "text", bool: "True or False", int: "whole number", float: "number", dict: "any"}
    return names[hint], ""


def _sentences(cls: type) -> dict[str, str]:
    """The docstring under every setting of a dataclass and of those that it extends, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (made,) = ast.parse(inspect.getsource(base)).body
        for field, text in zip(made.body, made.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
