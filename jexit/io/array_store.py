"""Stores each parameter on disk as an Orbax checkpoint of its own, to limit the use of memory.

At most one parameter is in memory twice at any time; a single checkpoint of all parameters would
need about three times their memory. The name of a parameter is its dotted path in the parameter
tree, such as `blocks.attn.q.kernel`.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from jexit.errors import UserError
from jexit.io.finite import all_finite
from jexit.io.storage_errors import reason
from jexit.io.tensor_files import Spec

_ITEM = "array"
_CHUNK_BYTES = 32 << 20


class ArrayStore:
    """A directory that stores arrays by name, each in its own Orbax checkpoint."""

    def __init__(self, directory: pathlib.Path):
        self.directory = pathlib.Path(directory)

    def names(self) -> list[str]:
        """Returns the names of the stored arrays; [] if the directory does not exist."""
        if not self.directory.is_dir():
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if entry.is_dir())

    def write(self, name: str, array: np.ndarray) -> None:
        """Stores `array` as `name`; raises UserError for NaN, infinity or a failed write."""
        if not all_finite(array):
            raise UserError(
                f"the parameter {name} contains NaN or infinity, so it is not written to "
                f"{self.directory}; save a model whose parameters are all finite"
            )
        path = (self.directory / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {_ITEM: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)}
        args = ocp.args.PyTreeSave({_ITEM: array}, save_args=options)
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(path, args=args)
        except Exception as error:  # Orbax raises many kinds when a write fails
            raise UserError(
                f"the parameter {name} cannot be written to {self.directory} ({reason(error)}); "
                "free some space, make it writable or choose another place"
            ) from error

    def spec(self, name: str) -> Spec:
        """Returns the shape and dtype of the array `name`, without reading its values.

        Raises UserError if the array's metadata is damaged.
        """
        path = (self.directory / name).resolve()
        try:
            # The checkpointer's own `metadata` logs damage instead of raising an error.
            found = _handler().metadata(path).tree[_ITEM]
            return Spec(tuple(found.shape), np.dtype(found.dtype))
        except Exception as error:  # Orbax raises many kinds for damaged files
            raise UserError(self._damaged(name, error)) from error

    def read(self, name: str) -> np.ndarray:
        """Returns the stored array `name`; raises UserError if it is damaged or not finite."""
        path = (self.directory / name).resolve()
        restore = {_ITEM: ocp.RestoreArgs(restore_type=np.ndarray)}
        try:
            with _checkpointer() as checkpointer:
                tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))
        except Exception as error:  # Orbax raises many kinds for damaged files
            raise UserError(self._damaged(name, error)) from error
        if not all_finite(tree[_ITEM]):
            raise UserError(
                f"the parameter {name} in {self.directory} contains NaN or infinity; copy or "
                "convert the model directory again, or use a model whose training did not diverge"
            )
        return tree[_ITEM]

    def _damaged(self, name: str, error: Exception) -> str:
        return (
            f"the parameter {name} in {self.directory} cannot be read ({reason(error)}); copy or "
            "convert the model directory again"
        )


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(_handler(), multiprocessing_options=_this_process())


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Compression hardly shrinks weights, but takes most of the time and a second copy. Small chunks
    # avoid a second copy on reading.
    return ocp.PyTreeCheckpointHandler(
        use_compression=False, multiprocessing_options=_this_process()
    )


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Returns options for Orbax to read and write on this host without waiting for other hosts."""
    if not jax.distributed.is_initialized():
        return ocp.options.MultiprocessingOptions()
    host = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"host{host}"
    )
