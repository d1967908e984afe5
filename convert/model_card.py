"""The model card of an export: base model, task, settings, results, and how to load the model."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

from jexit.config import COMMANDS
from jexit.errors import MissingFile, UserError
from jexit.io.hub import is_hub_id
from jexit.io.model_source import ModelSource
from jexit.report.runs import default_settings, settings
from jexit.results import Evaluation, PolicyResult
from jexit.untrusted import read_object

CARD = "README.md"

_TEMPLATE = pathlib.Path(__file__).with_name("model_card.md.jinja")
_REMEDY = "restore this record of how the model was made"
# Settings that do not matter to a user of the model, such as paths and time limits.
_LEFT_OUT = (
    *("command", "preset", "model.", "task.name", "task.path"),
    *("checkpoint.", "log.", "mesh.", "eval."),
)


def model_card(
    source: str, model: ModelSource, *, name: str, adapter: bool, evaluation: str = ""
) -> str:
    """Returns the text of the model card for an export of the model at `source`.

    `name` is OWNER/NAME or the name of the export's directory, and `adapter` says whether the
    export contains only a PEFT adapter. The results are read from `evaluation`, an `eval.json` or
    its directory, or else from the evaluation of the run that made the model, if there is one.
    Raises MissingFile if `evaluation` does not exist, and UserError if the results are damaged or
    belong to a model with other layers or exits.
    """
    from huggingface_hub import EvalResult, ModelCardData

    run = _run_of(pathlib.Path(source))
    found = _evaluation(evaluation, run)
    measured = Evaluation.read(found) if found else None
    arch, stages = model.architecture, list(_stages(run))
    own = (arch.layers, model.exit_layers)
    if measured and (measured.model.layers, measured.model.exits) != own:
        raise UserError(
            f"{found} has the results of {measured.model.path} ({measured.model.layers} layers, "
            f"exits {measured.model.exits}), but {source} has {arch.layers} layers and the exits "
            f"{model.exit_layers}; give the evaluation of {source}"
        )
    results = measured.runs if measured else ()
    task = _task_name(measured.task["name"]) if measured else ""
    metadata = ModelCardData(
        base_model=model.source if is_hub_id(model.source) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["jexit", "early-exit", "arxiv:2603.21376"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=f"{task}, {measured.split}",
                metric_type="accuracy",
                metric_name=f"accuracy, {result.policy}",
                metric_value=round(result.accuracy, 4),
            )
            for result in results
        ]
        or None,
    )
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(_TEMPLATE.read_text("utf-8"))
    exits = ", ".join(map(str, model.exit_layers))
    return template.render(
        metadata=metadata.to_yaml(),
        name=name,
        family=arch.family,
        architecture=f"A {arch.family} model of {arch.layers} layers × {arch.width}",
        exits=f"layers {exits}" if exits else "none: it has no exit heads",
        adapter=adapter,
        stages=stages,
        task=task,
        split=measured.split if measured else "",
        measured=_measured_name(measured) if measured else "",
        problems=results[0].problems if results else 0,
        results=[_row(result) for result in results],
    )


def _run_of(source: pathlib.Path) -> pathlib.Path | None:
    """Returns the directory of the run that made the model at `source`, or None if none did.

    `source` is the directory of a run or its subdirectory `model`.
    """
    return next((d for d in (source, source.parent) if _command(d / "config.json")), None)


def _command(config: pathlib.Path) -> str:
    values = read_object(config, _REMEDY) if config.is_file() else {}
    return str(values.get("command", ""))


def _evaluation(given: str, run: pathlib.Path | None) -> pathlib.Path | None:
    if given:
        path = pathlib.Path(given)
        path = path / "eval.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingFile(
                f"there is no evaluation at {path}; give an eval.json that configs/eval.py has "
                "written, or its directory"
            )
        return path
    places = (run / "eval" / "eval.json", run / "eval.json") if run else ()
    return next(filter(pathlib.Path.is_file, places), None)


def _stages(run: pathlib.Path | None) -> Iterator[Mapping[str, Any]]:
    """Yields a description of each run that led to the model, the last of which is `run`.

    A description contains the command of the run, the model from which it started, its task, and
    the settings that differ from their defaults.
    """
    if run is None:
        return
    config = read_object(run / "config.json", _REMEDY)
    start = str(config.get("model", {}).get("path", ""))
    if (before := pathlib.Path(start)) != run:
        yield from _stages(_run_of(before))
    others = tuple(f"{c}." for c in COMMANDS if c != config["command"])
    own, defaults = settings(config), default_settings(config) or {}
    changed = [
        (key, value)
        for key, value in own.items()
        if key in defaults | {k: 0 for k in own if k.startswith("task.options.")}
        and defaults.get(key) != value
        and not key.startswith((*_LEFT_OUT, *others))
    ]
    yield {
        "command": config["command"],
        "start": start if is_hub_id(start) else pathlib.Path(start).name,
        "task": _task_name(own.get("task.name", "")),
        "settings": [(key, _cell(_public(value))) for key, value in changed],
    }


def _measured_name(measured: Evaluation) -> str:
    """Returns the name of the measured model: that of its run or, without a run, its directory."""
    parts = pathlib.Path(measured.model.path).parts
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]


def _task_name(name: Any) -> str:
    """Returns the name of a task; for a path, only the file's name, because paths are private."""
    return pathlib.Path(str(name)).name


def _public(value: Any) -> Any:
    """Returns a setting in which each path is cut to its last part, as directories are private."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_public, value))
    is_path = isinstance(value, str) and "/" in value and not value.startswith("hf:")
    return _task_name(value) if is_path and len(value.split()) == 1 else value


def _cell(value: Any) -> str:
    return repr(value).replace("|", "\\|").replace("`", "'")


def _row(result: PolicyResult) -> Mapping[str, str]:
    layers = result.layers_per_problem
    return {
        "policy": result.policy,
        "accuracy": _share(result.accuracy, result.accuracy_ci95),
        "depth": _share(result.depth_fraction, result.depth_fraction_ci95),
        "layers": "–" if math.isnan(layers) else _number(layers, result.layers_per_problem_ci95),
        "tokens": f"{result.completion_length:.1f}",
    }


def _share(value: float, interval: tuple[float, ...] | None) -> str:
    ends = f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else ""
    return f"{100 * value:.1f} %{ends}"


def _number(value: float, interval: tuple[float, ...] | None) -> str:
    ends = f" ({interval[0]:.0f}–{interval[1]:.0f})" if interval else ""
    return f"{value:.0f}{ends}"
