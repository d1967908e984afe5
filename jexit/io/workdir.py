"""A run's directory: which run it belongs to, and what its config was."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jexit.dist import barrier, gather, is_primary
from jexit.io.files import write_json_atomic

# Settings that may change when a run is continued: they do not alter what was computed before.
CONTINUABLE = ("steps", "mesh", "checkpoint", "log")
# What a run's exits are trained under, by its command: a section and the settings in it.
LAWS = {
    "sft": ("sft", ("sharpness", "target")),
    "rl": ("rl", ("min_hazard", "hazard_temperature")),
}


def check_same_run(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises ValueError when `workdir` holds a run with another config; writes nothing."""
    path = workdir / "config.json"
    if not path.exists():
        return
    stored = _read(path)
    if stored is None:
        raise ValueError(
            f"{path} is not readable as a JSON object; remove {workdir} to start over, or choose "
            "another --workdir"
        )
    wanted = json.loads(json.dumps(config))
    old, new = _flat(stored), _flat(wanted)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key.split(".")[0] not in CONTINUABLE:
            raise ValueError(
                f"{workdir} holds a run with config.{key}={old.get(key)}, and this one has "
                f"{new.get(key)}; choose another --workdir, or the same settings to continue it"
            )


def start_run(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Makes the directory and writes `config.json`; called when nothing can be refused any more.

    Raises ValueError as `check_same_run` does, and on a host that does not see what the primary
    host wrote.
    """
    check_same_run(workdir, config)
    path = workdir / "config.json"
    if is_primary():
        write_json_atomic(path, config)
    barrier("opening the workdir")
    blind = [host for host, sees in enumerate(gather("the workdir", path.exists())) if not sees]
    if blind:
        raise ValueError(
            f"host {blind[0]} does not see {path}, which host 0 wrote; give --workdir on a file "
            "system that all hosts share"
        )


def trained_law(directory: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """What the exits of the run in a directory were trained under: settings by section.

    A run of rl that went on from a calibration keeps what that one aimed at. Empty for a model that
    is no run's. Raises ValueError when it is one whose config.json cannot be
    read, or lacks them.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.exists():
        return {}
    config = _read(path)
    if config is None:
        raise ValueError(
            f"{path} is not readable as a JSON object, and holds what the model was trained under; "
            "bring it back, or give the path of the run's model/ to do without"
        )
    if (command := config.get("command")) not in LAWS:
        return {}
    section, names = LAWS[command]
    try:
        law = {section: {name: config[section][name] for name in names}}
        start = config["model"]["path"] if command == "rl" else None
    except (KeyError, TypeError):
        keys = " and ".join(f"{section}.{name}" for name in names)
        raise ValueError(
            f"{path} is of a run of {command} and lacks {keys}, under which it was trained; give "
            "the path of the run's model/ to do without"
        ) from None
    return law if start is None else trained_law(start) | law


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
