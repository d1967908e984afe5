"""Trains, evaluates or runs a model, as a config file describes.

    python -m jexit.main --config=configs/COMMAND.py[:PRESET] [--workdir=DIR]
                         [--config.KEY=VALUE ...] [--aot=TOPOLOGY]
                         [--coordinator=HOST:PORT --processes=N --process=I] [--host_timeout=S]

COMMAND is pretrain, finetune, sft, rl, eval or generate. A run writes into its workdir (by default
runs/COMMAND-PRESET), and running the same command again continues the run. Each KEY is a field of
`Config` in jexit/config.py, such as seed, rl.depth_coef or model.path. --aot=v5e:4x4 (or v5p:2x2x1,
v6e:2x2, h100:8, …) does not run the command, but compiles its steps for that topology and prints
the resources that they need.

On several hosts, run the same command on each host. On Cloud TPU slices and under SLURM, the hosts
find each other. Elsewhere, --coordinator is an address of process 0, --processes is the number of
processes, and --process is the index of each host's process, from 0. --host_timeout is the number
of seconds that a host waits for another host.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

import jexit
from jexit.config import Config, check_key
from jexit.errors import UserError, command, report, say
from jexit.io import storage_errors
from jexit.settings import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The parsed command line: a checked config, the run's directory, and the values of the flags.

    `aot` is the topology to compile for, or None to run the config.
    """

    config: Config
    workdir: pathlib.Path
    aot: str | None
    coordinator: str | None
    processes: int | None
    process: int | None
    host_timeout: float


def parse(argv: Sequence[str]) -> Arguments:
    """Parses and checks the command line `argv`, whose first word is the program's name.

    A config file that is not in the working directory is looked up in jexit's installation. Raises
    UserError for every mistake in the command line.
    """
    argv, options = _without_task_options(_with_own_config(argv))
    for argument in argv[1:]:
        if not argument.startswith("-"):
            continue
        name, _, value = argument.lstrip("-").partition("=")
        if name.startswith("config."):
            check_key(name)
        # ml_collections would report a missing file only at the first setting, and at length.
        file = value.partition(":")[0]
        if name == "config" and file and not pathlib.Path(file).is_file():
            raise UserError(
                f"the config file {file} does not exist; give one such as configs/rl.py"
            )
    try:
        given = _flags(argv)
        rest = given(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error)) from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_refusal(error)) from error
    except (flags.Error, ValueError) as error:
        raise UserError(_one_line(error)) from error
    except Exception as error:  # a config file is the user's own code
        raise UserError(
            f"the config file raised an error ({type(error).__name__}: {_one_line(error)}); "
            "correct the file"
        ) from error
    if len(rest) > 1:
        raise UserError(
            f"argument {rest[1]!r} is not a flag; write options with two dashes and an equals "
            "sign, such as --config.seed=1"
        )
    if given.config is None:
        raise UserError(
            "the command line names no config file; give one, such as --config=configs/rl.py"
        )
    if not isinstance(given.config, ConfigDict):  # what ml_collections returns for a faulty file
        file = given["config"].config_filename
        raise UserError(
            f"the config file {file} cannot be read as a Python file that returns a config; "
            "correct it, or give another one, such as configs/rl.py"
        )
    values = given.config.to_dict()
    values["task"]["options"] |= options
    config = Config.from_dict(values)
    others = {field.name: given[field.name].value for field in dataclasses.fields(Arguments)}
    workdir = pathlib.Path(given.workdir or f"runs/{config.command}-{config.preset}")
    return Arguments(**others | {"config": config, "workdir": workdir})


def _with_own_config(argv: Sequence[str]) -> list[str]:
    """Returns the command line, with the config file replaced by the result of `_own_config`."""
    words = list(argv)
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config") and equals:
            words[index] = f"{flag}={_own_config(value)}"
        elif flag in ("--config", "-config") and index + 1 < len(argv):
            words[index + 1] = _own_config(argv[index + 1])
    return words


