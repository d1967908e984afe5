"""Records the time and the version of jexit at every start of a run, in `starts.jsonl`."""

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
    """One start of a run: its UTC time as YYYY-MM-DD HH:MM, and the version of jexit.

    `commit` is the git commit of the checkout that ran, with "-dirty" added if files were edited,
    or "" for an installed jexit.
    """

    time: str
    version: str
    commit: str


def record_start(workdir: Path) -> None:
    """Appends the current time and code version as a line to `starts.jsonl` in `workdir`."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    start = Start(time=now, version=jexit.__version__, commit=_commit())
    path = workdir / STARTS_FILE
    with disk_errors(path), path.open("ab") as file:
        file.write(json_line(dataclasses.asdict(start)))


def read_starts(workdir: Path) -> tuple[Start, ...]:
    """Returns the starts of the run in `workdir`, oldest first; () if none were recorded.

    Invalid lines are skipped.
    """
    names = [field.name for field in dataclasses.fields(Start)]
    return tuple(
        Start(**{name: line[name] for name in names})
        for line in read_json_lines(workdir / STARTS_FILE, "remove it")
        if isinstance(line, dict) and all(isinstance(line.get(name), str) for name in names)
    )


def _commit() -> str:
    """Returns the git commit of jexit's checkout, or "" if there is no checkout."""
    checkout = Path(jexit.__file__).parents[1]
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
