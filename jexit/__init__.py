"""Stochastic early exits for language models, trained so that reasoning moves into the text.

`load` reads a model directory. `forward` and `generate` run the model under a policy that decides
where tokens exit: `Full`, `Fixed`, `Prescribed`, `Sample`, `Threshold` or `Speculate`. `rows_task`
makes a task from your rows and reward functions. Each name is imported on first use, so that code
that does not need JAX (tasks, tokenizer, report) loads without JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jexit.config import EngineSize
    from jexit.io.model_dir import load
    from jexit.model.policies import Fixed, Full, Policy, Prescribed, Sample, Speculate, Threshold
    from jexit.model.transformer import Output, Transformer, forward
    from jexit.rollout.texts import generate, stream
    from jexit.tasks.rows import rows_task

    __version__: str

_MODULES = {
    "EngineSize": "jexit.config",
    "Fixed": "jexit.model.policies",
    "Full": "jexit.model.policies",
    "Output": "jexit.model.transformer",
    "Policy": "jexit.model.policies",
    "Prescribed": "jexit.model.policies",
    "Sample": "jexit.model.policies",
    "Speculate": "jexit.model.policies",
    "Threshold": "jexit.model.policies",
    "Transformer": "jexit.model.transformer",
    "forward": "jexit.model.transformer",
    "generate": "jexit.rollout.texts",
    "load": "jexit.io.model_dir",
    "rows_task": "jexit.tasks.rows",
    "stream": "jexit.rollout.texts",
}

__all__ = [
    "EngineSize",
    "Fixed",
    "Full",
    "Output",
    "Policy",
    "Prescribed",
    "Sample",
    "Speculate",
    "Threshold",
    "Transformer",
    "__version__",
    "forward",
    "generate",
    "load",
    "rows_task",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("jexit")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
