"""Small files that are whole or absent, JSON that any reader takes, locks, disk errors."""

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
    """Writes a file of a directory that itself appears whole or not at all."""
    path.write_bytes(json_line(value, indent=2))


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON so that `path` is at any moment absent, the old file or the new one.

    Raises UserError when the disk refuses the write (the old file is then untouched) or when the
    value holds something that is no JSON.
    """
    write_bytes_atomic(path, json_line(value, indent=2))


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` through a temporary file beside `path`; raises UserError as above."""
    path = Path(path)
    # A fixed name: what a killed process left behind is overwritten by the next one.
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
    """Waits until a file's contents, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into the one sentence that the user needs."""
    try:
        yield
    except OSError as error:
        raise UserError(disk_message(path, error)) from error


def disk_message(path: Path, error: OSError) -> str:
    """What could not be written, why, and what to do about it."""
    remedy = "free some space" if error.errno in DISK_FULL else "make it writable"
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; {remedy}, or choose another place"


def take_lock(file: IO[Any], remedy: str) -> bool:
    """Locks an open file for as long as this process, or one that inherits the file, lives.

    False when another holds the lock. Raises UserError, which ends in `remedy`, on a file system
    without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # of some shared file systems
        raise UserError(f"{file.name} cannot be locked ({error}); {remedy}") from error
    return True


def json_line(value: Any, indent: int | None = None) -> bytes:
    """`value` as JSON that ends a line; raises UserError when it holds what is no JSON."""
    text = json.dumps(to_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="replace")


def to_jsonable(value: Any) -> Any:
    """`value` with arrays as lists, paths as text and non-finite numbers as None."""
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
        "numbers, text, lists or dictionaries"
    )
