"""Writes atomic checkpoints of a run in the background (Orbax); keeps the newest and the best."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jexit.config import CheckpointConfig
from jexit.dist import gather
from jexit.errors import UserError
from jexit.io.files import disk_errors
from jexit.io.fingerprint import digests
from jexit.io.finite import not_finite
from jexit.io.storage_errors import reason

_CHECKSUMS = "digests"  # of each leaf, in the checkpoint's own metadata
_SCORE = "score"  # a checkpoint's only metric: higher is better


class Checkpoints:
    """The checkpoints of a run, each a pytree of arrays in `WORKDIR/checkpoints/STEP/`.

    Each array is stored under its path in the pytree, such as `params/kernel`. If a checkpoint
    cannot be read (truncated, corrupted), `restore` logs a warning and tries the one before it.
    Checkpoints are written in the background. If a write fails, UserError is raised at once by
    `save`, or later by the next `save`, `wait` or `close`.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        self.directory = pathlib.Path(workdir).resolve() / "checkpoints"
        self.every = config.every
        kept = [ocp.checkpoint_managers.LatestN(config.keep)]
        if config.keep_best:
            best = {"n": config.keep_best, "keep_checkpoints_without_metrics": False}
            kept.append(ocp.checkpoint_managers.BestN(get_metric_fn=_score, **best))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
            # Needed for scores to be written; the policy above decides which checkpoints are kept.
            best_fn=_score if config.keep_best else None,
            create=True,
            cleanup_tmp_directories=True,  # what a killed save left behind
        )
        with disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                # Without this, item_metadata is empty before the first save or restore.
                item_handlers=ocp.StandardCheckpointHandler(),
            )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def newest(self, step: int) -> int | None:
        """Returns the step of the newest checkpoint up to `step`, or None if there is none."""
        return max((stored for stored in self._manager.all_steps() if stored <= step), default=None)

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def save(self, step: int, tree: Any, score: float | None = None) -> None:
        """Starts writing the pytree `tree` as the checkpoint of `step`, if there is none yet.

        `score` (higher is better) decides whether the checkpoint is kept as one of the best.
        Without a score, it is kept only as one of the newest. Raises UserError if an array on the
        devices contains NaN or infinity, because the new checkpoint could replace a good one. Also
        raises UserError if this write or an earlier one has failed.
        """
        if step in self._manager.all_steps():
            return
        named = _named(tree)
        on_device = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array)}
        if broken := not_finite(on_device):
            raise UserError(
                f"{broken[0]} contains NaN or infinity after step {step}, so no checkpoint of that "
                f"step is written to {self.directory}; lower the learning rates config.optim.*_lr"
            )
        with self._write_errors():
            self._manager.save(
                step,
                args=ocp.args.StandardSave(named),
                metrics=None if score is None else {_SCORE: score},
                # The storage detects missing bytes, but not corrupted ones.
                custom_metadata={_CHECKSUMS: digests(named)},
            )

    def best_step(self) -> int | None:
        """Returns the step of the latest checkpoint with the highest score; None without scores."""
        return self._manager.best_step()

    def restore(self, like: Any, step: int | None = None) -> Any | None:
        """Returns the newest readable checkpoint, or None if no checkpoint exists.

        The result has the structure, shapes, dtypes and shardings of the pytree `like`. With
        `step`, only the checkpoint of that step is tried. Otherwise, checkpoints are tried from the
        newest to the oldest. Newer checkpoints that cannot be read are deleted once an older one
        has been read. If one host cannot read a checkpoint, no host uses it. Raises UserError if a
        checkpoint contains other parameters than `like`, or if checkpoints exist but none can be
        read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        failures = []
        to_shape = ocp.utils.to_shape_dtype_struct
        wanted = {name: to_shape(leaf) for name, leaf in _named(like).items()}
        for step in steps:
            self._check_same_parameters(step, wanted)
            failure = ""
            try:
                named = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
                self._check_bytes(step, named)
            except Exception as error:  # Orbax raises many kinds for damaged files
                failure = str(error) or type(error).__name__
            reasons = [text for text in gather(f"reading checkpoint {step}", failure) if text]
            if reasons:
                logging.warning(
                    "Checkpoint %s cannot be read (%s).", self.directory / str(step), reasons[0]
                )
                failures.append(step)
                continue
            if failures:
                logging.warning("Resuming from the earlier checkpoint of step %d.", step)
            for failed in failures:
                self._manager.delete(failed)
            return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in wanted])
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self.directory} can be read; remove the "
                "directory to start over, or choose another --workdir"
            )
        return None

    def _check_same_parameters(self, step: int, abstract: dict[str, Any]) -> None:
        try:
            stored = self._manager.item_metadata(step)
            there = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        except Exception:  # damaged metadata: restore reports it
            return
        here = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
        for name in sorted(there | here) if there else ():
            if there.get(name) != here.get(name):
                stored, wanted = (
                    f"has shape {shapes[name]}" if name in shapes else "is missing"
                    for shapes in (there, here)
                )
                raise UserError(
                    f"the parameter {name} {stored} in the checkpoint "
                    f"{self.directory / str(step)}, but it {wanted} in this config; use the config "
                    "of the checkpoint, or another --workdir"
                )

    def _check_bytes(self, step: int, named: dict[str, Any]) -> None:
        try:
            stored = self._manager.metadata(step).custom_metadata[_CHECKSUMS]
        except Exception:  # none were saved, or the metadata is damaged and the arrays may not be
            return
        altered = [name for name, sum_ in digests(named).items() if sum_ != stored.get(name)]
        if altered:
            raise UserError(f"{altered[0]} differs from the array that was saved")

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many kinds when a write fails
            raise UserError(
                f"a checkpoint cannot be written to {self.directory} ({reason(error)}); free some "
                "space or make the directory writable, then run the same command again (earlier "
                "checkpoints are intact)"
            ) from error

    def wait(self) -> None:
        """Waits until every started save is on disk; raises UserError if a save has failed."""
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _score(metrics: dict[str, float]) -> float:
    return metrics[_SCORE]


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree as arrays by path, such as `params/kernel`, in tree order."""
    arrays = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves)
    return {
        name: leaf if isinstance(leaf, arrays) else np.asarray(leaf) for name, leaf in named.items()
    }
