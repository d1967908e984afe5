"""The command-line program `jexit`.

    jexit --config=configs/rl.py [--config.KEY=VALUE ...]        trains or evaluates
    jexit report WORKDIR ...                                     writes an HTML report on runs
    jexit compare DIR[@POLICY] DIR[@POLICY]                      compares two evaluations
    jexit convert from_hf --source=DIR_OR_HUB_ID --target=DIR    imports a Hugging Face model
    jexit convert to_hf --source=DIR --target=HF_DIR             exports a model to Hugging Face
    jexit sweep --config=FILE --into=DIR KEY=VALUE,VALUE ...     trains with a grid of settings
    jexit serve --model=DIR [--port=8000] [--policy=POLICY]      serves OpenAI's API over HTTP
    jexit doctor                                                 checks this machine

Each command is also a module: jexit.main, jexit.report, jexit.evaluation.compare, convert.from_hf,
convert.to_hf, jexit.sweep, jexit.serve and jexit.doctor.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from jexit.errors import say

MODULES = {
    "report": "jexit.report.__main__",
    "compare": "jexit.evaluation.compare",
    "convert from_hf": "convert.from_hf",
    "convert to_hf": "convert.to_hf",
    "sweep": "jexit.sweep.__main__",
    "serve": "jexit.serve.__main__",
    "doctor": "jexit.doctor.__main__",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` begins with, and returns the exit code.

    The rest of `argv` is passed to the `main` function of the command's module. If `argv` begins
    with a flag, all of `argv` is passed to `jexit.main`. `argv` defaults to `sys.argv[1:]`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if argv[0].startswith("-"):
        from jexit.main import main as run

        return run(["jexit", *argv])
    words = 2 if argv[0] == "convert" else 1
    command = " ".join(argv[:words])
    if command not in MODULES:
        within = [name for name in MODULES if name.startswith(f"{argv[0]} ")]
        near = difflib.get_close_matches(command, MODULES, 1)
        hint = f"use one of {', '.join(within or MODULES)}"
        if near and not within:
            hint = f"did you mean {near[0]}?"
        say(f"there is no command {command!r}; {hint}")
        return 1
    return importlib.import_module(MODULES[command]).main(argv[words:])