def _without_task_options(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separates the flags --config.task.options.NAME=VALUE from the rest of a command line.

    Returns (rest, options), where `options` maps each NAME to its VALUE. A VALUE that is a Python
    literal is evaluated, and any other VALUE remains a string.
    """
    words: list[str] = []
    options: dict[str, Any] = {}
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        before, is_option, name = flag.lstrip("-").rpartition("config.task.options.")
        if before or not is_option or not flag.startswith("-"):
            words.append(word)
            continue
        text = value if equals else next(rest, "")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[name] = text
    return words, options


def _own_config(value: str) -> str:
    """Returns `value`, which is FILE or FILE:PRESET, with FILE replaced by the path of the file.

    FILE is looked up in the working directory, in the installed package and in the checkout. If it
    is in none of them, `value` is returned unchanged.
    """
    file, colon, preset = value.partition(":")
    package = pathlib.Path(jexit.__file__).parent
    folders = (pathlib.Path(), package, package.parent)
    found = next((folder / file for folder in folders if (folder / file).is_file()), file)
    return f"{found}{colon}{preset}"


def _flags(argv: Sequence[str]) -> flags.FlagValues:
    """Returns jexit's flags, defined but not yet parsed; `argv` decides which settings get one."""
    known = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, such as configs/rl.py or configs/rl.py:qwen3-4b.",
        flag_values=known,
        sys_argv=list(argv),
    )
    for define, name, default, text in (
        (flags.DEFINE_string, "workdir", None, "Directory of the run; a rerun continues it."),
        (flags.DEFINE_string, "aot", None, "Compile for a topology, such as v5e:4x4; run nothing."),
        (flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0, for several hosts."),
        (flags.DEFINE_integer, "processes", None, "Number of processes, with --coordinator."),
        (flags.DEFINE_integer, "process", None, "Number of this process, with --coordinator."),
        (flags.DEFINE_float, "host_timeout", 600.0, "Seconds that a host waits for another."),
    ):
        define(name, default, text, flag_values=known)
    return known


def _unknown(error: flags.UnrecognizedFlagError) -> str:
    """Returns the error message for an unknown flag or a setting without the prefix `config.`."""
    setting = f"config.{error.flagname}"
    try:
        check_key(setting)
    except UserError:
        return _one_line(error)
    return f"--{error.flagname} is not an option, but a setting; use --{setting}"


def _refusal(error: flags.IllegalFlagValueError) -> str:
    """Returns the error message for an invalid flag value; for a setting, with the valid type."""
    name, _, rest = str(error).removeprefix("flag --").partition("=")
    if not name.startswith("config."):
        return _one_line(error)
    value = shown(rest.removesuffix(f": {error.__context__}"))
    kind = check_key(name)
    if dataclasses.is_dataclass(kind):
        return (
            f"{name} is {value}, but it must be a group of settings; set single ones, such as "
            f"{name}.KEY"
        )
    return f"{name} is {value}, but it must be of type {kind.__name__}; correct it"


def dispatch(config: Config, workdir: pathlib.Path, topology: str | None = None) -> None:
    """Runs `config.command` in `workdir`, or only compiles its steps if `topology` is given."""
    from jexit.dist import make_mesh, several_hosts, use_mesh
    from jexit.io.metrics import import_wandb
    from jexit.io.model_source import find_model
    from jexit.io.workdir import check_same_run, sole_run
    from jexit.loops import evaluate, finetune, generate, pretrain, rl, sft

    if topology is not None:
        from jexit.aot.preflight import preflight

        preflight(config, topology)
        return
    if config.command == "generate" and several_hosts():
        raise UserError(
            "the command generate runs on one host only, but this run has several; start it on one "
            "host, without --coordinator"
        )
    if config.command == "generate":
        generate.print_generations(config)
        return
    commands = {
        "pretrain": pretrain.pretrain,
        "finetune": finetune.finetune,
        "sft": sft.calibrate,
        "rl": rl.reinforce,
        "eval": evaluate.evaluate,
    }
    find_model(config.model.path)  # before a task is loaded, which may take minutes
    if config.log.wandb_project and config.command != "eval":
        import_wandb()  # before the run writes anything
    with sole_run(workdir), use_mesh(make_mesh(*dataclasses.astuple(config.mesh))):
        check_same_run(workdir, config)
        commands[config.command](config, workdir)


@command
def main(argv: Sequence[str]) -> int:
    """Parses and runs a command line, and returns the exit code.

    An expected error is reported in one sentence on stderr. An unexpected exception propagates on a
    single host; with several hosts, its traceback is printed and the process exits.
    """
    flags.FLAGS.mark_as_parsed()  # for absl's log handler; all flags keep their defaults
    logging.set_verbosity(logging.WARNING)
    storage_errors.say_once()
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    given = parse(argv)
    # Imported here, so that a wrong flag does not wait for jax.
    from jexit.dist import multihost, provide_threads
    from jexit.kernels import using

    provide_threads()
    code = 0
    try:
        if given.aot is None:
            multihost.initialize(
                given.coordinator, given.processes, given.process, timeout=given.host_timeout
            )
        with using(given.config.model.kernels):
            dispatch(given.config, given.workdir, given.aot)
        multihost.barrier("the end of the run")
    except Exception as error:
        found = _exit_code(error, given.workdir)
        if found is None and not multihost.several_hosts():
            raise
        if found is None:
            traceback.print_exception(error)
        code = found or UserError.exit_code
    if code and multihost.several_hosts():
        multihost.leave(code)
    return code


def _exit_code(error: Exception, workdir: pathlib.Path) -> int | None:
    """Reports an expected error on stderr and returns its exit code; returns None for others."""
    from jexit.dist import multihost

    if lost := multihost.ended(error):
        say(lost)
        return multihost.HostLost.exit_code
    return report(error, workdir)


def _one_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error).strip()
    if "Traceback (most recent call last)" in text:  # an error in a config file, reported as text
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv))
