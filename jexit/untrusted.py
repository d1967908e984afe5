"""Files that others may have written: what is read of them is bounded, and JSON is what it says."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 28
MAX_DEPTH = 64
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_json(path: str | os.PathLike[str], remedy: str) -> Any:
    """The value in a JSON file.

    Raises FileNotFoundError where there is none, and ValueError, which ends in `remedy`, for what
    is no regular file, cannot be read, or is refused by `parse_json`.
    """
    try:
        return parse_json(_read_bytes(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error


def read_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """`read_json` of an object; raises ValueError for another value."""
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; {remedy}")
    return value


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    Raises ValueError that says what is wrong with it: besides what is no JSON at all that is
    nesting below `MAX_DEPTH`, a number that no finite float holds, and a key that an object has
    twice, of which one reader takes the first and another the last.
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
    """Raises ValueError for what must not lie in a model directory, at its top or in `folders`.

    That is whatever is neither a file nor a directory, as reading it might never end, and a link
    that leads elsewhere: what was copied here would decide which file of this machine is read. The
    Hugging Face hub's cache keeps its files as links to a model's `blobs`.
    """
    root = directory.resolve()
    paths = [path for path in directory.iterdir() if not path.is_dir()]
    for folder in folders:
        paths += [directory / folder, *(directory / folder).rglob("*")]
    for path in sorted(paths):
        if not path.exists():  # a link to nothing is as good as no file
            continue
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is {_kind(path.stat())}, not a file; remove it")
        target = path.resolve()
        if not (target.is_relative_to(root) or _of_hub_cache(target)):
            raise ValueError(
                f"{path} is a link to {target}, outside of its directory; put the file itself "
                "there, or give the directory that holds it"
            )


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    # Without O_NONBLOCK a named pipe would have to be written to before it is open.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{_kind(found)}, not a file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    return data


def _kind(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "something else")


def _of_hub_cache(target: Path) -> bool:
    blobs, model = target.parent, target.parent.parent
    return blobs.name == "blobs" and model.name.startswith("models--")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} twice in one object")
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
        raise ValueError(f"the number {text[:20]}, which is not finite")
    return number
