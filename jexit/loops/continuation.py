"""Fits the linear continuation, one map per skipped layer, by ridge regression.

The fit uses the residuals of the model on the teacher's trajectories.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array
from jexit.config import Config
from jexit.dist import (
    arrays_from_primary,
    data_shards,
    host_rows,
    is_primary,
    place_parameters,
    place_rows,
    waiting,
    whole,
)
from jexit.dist.rules import names_of
from jexit.errors import UserError
from jexit.io.progress import Progress
from jexit.loops.stage import Stage
from jexit.loops.trajectories import Trajectories, rows_of_batch
from jexit.steps.ridge import RidgeSums, fit, make_sums_step
from jexit.steps.state import Params

HELD_BACK = 8  # one batch in every 8 is held back to choose the strength of the ridge
_WHAT = "the continuation's fit"


def fitted_continuation(stage: Stage, trajectories: Trajectories, trainable: Params) -> Params:
    """Returns `trainable` with a linear continuation that is fitted by ridge regression.

    Returns `trainable` unchanged if the continuation is frozen, or if its maps are no longer the
    identity, because adapters may then have learnt to work with these maps. The fit uses every
    trajectory once, except for a remainder smaller than a batch. Raises UserError if there are too
    few trajectories.
    """
    flat = {
        tuple(names_of(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    update = ("blocks", "continuation", "update")
    kernel, bias = (*update, "kernel"), (*update, "bias")
    if kernel not in flat:
        return trainable
    if any(whole(jax.jit(jnp.any)(flat[name]), _WHAT) for name in (kernel, bias)):
        return trainable
    sums, held_back = _sums(stage, trajectories, trainable)
    layers = stage.split.student(stage.split.trainable).arch.layers
    rank = stage.config.exits.continuation_rank
    found = fit(sums, held_back, stage.exit_layers, layers, rank=rank)
    # Every host has solved, so that none waits; different machines may round differently.
    *maps, b_LD = (
        np.stack([arrays_from_primary(_WHAT, matrix) for matrix in stacked])
        for stacked in (*found.maps, found.b_LD)
    )
    names = (("blocks", "continuation", "reduce", "kernel"), kernel) if rank else (kernel,)
    fitted = dict(zip(names, maps, strict=True)) | {bias: b_LD}
    if is_primary():
        tokens, first = int(sums.count + held_back.count), stage.exit_layers[0]
        shares = ", ".join(f"{1 - share:.2f}" for share in found.unexplained_L)
        print(
            f"Fitted a linear continuation on {tokens:,} tokens. The fraction of the held-back "
            f"updates' variance that it explains, layer by layer from layer {first}, is: {shares}"
        )

    def chosen(path: tuple, leaf: Array) -> Array:
        return jnp.asarray(fitted.get(tuple(names_of(path)), leaf), leaf.dtype)

    return place_parameters(jax.tree_util.tree_map_with_path(chosen, trainable))


def rows_at_a_time(config: Config, rows: int) -> int:
    """Returns the rows per batch of a fit to `rows` rows of trajectories (see `Trajectories`).

    The result is a multiple of the number of data shards: at most the rows of a training batch and
    an eighth of `rows`, but at least one row per shard.
    """
    shards = data_shards()
    return max(1, min(rows_of_batch(config), rows // HELD_BACK) // shards) * shards


def check_enough(config: Config, rows: int) -> None:
    """Raises UserError if `rows` rows of trajectories are too few for the fit."""
    size = rows_at_a_time(config, rows)
    if rows < 2 * size:
        raise UserError(
            f"config.sft.pool is {config.sft.pool} (prompts with trajectories: {rows}), but the "
            f"fit of the continuation needs at least 2 batches of {size} prompts; set "
            f"config.sft.pool to {2 * size * config.sft.completions} or more"
        )


def _sums(
    stage: Stage, trajectories: Trajectories, trainable: Params
) -> tuple[RidgeSums, RidgeSums]:
    """Returns the `RidgeSums` over the batches for fitting and those over the held-back batches.

    One batch in every `HELD_BACK` is held back. The arrays are NumPy's. Raises UserError if the
    trajectories fill fewer than 2 batches.
    """
    config, split = stage.config, stage.split
    check_enough(config, len(trajectories))
    arch, size = split.student(split.trainable).arch, rows_at_a_time(config, len(trajectories))
    batches = len(trajectories) // size
    add, here = make_sums_step(split), host_rows(size)
    sums = RidgeSums.zero(stage.exit_layers, arch.layers, arch.width)

    def added(sums: RidgeSums, step: int) -> RidgeSums:
        batch, _ = trajectories.batch(step, here)
        batch = place_rows(batch, here)
        with waiting(_WHAT):
            return add(sums, trainable, split.fixed, batch)

    with Progress(batches, description=_WHAT) as progress:
        held_back = list(range(0, batches, HELD_BACK))
        for step in range(batches):
            if step not in held_back:
                sums = added(sums, step)
                progress.update(step + 1)
        other = sums.cleared()
        for step in held_back:
            other = added(other, step)
        progress.update(batches)
    return _fetched(sums), _fetched(other)


def _fetched(sums: RidgeSums) -> RidgeSums:
    """Returns the sums as NumPy arrays on every host.

    Hosts gather one matrix at a time, because all of them would not fit on a device.
    """
    matrix_of = jax.jit(lambda stacked, i: stacked[i])  # outside jit a host has only its own part

    def fetched(stacked: Array) -> np.ndarray:
        if stacked.ndim < 3:
            return whole(stacked, _WHAT)
        return np.stack([whole(matrix_of(stacked, i), _WHAT) for i in range(len(stacked))])

    return jax.tree.map(fetched, sums)
