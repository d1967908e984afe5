"""Counts XLA compilations during training, where each unnecessary one costs minutes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """A context manager that counts XLA compilations; the training loop enters it for each step.

    Within a step, the loop assigns the array shapes of the step to `shapes`. If a later step with
    the same shapes compiles again, this counts as a recompilation, which indicates a bug.
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
        """Returns the metrics `compilations` and `recompilations` of the step that ends now."""
        count, self._count = self._count, 0
        again = count if self.shapes in self._seen else 0
        self._seen.add(self.shapes)
        return {"compilations": count, "recompilations": again}

    def _listen(self, event: str, duration: float, **_: object) -> None:
        self._count += event == _COMPILED
