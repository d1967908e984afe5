"""Trajectories of the teacher, generated once and cached on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Token ids of a prompt and of a completion (its end token included if it came)."""

    prompt: list[int]
    completion: list[int]


class TeacherStore:
    """One JSONL file per settings: whatever changes the trajectories changes the file's name.

    The first line holds the settings. Files are written whole or not at all.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: dict[str, Any]):
        self._header = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(self._header.encode()).hexdigest()[:16]
        self.path = pathlib.Path(directory) / f"{digest}.jsonl"

    def read(self) -> list[Trajectory] | None:
        """The cached trajectories; None when there are none, or the file is not whole."""
        if not self.path.exists():
            return None
        header, *lines = self.path.read_text().splitlines()
        if header != self._header:
            return None
        return [Trajectory(**json.loads(line)) for line in lines]

    def write(self, trajectories: Iterable[Trajectory]) -> None:
        lines = [self._header]
        lines += [json.dumps(dataclasses.asdict(item)) for item in trajectories]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_text("\n".join(lines) + "\n")
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
