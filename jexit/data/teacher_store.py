"""Trajectories of the teacher, generated once and kept on disk batch by batch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Token ids of a prompt and of a completion (its end token included if it came)."""

    prompt: list[int]
    completion: list[int]


class TeacherStore:
    """One JSONL file per settings: whatever changes the trajectories changes the file's name.

    The first line holds the settings, each further one a generated batch, each after its checksum.
    A line that a killed process left unfinished, or that was damaged since, is cut off with all
    that follow when the file is opened: generation continues there.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: dict[str, Any]):
        header = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(header.encode()).hexdigest()[:16]
        self.path = pathlib.Path(directory) / f"{digest}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._batches: list[list[Trajectory]] = []
        whole = 0
        if self.path.exists():
            with self.path.open("rb") as file:
                for number, line in enumerate(file):
                    text = _checked(line)
                    if text is None or (number == 0 and text != header):
                        break
                    if number:
                        self._batches.append([Trajectory(**row) for row in json.loads(text)])
                    whole += len(line)
            os.truncate(self.path, whole)
        if not whole:
            self._append(header)

    @property
    def batches(self) -> int:
        """How many batches are stored."""
        return len(self._batches)

    @property
    def trajectories(self) -> list[Trajectory]:
        return [row for batch in self._batches for row in batch]

    def append(self, batch: Sequence[Trajectory]) -> None:
        """Stores the next batch; it may be empty."""
        self._append(json.dumps([dataclasses.asdict(row) for row in batch]))
        self._batches.append(list(batch))

    def _append(self, text: str) -> None:
        with self.path.open("ab") as file:
            file.write(b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode()))
            file.flush()
            os.fsync(file.fileno())


def _checked(line: bytes) -> str | None:
    """A line without its checksum; None when it is not whole."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    whole = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text)
    return text.decode() if whole else None
