"""The numbers that a finished run left behind, under paths such as `after/accuracy`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jexit import untrusted


def read_json(path: pathlib.Path) -> Any:
    """A JSON file; ValueError in a sentence that names it where there is none."""
    try:
        return untrusted.read_json(path, "delete it and run it again")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; delete {path.parent} and run it again") from None


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """`read_json` of an object; raises ValueError for another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; delete it and run it again")
    return value


def figures(workdir: pathlib.Path, evaluation: pathlib.Path | None) -> dict[str, float]:
    """Every number that a finished run left behind, by a path such as `after/accuracy`.

    `evaluation` is the `eval.json` that belongs to it. Raises ValueError for a file that is none of
    a run's.
    """
    found: dict[str, float] = {}
    for stage in ("before", "after"):
        path = workdir / f"{stage}.json"
        if path.exists():
            found |= _numbers(stage, read_object(path))
    return found if evaluation is None else found | _evaluated(evaluation)


def _evaluated(path: pathlib.Path) -> dict[str, float]:
    """The numbers of an `eval.json`, under their policy."""
    evaluation = read_object(path)
    found: dict[str, float] = {}

    def entries(part: str, *names: str) -> list[dict[str, Any]]:
        return _entries(evaluation, part, names, path)

    for run in entries("runs", "policy"):
        found |= _numbers(run["policy"], run)
    for pair in entries("controls", "policy", "control"):
        found |= _numbers(f"{pair['policy']} less {pair['control']}", pair)
    for pair in entries("faithfulness_paired", "policy", "against", "measure"):
        place = f"{pair['policy']} less {pair['against']}/faithfulness/{pair['measure']}"
        found |= _numbers(place, pair)
    for part in ("faithfulness", "capacity", "begun_steps", "hazards"):
        for entry in entries(part, "policy"):
            place = f"{entry['policy']}/{part}"
            if "granularity" in entry:
                place = f"{place}/{entry['granularity']}"
            measures = _entries(entry, "measures", ("name",), path)
            found |= _numbers(place, {measure["name"]: measure for measure in measures} or entry)
    return found


def _entries(
    owner: Mapping[str, Any], part: str, names: Sequence[str], path: pathlib.Path
) -> list[dict[str, Any]]:
    """A list of objects with texts of these names; empty for what was not measured."""
    found = owner.get(part) or []
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in names)
        for entry in found
    ):
        raise ValueError(
            f"{path}: {part} is no list of objects with the texts {', '.join(names)}; delete the "
            "file and run it again"
        )
    return found


def _numbers(place: str, value: Any) -> dict[str, float]:
    """Numbers of nested dictionaries; intervals become `.../low` and `.../high`."""
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, int | float):
        return {place: value}
    if isinstance(value, Mapping):
        parts = [_numbers(f"{place}/{key}", part) for key, part in value.items()]
        return {key: number for part in parts for key, number in part.items()}
    if isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value)):
        return {f"{place}/low": value[0], f"{place}/high": value[1]}
    return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
