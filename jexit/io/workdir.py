"""Locks a run's directory, and checks that the directory belongs to a run with the same config."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

from flax.traverse_util import flatten_dict

from jexit.config import Config
from jexit.dist import barrier, from_primary, gather, is_primary
from jexit.errors import UserError
from jexit.io.files import (
    disk_errors,
    take_lock,
    to_jsonable,
    write_bytes_atomic,
    write_json_atomic,
)
from jexit.io.provenance import record_start
from jexit.tasks.references import code_hash
from jexit.untrusted import read_object

CODE = "task.sha256"  # of the file with a user's own task
LOCK = ".lock"  # the locked file, which names the process that holds the lock

# Settings that may change when a run is continued, as they do not affect the finished steps.
CONTINUABLE = (
    *("steps", "mesh", "log", "task.time_limit"),
    *(f"checkpoint.{name}" for name in ("every", "keep", "keep_best", "final")),
)


@contextlib.contextmanager
def sole_run(workdir: pathlib.Path) -> Iterator[None]:
    """Creates the run's directory `workdir` and locks it until the `with` block ends.

    A new directory that is still empty at the end of the block is removed. If the process is
    killed, the operating system releases the lock. With several hosts, the primary host takes the
    lock for all. Raises UserError on every host if another run has locked the directory, if the
    file system does not support locks, or if `workdir` is a file.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if is_primary():
            try:
                stack.enter_context(_locked(workdir))
            except ValueError as error:
                refusal = str(error)
        if refusal := from_primary("locking the workdir", refusal):
            raise UserError(refusal)
        yield


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file, but --workdir must be a directory; give another one")
    made = [directory for directory in (workdir, *workdir.parents) if not directory.exists()]
    path = workdir / LOCK
    with disk_errors(path):
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    with file:
        try:
            # A link count of 0: the run that held the lock has just removed the file.
            if not (
                take_lock(file, "choose a --workdir on another file system")
                and os.fstat(file.fileno()).st_nlink
            ):
                made = []  # it is the other run's to remove
                file.seek(0)
                holder = file.read(200).decode(errors="replace") or "another process"
                raise UserError(
                    f"{workdir} is in use by {holder}; wait for that run, stop it, or choose "
                    "another --workdir"
                )
            with disk_errors(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and os.listdir(workdir) == [LOCK]:
                    path.unlink()
                    for directory in made:
                        directory.rmdir()


def check_same_run(workdir: pathlib.Path, config: Config) -> None:
    """Raises UserError if `workdir` contains a run with another config or another task file.

    The settings in `CONTINUABLE` may differ. The number of steps may not if another phase of
    calibration follows them.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    stored = read_object(path, f"remove {workdir} to start over, or choose another --workdir")
    # A setting that a later version added had its present default then. Settings that a later
    # version removed are ignored.
    defaults = Config(command="rl").to_dict()
    new, old = (flatten_dict(to_jsonable(each), sep=".") for each in (config.to_dict(), defaults))
    old |= flatten_dict(stored, sep=".")
    for key in sorted(new.keys() | {key for key in old if key.startswith("task.options.")}):
        was, now = (each.get(key, "unset") for each in (old, new))
        if was != now and not {key, key.split(".")[0]} & set(CONTINUABLE):
            raise UserError(
                f"{workdir} contains a run with config.{key}={was}, but this run has {now}; choose "
                "another --workdir, or use the same settings to continue that run"
            )
    if config.sft.lens_steps and config.command == "sft" and old["steps"] != config.steps:
        raise UserError(
            f"{workdir} contains a run with config.steps={old['steps']}, but this run has "
            f"{config.steps}, and the phase of config.sft.lens_steps follows them; choose another "
            "--workdir, or use the same steps to continue that run"
        )
    code = workdir / CODE
    if code.exists() and code.read_text().strip() != code_hash(
        config.task.name, config.task.options
    ):
        raise UserError(
            f"{workdir} was started with another version of the task file {config.task.name}; "
            f"choose another --workdir, restore that version, or delete {code} to continue with "
            "this one"
        )


def start_run(workdir: pathlib.Path, config: Config) -> None:
    """Writes `config.json` to `workdir`, and records the start of the run.

    Call this after all other checks, because a run that is refused must not change any files.
    Raises UserError if `workdir` belongs to another run (see `check_same_run`), or if a host does
    not see the file that the primary host wrote.
    """
    check_same_run(workdir, config)
    path = workdir / "config.json"
    if is_primary():
        write_json_atomic(path, config.to_dict())
        if code := code_hash(config.task.name, config.task.options):
            write_bytes_atomic(workdir / CODE, code.encode())
        record_start(workdir)
    barrier("opening the workdir")
    blind = [host for host, sees in enumerate(gather("the workdir", path.exists())) if not sees]
    if blind:
        raise UserError(
            f"host {blind[0]} does not see {path}, which host 0 wrote; set --workdir to a "
            "directory on a file system that all hosts share"
        )
