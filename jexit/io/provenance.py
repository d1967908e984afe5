"""Records in `starts.jsonl`, one line per start, when a run was started and by which version."""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
from pathlib import Path

import jexit
from jexit.io.files import disk_errors, json_line
from jexit.untrusted import read_json_lines

STARTS_FILE = "starts.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run.

    `time` is in UTC. `commit` is the commit of the checkout that ran, or "" for an installed jexit.
    """

    time: str
    version: str
    commit: str


def record_start(workdir: Path) -> None:
    """Appends a line to a run's `starts.jsonl`; a run that was continued has several lines."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    start = Start(time=now, version=jexit.__version__, commit=_commit())
    path = workdir / STARTS_FILE
    with disk_errors(path), path.open("ab") as file:
        file.write(json_line(dataclasses.asdict(start)))


def read_starts(workdir: Path) -> tuple[Start, ...]:
    """Returns the starts of a run in order, and skips lines that do not describe a start.

    Raises UserError if the file cannot be read.
    """
    names = [field.name for field in dataclasses.fields(Start)]
    return tuple(
        Start(**{name: line[name] for name in names})
        for line in read_json_lines(workdir / STARTS_FILE, "remove it")
        if isinstance(line, dict) and all(isinstance(line.get(name), str) for name in names)
    )


def _commit() -> str:
    """Returns the commit of jexit's checkout, marked if files were edited, or an empty string."""
    checkout = Path(jexit.__file__).parents[1]
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
