"""Trajectories of the teacher, generated once and stored on disk by one or several writers."""

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
    """The token ids of a prompt and its completion (with the end token, if it was generated)."""

    prompt: list[int]
    completion: list[int]


class TeacherStore:
    """Stored trajectories, with a separate folder for each set of settings that affect them.

    The folder's name is a hash of the settings. Every writer appends to a file of its own, so hosts
    never wait for each other. Every writer reads the files of all writers, because a rerun may have
    another number of them. The first line of a file contains the settings, and each further line
    the rows of one batch that its writer generated. Each line begins with its checksum. If a line
    is unfinished, because its process was killed, or damaged, then it and all lines after it are
    ignored, and the file's own writer removes them.
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
        """Reads the rows that all writers have stored so far."""
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
        """Returns whether all `rows` rows of a batch are stored."""
        return all((batch, row) in self._rows for row in range(rows))

    @property
    def trajectories(self) -> list[Trajectory]:
        """All stored trajectories, ordered by batch and row."""
        rows = (self._rows[place] for place in sorted(self._rows))
        return [row for row in rows if row is not None]

    def append(
        self, batch: int, rows: Sequence[int], trajectories: Sequence[Trajectory | None]
    ) -> None:
        """Stores rows of a batch; None marks one that cannot be used and is not generated again."""
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
    """Yields each line without its checksum, and its end offset, up to the first damaged line."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                return
            end += len(line)
            yield text.decode(), end
