"""Helpers for files: atomic writes, standard JSON, locks and messages for disk errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jexit.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, not atomically; for files in a directory that appears atomically."""
    path.write_bytes(json_line(value, indent=2))


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON to `path`, which is at any moment absent, the old file or the new one.

    Raises UserError if the disk refuses the write (the old file is then unchanged), or if the value
    contains something that JSON cannot represent.
    """
    write_bytes_atomic(path, json_line(value, indent=2))


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` through a temporary file beside `path`, which is then renamed to `path`.

    Raises UserError if the disk refuses the write; the old file is then unchanged.
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
    """Waits until a file's contents, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a UserError with the sentence of `disk_message`."""
    try:
        yield
    except OSError as error:
        raise UserError(disk_message(path, error)) from error


def disk_message(path: Path, error: OSError) -> str:
    """Returns a sentence with the path that cannot be written, the reason and the remedy."""
    remedy = "free some space" if error.errno in DISK_FULL else "make it writable"
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; {remedy}, or choose another place"


def take_lock(file: IO[Any], remedy: str) -> bool:
    """Locks an open file until it is closed, by this process and by every process that inherits it.

    The lock also ends when these processes end. Returns False if another process has the lock.
    Raises UserError, which ends in `remedy`, on a file system that does not support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # of some shared file systems
        raise UserError(f"{file.name} cannot be locked ({error}); {remedy}") from error
    return True


def json_line(value: Any, indent: int | None = None) -> bytes:
    """Returns `value` as JSON that ends with a newline.

    Raises UserError if the value contains something that JSON cannot represent.
    """
    text = json.dumps(to_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="replace")


def to_jsonable(value: Any) -> Any:
    """Returns `value` with arrays as lists, paths as strings and non-finite numbers as None."""
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
