"""Makes tasks from short names, or from the files or modules that define them."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jexit.errors import MissingFile, UserError
from jexit.settings import checked, shown
from jexit.tasks.base import Rewards, Task
from jexit.tasks.user_code import guard_methods, user_code

# Short names of jexit's own tasks, in place of MODULE:NAME.
ALIASES = {
    "blend": "jexit.tasks.blend:task",
    "exploretom": "jexit.tasks.exploretom:task",
    "gsm8k": "jexit.tasks.gsm8k:task",
    "sums": "jexit.tasks.sums:task",
    "tom": "jexit.tasks.tom.task:task",
    "word_problems": "jexit.tasks.word_problems:task",
}


def make_task(
    name: str,
    path: str | os.PathLike[str] | None = None,
    /,
    *,
    rewards: Rewards | None = None,
    **options: Any,
) -> Task:
    """Makes the task called `name`, which is a value of the setting `config.task.name`.

    `name` is a short name in `ALIASES`, or FILE.py:NAME or MODULE:NAME for a user's own task. NAME
    (by default `task`) refers to a `Task`, or to a callable that returns one when it is called with
    `options`. `path` is the file or folder for a task that reads files. If `name` is `tom` and a
    path is given, the task is `exploretom`, which reads the same kind of problem from files.
    `rewards` is passed to a callable whose parameter `rewards` is annotated with `Rewards`, and is
    ignored otherwise. Raises UserError if the name, the file or an option is wrong.
    """
    found = _found("exploretom" if path and name == "tom" else name)
    if isinstance(found, Task):
        surplus = sorted(options) + (["path"] if path else [])
        if surplus:
            raise UserError(
                f"{name} is already a Task, so it does not take {_option(surplus[0])}; make it a "
                "function that takes this argument and returns the Task, or leave the setting out"
            )
        return _named(found, name)
    if not callable(found):
        raise UserError(
            f"{name} is {shown(found)}, but it must be a jexit.tasks.Task or a function that "
            "returns one; change config.task.name"
        )
    known, others = _keywords(found)
    if path:
        if "path" not in known and not others:
            raise UserError(
                f"config.task.path is {str(path)!r}, but task {name!r} does not read files; leave "
                "config.task.path empty"
            )
        options["path"] = path
    if rewards is not None and Rewards in (hint := known.get("rewards"), *typing.get_args(hint)):
        options["rewards"] = rewards
    for option, value in options.items():
        if known.get(option) in (bool, int, float, str):
            options[option] = checked(known[option], value, _option(option))
        elif option not in known and not others:
            names = ", ".join(sorted(set(known) - {"path", "rewards"}))
            remedy = f"use one of {names}" if names else "leave it out, because the task has none"
            raise UserError(f"task {name!r} has no option {option!r}; {remedy}")
    with user_code(f"task {name!r} cannot be made", _file_of(found)):
        made = found(**options)
    if inspect.iscoroutine(made):
        made.close()
    if not isinstance(made, Task):
        raise UserError(
            f"{name} returned {shown(made)}, but it must return a jexit.tasks.Task, such as the "
            "result of jexit.rows_task(...)"
        )
    return _named(made, name)


def _named(task: Task, name: str) -> Task:
    """Returns `task`, whose name becomes `name` if it was empty.

    In a user's task, exceptions become UserErrors (see `guard_methods`).
    """
    task.name = task.name or name
    guard_methods(task)
    return task


def known_options(name: str) -> set[str]:
    """Returns the keywords that the callable `name` accepts; empty if `name` refers to a `Task`."""
    found = _found(name)
    return set() if isinstance(found, Task) else set(_keywords(found)[0])


def code_hash(name: str, options: Mapping[str, Any]) -> str:
    """Returns the SHA-256 hash of the source file that defines a user's own task, in hexadecimal.

    For a blend, the hash covers the files of the tasks in `options["parts"]`. Imported modules and
    data are not covered. For jexit's own tasks, the result is an empty string.
    """
    blends = ALIASES.get(name, name) == ALIASES["blend"]
    parts = options.get("parts", ()) if blends else (name,)
    own = [part for part in ([parts] if isinstance(parts, str) else parts) if part not in ALIASES]
    files = [inspect.getsourcefile(_module(part.rpartition(":")[0] or part)) for part in own]
    texts = [pathlib.Path(file).read_bytes() for file in files if file]
    return hashlib.sha256(b"\0".join(texts)).hexdigest() if texts else ""


def _found(name: str) -> Any:
    reference = ALIASES.get(name, name)
    where, _, attribute = reference.rpartition(":")
    if not where:
        where, attribute = attribute, "task"
    if where == name and not where.endswith(".py") and "." not in where:
        raise UserError(
            f"there is no task {shown(name)}; set config.task.name to one of "
            f"{', '.join(sorted(ALIASES))}, or to FILE.py:NAME or MODULE:NAME for your own task"
        )
    module = _module(where)
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise UserError(
            f"{where} has no {attribute!r}, only {', '.join(public) or 'nothing'}; name a "
            "jexit.tasks.Task that it contains, as in FILE.py:NAME"
        )
    return getattr(module, attribute)


def _module(where: str) -> types.ModuleType:
    if where.endswith(".py"):
        path = pathlib.Path(where).expanduser()
        if not path.is_file():
            raise MissingFile(
                f"the task file {where} does not exist; give an absolute path, or one relative to "
                f"{pathlib.Path.cwd()}, where the command runs"
            )
        return _from_file(path.resolve(), path.read_bytes())
    _importable(pathlib.Path.cwd())
    with user_code(f"the module {where} cannot be imported", None):
        return importlib.import_module(where)


@functools.lru_cache(maxsize=16)
def _from_file(path: pathlib.Path, source: bytes) -> types.ModuleType:
    """Returns the file `path`, which contains `source`, as a module; executes it only once."""
    digest = hashlib.sha256(source).hexdigest()[:16]
    name = f"jexit_task_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _importable(path.parent)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    with user_code(f"the task file {path} cannot be read", str(path)):
        exec(compile(source, str(path), "exec"), vars(module))
    return module


def _importable(folder: pathlib.Path) -> None:
    """Makes the modules in `folder` importable, as Python does for the folder of a script."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _keywords(found: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Returns (annotation of each parameter of `found`, whether it has a `**` parameter).

    A parameter without an annotation has None. Returns ({}, True) if the signature cannot be read.
    """
    try:
        parameters = inspect.signature(found).parameters.values()
        makes = found.__init__ if isinstance(found, type) else found
        hints = typing.get_type_hints(makes, include_extras=True)
    except (ValueError, TypeError, NameError):
        return {}, True
    known = {p.name: hints.get(p.name) for p in parameters if p.kind is not p.VAR_KEYWORD}
    return known, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _option(name: str) -> str:
    return "config.task.path" if name == "path" else f"config.task.options.{name}"


def _file_of(found: Any) -> str | None:
    try:
        return inspect.getsourcefile(found)
    except TypeError:
        return None
