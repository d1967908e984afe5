"""Validates settings: frozen dataclasses whose annotations define the allowed values.

The string below a field documents it. `build` checks values from a file or a command line.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sized
from typing import Annotated, Any, Literal, TypeVar

from jexit.errors import UserError

Section = TypeVar("Section")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An annotation for a number: the smallest and the largest allowed value, both finite.

    With `or_zero`, 0 is allowed as well.
    """

    at_least: float
    at_most: float
    or_zero: bool = False

    def __str__(self) -> str:
        return (
            f"{'0, or ' if self.or_zero else ''}at least {self.at_least} and at most {self.at_most}"
        )

    def check(self, value: float, where: str) -> None:
        if not (self.at_least <= value <= self.at_most or (self.or_zero and value == 0)):
            raise UserError(f"{where} is {shown(value)}, but it must be {self}; correct it")


@dataclasses.dataclass(frozen=True)
class Length:
    """An annotation for a string or tuple: the largest number of characters or elements."""

    at_most: int

    def check(self, value: Sized, where: str) -> None:
        if len(value) > self.at_most:
            parts = "characters" if isinstance(value, str) else "values"
            raise UserError(
                f"{where} is {shown(value)} with {len(value)} {parts}, but it must have at most "
                f"{self.at_most}; shorten it"
            )


@dataclasses.dataclass(frozen=True)
class Keywords:
    """An annotation for a task's own settings: identifiers mapped to numbers, strings or lists."""

    def check(self, values: Mapping[str, Any], where: str) -> None:
        for name, value in values.items():
            if not (isinstance(name, str) and name.isidentifier()):
                raise UserError(
                    f"{where} contains the name {shown(name)}, but a name must be a Python "
                    "identifier (letters, digits and underscores, not beginning with a digit); "
                    "rename it"
                )
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if not isinstance(item, (bool, int, float, str)):
                    raise UserError(
                        f"{where}.{name} is {shown(value)}, but it must be a number, a string or "
                        "a list of these; correct it"
                    )


Count = Annotated[int, Bounds(1, 1_000_000)]
CountOrZero = Annotated[int, Bounds(0, 1_000_000)]
# A step's data and PRNG keys are derived from 32-bit integers.
Steps = Annotated[int, Bounds(1, 100_000_000)]
StepsOrZero = Annotated[int, Bounds(0, 100_000_000)]
Seed = Annotated[int, Bounds(0, 2**31 - 1)]

# Computations use float32, so values that must be above 0 or below 1 keep a margin.
Positive = Annotated[float, Bounds(1e-6, 1_000_000)]
Coefficient = Annotated[float, Bounds(0, 1_000_000)]
Signed = Annotated[float, Bounds(-1_000, 1_000)]
LearningRate = Annotated[float, Bounds(0, 10)]
Share = Annotated[float, Bounds(0, 1)]
ShareBelowOne = Annotated[float, Bounds(0, 0.999999)]
Temperature = Annotated[float, Bounds(1e-6, 1_000)]
TemperatureOrGreedy = Annotated[float, Bounds(1e-6, 1_000, or_zero=True)]

Name = Annotated[str, Length(1_000)]
Names = Annotated[tuple[Name, ...], Length(100)]
Options = Annotated[dict, Keywords()]


def shown(value: Any) -> str:
    """Returns the repr of `value` for error messages, cut off after 100 characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write out integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
    """Returns the annotation of every field of the dataclass `cls`, by name."""
    return typing.get_type_hints(cls, include_extras=True)


def build(cls: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """Builds the dataclass `cls` from plain values, such as parsed JSON, after checking them.

    An integer is accepted for a float, and a list or a single value for a tuple. Raises UserError
    if a key is unknown or missing, or if the annotation of a field does not allow the value. The
    message names the setting as `where` and its key.
    """
    hints = annotations(cls)
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where} is {shown(values)}, but it must be a group of settings; set single ones, "
            f"such as {where}.KEY"
        )
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(
                f"{where}.{key} does not exist; use one of the keys {', '.join(sorted(hints))}"
            )
        hint, place = hints[key], f"{where}.{key}"
        read = build if dataclasses.is_dataclass(hint) else checked
        built[key] = read(hint, value, place)
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if field.name not in built and needed:
            rule = _rule(hints[field.name])
            raise UserError(f"{where}.{field.name} is missing, but it must be {rule}; add it")
    return cls(**built)


def check(settings: Any) -> None:
    """Raises UserError if a field of the dataclass instance `settings` has a forbidden value.

    Call this in `__post_init__`, so that instances are checked even if `build` did not make them.
    """
    for name, hint in annotations(type(settings)).items():
        if not dataclasses.is_dataclass(hint):
            checked(hint, getattr(settings, name), name)


def checked(hint: Any, value: Any, where: str) -> Any:
    """Returns `value`, converted to the type of the annotation `hint`.

    Integers become floats, and lists and single values become tuples, where `hint` requires it.
    Raises UserError, with `where` as the value's name, if `hint` does not allow the value.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = checked(arguments[0], value, where)
        arguments[1].check(value, where)
        return value
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        made = all(map(dataclasses.is_dataclass, kinds)) and isinstance(value, tuple(kinds))
        return value if value is None or made else checked(kinds[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{where} is {shown(value)}, but it must be {_rule(hint)}; choose one of these"
            )
        return value
    if origin is tuple:
        items = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(checked(arguments[0], item, where) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(
                f"{where} is {shown(value)}, but that is too large for a floating-point number; "
                "lower it"
            ) from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} is {shown(value)}, but it must be {_rule(hint)}; correct it")
    if hint is str and ("\0" in value or not is_unicode(value)):
        raise UserError(
            f"{where} is {shown(value)}, but it must be valid Unicode text without NUL characters; "
            "correct it"
        )
    return value


def _rule(hint: Any) -> str:
    """Returns which values the annotation `hint` allows, to follow "must be" in error messages."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if hint is dict:
        return "a mapping from names of settings to values, such as {'steps': 3}"
    return f"of type {getattr(hint, '__name__', hint)}"


def is_unicode(text: str) -> bool:
    """Returns whether `text` can be encoded as UTF-8, which fails for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
