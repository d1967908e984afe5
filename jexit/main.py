"""Command line of jexit.

    python -m jexit.main --config=configs/COMMAND.py[:PRESET] [--workdir=DIR]
                         [--config.KEY=VALUE ...] [--aot=TOPOLOGY]

COMMAND is pretrain, sft, rl, eval or generate. A run writes into its workdir (runs/COMMAND-PRESET
unless given), and the same command again continues it. Each KEY is a field of `Config` in
jexit/config.py, such as seed, rl.depth_coef or model.path. --aot=v5e:4x4 (or v5p:2x2x1, v6e:2x2,
h100:8, …) runs nothing: it compiles the config's steps for that topology and says what they need.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jexit.config import Config, check_key

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/rl.py or configs/rl.py:qwen3-4b."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; a rerun continues it. Default: runs/COMMAND-PRESET."
)
AOT = flags.DEFINE_string("aot", None, "Compile for a topology such as v5e:4x4; run nothing.")

USER_ERROR, INTERRUPTED = 1, 3


def parse(argv: Sequence[str]) -> tuple[Config, pathlib.Path, str | None]:
    """The checked config, the run's directory and the topology to compile for, if any.

    Raises ValueError for whatever is wrong.
    """
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith("config."):
            check_key(name)
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, OSError, SyntaxError) as error:
        raise ValueError(_one_line(error)) from error
    if len(rest) > 1:
        raise ValueError(f"argument {rest[1]!r} is not a flag; options look like --config.seed=1")
    if CONFIG.value is None:
        raise ValueError("there is no config; give one such as --config=configs/rl.py")
    if not isinstance(CONFIG.value, ConfigDict):  # what ml_collections makes of a file in error
        file = flags.FLAGS["config"].config_filename
        raise ValueError(f"the config file {file} cannot be read; give one such as configs/rl.py")
    config = Config.from_dict(CONFIG.value)
    workdir = pathlib.Path(WORKDIR.value or f"runs/{config.command}-{config.preset}")
    return config, workdir, AOT.value


def dispatch(config: Config, workdir: pathlib.Path, topology: str | None = None) -> None:
    """Runs the config's command, or compiles its steps for a topology."""
    # Imported here, so that a wrong flag does not wait for jax.
    from jexit.dist import make_mesh, use_mesh
    from jexit.io.workdir import check_same_run
    from jexit.loops import evaluate, pretrain, rl, sft

    if topology is not None:
        from jexit.aot.preflight import preflight

        preflight(config, topology)
        return
    if config.command == "generate":
        evaluate.print_generations(config)
        return
    check_same_run(workdir, config.to_dict())
    commands = {
        "pretrain": pretrain.pretrain,
        "sft": sft.calibrate,
        "rl": rl.reinforce,
        "eval": evaluate.evaluate,
    }
    with use_mesh(make_mesh(*dataclasses.astuple(config.mesh))):
        commands[config.command](config, workdir)


def main(argv: Sequence[str]) -> int:
    """Parses, runs, and turns a user's mistake into one sentence and an exit code."""
    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    try:
        dispatch(*parse(argv))
    except (ValueError, FileNotFoundError) as error:
        if _is_internal(error):
            raise
        print(f"jexit: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except RuntimeError as error:
        from jexit.aot.preflight import DoesNotFit
        from jexit.loops.trainer import Diverged, Interrupted

        if not isinstance(error, (Diverged, DoesNotFit, Interrupted)):
            raise
        print(f"jexit: {error}", file=sys.stderr)
        return INTERRUPTED if isinstance(error, Interrupted) else USER_ERROR
    return 0


def _is_internal(error: BaseException) -> bool:
    """Whether the error was raised by a library below jexit: a fault, whose traceback matters."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return not module.startswith(("jexit", "convert", "__main__"))


def _one_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error).strip()
    if "Traceback (most recent call last)" in text:  # an error in a config file, told as text
        text = re.sub(r"^\w+: ", "", text.splitlines()[-1])
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv))
