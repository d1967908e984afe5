"""What a setting's value may be, declared in its annotation: of numbers a range, else a length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The smallest and the largest number that a setting takes, both finite; perhaps 0 besides."""

    at_least: float
    at_most: float
    or_zero: bool = False

    def check(self, value: float, where: str) -> None:
        """Raises ValueError for a number outside, and for NaN."""
        if not (self.at_least <= value <= self.at_most or (self.or_zero and value == 0)):
            raise ValueError(
                f"{where} is {shown(value)}; it must be {'0, or ' if self.or_zero else ''}"
                f"at least {self.at_least} and at most {self.at_most}"
            )


@dataclasses.dataclass(frozen=True)
class Length:
    """How many characters a text may have, or values a tuple."""

    at_most: int

    def check(self, value: Sized, where: str) -> None:
        """Raises ValueError for what is longer."""
        if len(value) > self.at_most:
            parts = "characters" if isinstance(value, str) else "values"
            raise ValueError(
                f"{where} is {shown(value)} with {len(value)} {parts}; it must have at most "
                f"{self.at_most}"
            )


def shown(value: Any) -> str:
    """A value as messages quote it: only the beginning, where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"


Count = Annotated[int, Bounds(1, 1_000_000)]
CountOrZero = Annotated[int, Bounds(0, 1_000_000)]
# Data and PRNG keys of a step derive from 32-bit integers.
Steps = Annotated[int, Bounds(1, 100_000_000)]
StepsOrZero = Annotated[int, Bounds(0, 100_000_000)]
Seed = Annotated[int, Bounds(0, 2**31 - 1)]

# Floats are computed with in float32: what is above 0 there, or below 1, is so with a margin.
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
