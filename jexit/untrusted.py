"""Reads untrusted files safely: regular files only, and strict JSON of limited size and depth."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jexit.errors import MissingFile, UserError

MAX_BYTES = 1 << 26  # of JSON, which takes up to twenty times as much memory
MAX_DEPTH = 64
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_json(path: str | os.PathLike[str], remedy: str) -> Any:
    """Returns the value in a JSON file of at most `MAX_BYTES` bytes.

    Raises the errors of `read_bytes`, and UserError if `parse_json` rejects the text. The messages
    end in `remedy`.
    """
    data = read_bytes(path, remedy, MAX_BYTES)
    try:
        return parse_json(data)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from error


def read_bytes(path: str | os.PathLike[str], remedy: str, limit: int | None = None) -> bytes:
    """Returns the contents of a regular file.

    Raises MissingFile if the file does not exist. Raises UserError if the path is a directory, a
    pipe or a device, if the file is larger than `limit` bytes (None: no limit), or if it cannot be
    read. The messages end in `remedy`, which says what the user can do, except if the user lacks
    the permission to read the file.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{path} is {_kind(found)}, not a file; {remedy}")
            if limit is not None and found.st_size > limit:
                raise UserError(
                    f"{path} is larger than {limit >> 20} MiB, the most that jexit reads; {remedy}"
                )
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist; {remedy}") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def read_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """Reads a JSON file like `read_json`; raises UserError if the value is not an object."""
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise UserError(f"{path} contains a JSON {type(value).__name__}, not an object; {remedy}")
    return value


def read_json_lines(path: str | os.PathLike[str], remedy: str) -> Iterator[Any]:
    """Yields the value of each line of a JSON Lines file, or nothing if the file does not exist.

    Skips lines that are incomplete or not valid JSON. Raises UserError if the file cannot be read.
    """
    try:
        lines = read_bytes(path, remedy).splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            if line.endswith(b"\n"):
                yield parse_json(line)


def parse_json(data: bytes) -> Any:
    """Returns the value of a JSON text in UTF-8, with or without a byte order mark.

    Raises ValueError, with the reason, if the text is not JSON, is nested deeper than `MAX_DEPTH`,
    or contains NaN, a number beyond the range of a float, or duplicate keys (of which some readers
    use the first value and others the last).
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def check_files(directory: Path, folders: Iterable[str] = ()) -> None:
    """Raises UserError for special files in a model directory, and for links that lead out of it.

    Reading a pipe or a device may never end, and a downloaded directory must not choose which of
    this machine's files are read. Checks the top level of `directory` and everything in its
    subdirectories `folders`. Links to the `blobs` of a model in the Hugging Face hub's cache are
    allowed, because the cache consists of such links.
    """
    root = directory.resolve()
    paths = [path for path in directory.iterdir() if not path.is_dir()]
    for folder in folders:
        paths += [directory / folder, *(directory / folder).rglob("*")]
    for path in sorted(paths):
        if not path.exists():  # a dangling link counts as absent
            continue
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is {_kind(path.stat())}, not a file; remove it")
        target = path.resolve()
        if not (target.is_relative_to(root) or _of_hub_cache(target)):
            raise UserError(
                f"{path} is a link to {target}, which is outside its directory; put the file "
                "itself there, or give the directory that contains it"
            )


def _kind(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "something else")


def _of_hub_cache(target: Path) -> bool:
    blobs, model = target.parent, target.parent.parent
    return blobs.name == "blobs" and model.name.startswith("models--")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, entry in pairs:
        if key in value:
            raise ValueError(f"duplicate key {key[:40]!r}")
        value[key] = entry
    return value


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _integer(text: str) -> int:
    _finite(text)
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number
