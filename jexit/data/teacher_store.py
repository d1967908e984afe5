"""Stores a teacher model's generated completions on disk, so that they are generated only once."""

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
    """The token ids of a prompt and of its completion, with the end-of-sequence token, if any."""

    prompt: list[int]
    completion: list[int]


class TeacherStore:
    """Stores trajectories on disk: prompts with the completions of a teacher model.

    `settings` contains everything that affects the trajectories; each choice of settings has a
    folder of its own in `directory`. `writer`, usually the index of the host, selects the file to
    which new rows are appended, so that hosts never wait for each other. Rows are read from the
    files of all writers, because an earlier run may have had another number of hosts.

    The first line of a file contains the settings, and each further line the rows of one batch.
    Each line begins with a checksum. A damaged or incomplete line and all lines after it are
    ignored, and removed when the file's own writer opens the file.
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
        self.read()

    def read(self) -> None:
        """Reads all rows that any writer has stored so far."""
        self._rows: dict[tuple[int, int], Trajectory | None] = {}
        for path in sorted(self.directory.glob("host-*.jsonl")):
            lines = _whole_lines(path)
            if next(lines, ("", 0))[0] != self._header:
                continue
            for text, _ in lines:
                stored = json.loads(text)
                for row, pair in zip(stored["rows"], stored["trajectories"], strict=True):
                    trajectory = None if pair is None else Trajectory(**pair)
                    self._rows[stored["batch"], row] = trajectory

    def holds(self, batch: int, rows: int) -> bool:
        """Returns whether rows 0 … `rows` - 1 of the batch with number `batch` are stored."""
        return all((batch, row) in self._rows for row in range(rows))

    def trajectories(self, batches: int) -> list[Trajectory]:
        """Returns the usable trajectories of the first `batches` batches, by batch and row."""
        rows = sorted(self._rows.items())
        return [row for (batch, _), row in rows if batch < batches and row is not None]

    def append(
        self, batch: int, rows: Sequence[int], trajectories: Sequence[Trajectory | None]
    ) -> None:
        """Stores the trajectories of the rows with numbers `rows` in the batch with number `batch`.

        None marks a row whose trajectory cannot be used; `holds` counts such a row as stored.
        """
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
    """Yields (text without the checksum, end offset in bytes) for each line of the file.

    Stops before the first line that is incomplete or damaged.
    """
    end = 0
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                return
            end += len(line)
            yield text.decode(), end
