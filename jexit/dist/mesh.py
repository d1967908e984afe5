"""The device mesh, and the placement of batches and parameters on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding

from jexit.dist.rules import AXES, constrain, data_axes, map_parameters, parameter_axes, spec
from jexit.errors import UserError

THREADS_A_DEVICE = 8


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
    """Makes a mesh of devices with the axes `data`, `fsdp` and `tensor`.

    The mesh uses the first data × fsdp × tensor of `devices` (None: all devices of the run), with
    neighbouring devices along `tensor`. Raises UserError if there are too few devices, or if a run
    on several hosts would leave some devices unused.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, tensor)
    wanted = math.prod(sizes)
    requested = (
        f"config.mesh requests {wanted} devices (data={data} × fsdp={fsdp} × tensor={tensor})"
    )
    if wanted > len(devices):
        raise UserError(f"{requested}, but this run has {len(devices)}; lower these sizes")
    if jax.process_count() > 1 and wanted < len(devices):
        raise UserError(
            f"{requested}, but the {jax.process_count()} hosts have {len(devices)} and must use "
            f"all of them; choose sizes whose product is {len(devices)}, such as "
            f"config.mesh.fsdp={len(devices)}"
        )
    if wanted < len(devices) and devices[0].platform != "cpu":
        logging.warning(
            "config.mesh uses %d of this machine's %d devices, so the others stay idle; to use all "
            "of them, choose sizes whose product is %d.",
            wanted,
            len(devices),
            len(devices),
        )
    devices = devices[:wanted]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def provide_threads() -> None:
    """Makes XLA start 8 threads per simulated CPU device; call this before JAX starts.

    XLA runs independent collectives at the same time, and each occupies one thread of every device
    until all devices have joined. With one thread per device, collectives can deadlock. If
    PJRT_NPROC is already set, it is kept.
    """
    pretended = re.search(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    if pretended and int(pretended[1]) > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS_A_DEVICE * int(pretended[1])))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Sets `mesh` for all code traced in this context; a mesh of one device changes nothing."""
    if mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh):
        yield


@dataclasses.dataclass(frozen=True)
class HostRows:
    """The rows of a batch that one host prepares, given by their indices in the whole batch.

    `total` is the number of rows of the whole batch, and `index_B` contains this host's indices in
    ascending order. `first_B` is False for rows that a lower-numbered host prepares too. A sum over
    all hosts that uses only rows with `first_B` counts each row once.
    """

    total: int
    index_B: np.ndarray
    first_B: np.ndarray

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Converts `rows`, indices in the whole batch, to positions among this host's rows.

        All of `rows` must be in `index_B`.
        """
        return np.searchsorted(self.index_B, rows)


def host_rows(total: int) -> HostRows:
    """Returns the rows of a batch of `total` rows that this host prepares and fetches.

    If `total` is not a multiple of the number of data shards, every host prepares all rows.
    """
    if jax.process_count() == 1:
        return HostRows(total, np.arange(total), np.ones(total, bool))
    return _host_rows(jax.sharding.get_mesh(), total)


@functools.lru_cache
def _host_rows(mesh: Mesh, total: int) -> HostRows:
    sharding = NamedSharding(mesh, spec("B", (total,), mesh))
    first_B = np.full(total, jax.process_count())
    here_B = np.zeros(total, bool)
    for device, (rows,) in sharding.devices_indices_map((total,)).items():
        first_B[rows] = np.minimum(first_B[rows], device.process_index)
        here_B[rows] |= device.process_index == jax.process_index()
    index_B = np.flatnonzero(here_B)
    return HostRows(total, index_B, first_B[index_B] == jax.process_index())


def place_rows(tree: Any, rows: HostRows | None = None) -> Any:
    """Places the arrays in `tree`, whose first axis is this host's rows, on the mesh.

    `rows` states which rows of the whole batch the arrays contain (None: all rows).
    """

    def place(array: np.ndarray) -> jax.Array:
        axes = "B" + "." * (np.ndim(array) - 1)
        if rows is None or len(rows.index_B) == rows.total:
            return _place(array, axes)
        shape = (rows.total, *np.shape(array)[1:])
        sharding = NamedSharding(jax.sharding.get_mesh(), spec(axes, shape))

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows.total)
            return array[rows.find(np.arange(start, stop))]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, tree)


def fetch_rows(tree: Any) -> Any:
    """Returns this host's rows (the first axis) of device arrays as NumPy arrays.

    If an array is spread over several hosts, only its first axis may be sharded.
    """

    def fetch(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return jax.device_get(array)
        parts = {}
        for shard in array.addressable_shards:
            rows, *other = shard.index
            assert all(part == slice(None) for part in other), "only rows may be divided"
            parts[rows.start or 0] = shard.data
        return np.concatenate([jax.device_get(parts[start]) for start in sorted(parts)])

    return jax.tree.map(fetch, tree)


def place_parameter(path: str, array: np.ndarray) -> jax.Array:
    """Places a parameter, given its dotted path, on the mesh; each device gets only its shard."""
    return _place(array, parameter_axes(path.split("."), np.ndim(array)))


def place_parameters(tree: Any) -> Any:
    """Places a tree of parameters (NumPy or JAX arrays) on the mesh, as `place_parameter` does."""
    return map_parameters(_place, tree)


def data_shards() -> int:
    """Returns the number of shards into which the current mesh divides the rows of a batch.

    Without a mesh, this is 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in data_axes())


@jax.jit
def gathered_width(tree: Any) -> Any:
    """Gathers parameters over the mesh axis `fsdp`, so that every device has the full model width.

    Gathering once saves time if the parameters are used many times, as for all tokens of a rollout.
    """
    return map_parameters(lambda leaf, axes: constrain(leaf, axes.replace("D", ".")), tree)


def _place(array: np.ndarray | jax.Array, axes: str) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.asarray(array)
    sharding = NamedSharding(jax.sharding.get_mesh(), spec(axes, np.shape(array)))
    if isinstance(array, jax.Array):
        if array.is_fully_addressable and jax.process_count() > 1:
            array = jax.device_get(array)
        else:
            return jax.device_put(array, sharding)
    return jax.make_array_from_callback(np.shape(array), sharding, lambda index: array[index])
