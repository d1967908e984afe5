"""Trajectories of the teacher, generated once and kept on disk by one writer or several."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Token ids of a prompt and of a completion (its end token included if it came)."""

    prompt: list[int]
    completion: list[int]


class TeacherStore:
    """One folder per settings: whatever changes the trajectories changes the folder's name.

    Every writer appends to a file of its own, so hosts never wait for each other, and reads all of
    them: a rerun may have another number of writers. A file's first line holds the settings, each
    further one the rows of a batch that its writer made, each after its checksum. A line that a
    killed process left unfinished, or that was damaged since, is left out with all that follow; the
    writer whose file it is cuts them off.
    """

    def __init__(
        self, directory: str | os.PathLike[str], settings: dict[str, Any], *, writer: int = 0
    ):
        self._header = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(self._header.encode()).hexdigest()[:16]
        self.directory = pathlib.Path(directory) / digest
        self.path = self.directory / f"host-{writer}.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = list(_whole_lines(self.path))
            whole = lines[-1][1] if lines and lines[0][0] == self._header else 0
            os.truncate(self.path, whole)
        if not self.path.exists() or not self.path.stat().st_size:
            self._append(self._header)
        self._rows: dict[tuple[int, int], Trajectory | None] = {}
        self.read()

    def read(self) -> None:
        """Reads what every writer has stored so far."""
        self._rows = {}
        for path in sorted(self.directory.glob("host-*.jsonl")):
            for number, (text, _) in enumerate(_whole_lines(path)):
                if number == 0:
                    if text != self._header:
                        break
                    continue
                stored = json.loads(text)
                for row, pair in zip(stored["rows"], stored["trajectories"], strict=True):
                    trajectory = None if pair is None else Trajectory(**pair)
                    self._rows[stored["batch"], row] = trajectory

    def holds(self, batch: int, rows: int) -> bool:
        """Whether all `rows` rows of a batch are stored."""
        return all((batch, row) in self._rows for row in range(rows))

    @property
    def trajectories(self) -> list[Trajectory]:
        """All that are stored, by batch and row."""
        rows = (self._rows[place] for place in sorted(self._rows))
        return [row for row in rows if row is not None]

    def append(
        self, batch: int, rows: Sequence[int], trajectories: Sequence[Trajectory | None]
    ) -> None:
        """Stores rows of a batch; None for one that is of no use and need not be made again."""
        pairs = [None if row is None else dataclasses.asdict(row) for row in trajectories]
        numbers = [int(row) for row in rows]
        self._append(json.dumps({"batch": batch, "rows": numbers, "trajectories": pairs}))
        for row, trajectory in zip(numbers, trajectories, strict=True):
            self._rows[batch, row] = trajectory

    def _append(self, text: str) -> None:
        with self.path.open("ab") as file:
            file.write(b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode()))
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Each line without its checksum and where it ends, up to the first that is not whole."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                return
            end += len(line)
            yield text.decode(), end
