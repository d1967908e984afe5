"""Counts what XLA compiles while a run trains: a program that compiles twice costs minutes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """While entered, counts compilations; a loop enters it for each step.

    New lengths are compiled once; a loop puts the shapes of each step into `shapes`. A compilation
    in a step whose shapes were seen before is a recompilation: a fault.
    """

    def __init__(self) -> None:
        self.shapes: Hashable = None
        self._seen: set[Hashable] = set()
        self._count = 0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def of_step(self) -> dict[str, int]:
        """Metrics of the step that ends here: all compilations, and those of shapes seen before."""
        count, self._count = self._count, 0
        again = count if self.shapes in self._seen else 0
        self._seen.add(self.shapes)
        return {"compilations": count, "recompilations": again}

    def _listen(self, event: str, duration: float, **_: object) -> None:
        self._count += event == _COMPILED
