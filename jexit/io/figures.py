"""The numbers that a finished run left behind, under paths such as `after/accuracy`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def read_json(path: pathlib.Path) -> Any:
    """A JSON file; ValueError in a sentence that names it where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; delete {path.parent} and run it again") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it and run it again") from None


def figures(workdir: pathlib.Path, evaluation: pathlib.Path | None) -> dict[str, float]:
    """Every number that a finished run left behind, by a path such as `after/accuracy`.

    `evaluation` is the `eval.json` that belongs to it.
    """
    found: dict[str, float] = {}
    for stage in ("before", "after"):
        path = workdir / f"{stage}.json"
        if path.exists():
            found |= _numbers(stage, read_json(path))
    return found if evaluation is None else found | _evaluated(read_json(evaluation))


def _evaluated(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an `eval.json`, under their policy."""
    found: dict[str, float] = {}
    for run in evaluation["runs"]:
        found |= _numbers(run["policy"], run)
    for pair in evaluation.get("controls", ()):
        found |= _numbers(f"{pair['policy']} less {pair['control']}", pair)
    for pair in evaluation.get("faithfulness_paired", ()):
        place = f"{pair['policy']} less {pair['against']}/faithfulness/{pair['measure']}"
        found |= _numbers(place, pair)
    for part in ("faithfulness", "capacity", "begun_steps", "hazards"):
        for entry in evaluation.get(part, ()):
            place = f"{entry['policy']}/{part}"
            if "granularity" in entry:
                place = f"{place}/{entry['granularity']}"
            measures = {measure["name"]: measure for measure in entry.get("measures", ())}
            found |= _numbers(place, measures or entry)
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
