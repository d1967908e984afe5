"""Writes a directory, such as a model or an export, either completely or not at all.

The checkpoints of a run are written by Orbax (see `jexit.io.checkpoint`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from jexit.errors import DISK_FULL, UserError, disk_message
from jexit.io.files import disk_errors, flush


@contextlib.contextmanager
def atomic_directory(
    target: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[pathlib.Path]:
    """Yields a new empty directory, and renames it to `target` when the `with` block ends.

    All files are flushed to disk before the rename. With `overwrite`, the new directory replaces an
    existing one. If the block raises an error, the new directory is removed, and an existing one
    stays. Raises UserError if `target` is a file, if it cannot be written, or if it is not empty
    and `overwrite` is False.
    """
    target = pathlib.Path(target).absolute()
    _check_target(target, overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    # Fixed names, so that the next run removes the directories that a killed run left behind.
    partial = target.parent / f".{target.name}.partial"
    previous = target.parent / f".{target.name}.previous"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors(target):
            partial.mkdir()
        yield partial
        for path in (partial, *partial.rglob("*")):
            flush(path)
        shutil.rmtree(previous, ignore_errors=True)
        if target.exists():
            target.rename(previous)
        partial.rename(target)
        flush(target.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if previous.exists() and not target.exists():
            previous.rename(target)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        # Other errors may come from files that the block reads.
        if isinstance(error, OSError) and error.errno in (*DISK_FULL, errno.EROFS):
            raise UserError(disk_message(target, error)) from error
        raise


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(
            f"{target} is a file, but it must be a new or empty directory; give another one"
        )
    if not overwrite and any(target.iterdir()):
        raise UserError(
            f"{target} is not empty, but it must be a new or empty directory; give another one, or "
            "remove this one first"
        )
