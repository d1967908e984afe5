"""Helpers for files: atomic writes, standard JSON and locks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jexit.errors import UserError, disk_message


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, not atomically; meant for files in an `atomic_directory`."""
    path.write_bytes(json_line(value, indent=2))


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` to `path` as indented JSON; see `write_bytes_atomic` and `to_jsonable`."""
    write_bytes_atomic(path, json_line(value, indent=2))


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to a temporary file in the same directory, and renames the file to `path`.

    Creates missing parent directories. Raises UserError, and leaves an existing file unchanged, if
    `path` cannot be written.
    """
    path = Path(path)
    # A fixed name, so that the next process overwrites the file that a killed process left behind.
    partial = path.parent / f".{path.name}.partial"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        flush(path.parent)  # the new name, too, survives a power cut


def flush(path: Path) -> None:
    """Waits until the contents of a file, or the entries of a directory, are on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError in the `with` block into a UserError with the text of `disk_message`."""
    try:
        yield
    except OSError as error:
        raise UserError(disk_message(path, error)) from error


def take_lock(file: IO[Any], remedy: str) -> bool:
    """Tries to lock an open file; returns False if another process holds the lock, otherwise True.

    The lock ends when this process, and every child process that inherited the open file, has
    closed the file or ended. Raises UserError, with a message that ends in `remedy`, if the file
    system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # of some shared file systems
        raise UserError(
            f"{file.name} cannot be locked ({error.strerror or error}); {remedy}"
        ) from error
    return True


def json_line(value: Any, indent: int | None = None) -> bytes:
    """Returns `value` as JSON text in UTF-8 that ends with a newline; see `to_jsonable`."""
    text = json.dumps(to_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="replace")


def to_jsonable(value: Any) -> Any:
    """Returns `value` with arrays as lists, paths as strings and non-finite numbers as None.

    Raises UserError for an object of any other type that JSON cannot represent.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    raise UserError(
        f"{value!r} of type {type(value).__name__} cannot be written as JSON; convert it to "
        "numbers, strings, lists or dictionaries"
    )
