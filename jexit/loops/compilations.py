"""Counts XLA compilations during training, because compiling a program twice costs minutes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """A context manager that counts compilations; a loop enters it for each step.

    The loop assigns the shapes of the current step to `shapes`. New shapes have to be compiled
    once. A compilation in a step whose shapes occurred before is a recompilation, which is a fault.
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
        """Returns the counts of the step that ends here as metrics, and starts counting anew.

        `compilations` counts all of them, `recompilations` only those in a step whose shapes
        occurred before.
        """
        count, self._count = self._count, 0
        again = count if self.shapes in self._seen else 0
        self._seen.add(self.shapes)
        return {"compilations": count, "recompilations": again}

    def _listen(self, event: str, duration: float, **_: object) -> None:
        self._count += event == _COMPILED
