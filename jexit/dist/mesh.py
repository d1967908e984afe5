"""The mesh of devices, and batches spread over it."""

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

from jexit.dist.rules import AXES, constrain, data_axes, names_of, parameter_axes, spec
from jexit.errors import UserError

THREADS_A_DEVICE = 8


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`, neighbours along `tensor` the closest.

    Takes as many of the devices as the sizes ask for; of several hosts it must take all. Raises
    ValueError when there are fewer, or some would be left over.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, tensor)
    wanted = math.prod(sizes)
    if wanted > len(devices):
        raise UserError(
            f"config.mesh asks for data {data} × fsdp {fsdp} × tensor {tensor} = {wanted} devices "
            f"and there are {len(devices)}; lower the sizes"
        )
    if jax.process_count() > 1 and wanted < len(devices):
        raise UserError(
            f"config.mesh asks for data {data} × fsdp {fsdp} × tensor {tensor} = {wanted} devices "
            f"and the {jax.process_count()} hosts have {len(devices)}; make the product "
            f"{len(devices)}, such as config.mesh.fsdp={len(devices)}"
        )
    if wanted < len(devices) and devices[0].platform != "cpu":
        logging.warning(
            "config.mesh asks for %d of this machine's %d devices; the others stay idle, unless "
            "the product of its sizes is %d.",
            wanted,
            len(devices),
            len(devices),
        )
    devices = devices[:wanted]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def provide_threads() -> None:
    """Gives the CPU devices that XLA_FLAGS pretends enough threads; before JAX looks for devices.

    XLA runs independent collectives at once, and each of them holds a thread of every device until
    all have joined: with one thread a device they can wait for each other for ever.
    """
    pretended = re.search(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    if pretended and int(pretended[1]) > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS_A_DEVICE * int(pretended[1])))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Everything traced inside is divided over the mesh; one device needs no dividing."""
    if mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh):
        yield


@dataclasses.dataclass(frozen=True)
class HostRows:
    """Which of a batch's rows this host holds.

    `index_B` are their numbers in the whole batch, rising; `first_B` says for each whether this is
    the first host that holds it, so that a sum over hosts counts no row twice. A batch that does
    not divide over the data axes lies whole on every host.
    """

    total: int
    index_B: np.ndarray
    first_B: np.ndarray

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Where rows, by their numbers in the whole batch, stand among this host's."""
        return np.searchsorted(self.index_B, rows)


def host_rows(total: int) -> HostRows:
    """The rows of a batch of `total` that this host prepares, and gets back."""
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
    """This host's arrays, rows on their first axis, as device arrays spread over the data axes.

    `rows` says which rows of the whole batch they are; None: all of them.
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


def fetch_rows(tree: Any, axis: int = 0) -> Any:
    """This host's rows of device arrays, as NumPy arrays; `axis` is the one with the rows."""

    def fetch(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return jax.device_get(array)
        parts = {}
        for shard in array.addressable_shards:
            other = [s for a, s in enumerate(shard.index) if a != axis]
            assert all(s == slice(None) for s in other), "only rows may be divided"
            parts[shard.index[axis].start or 0] = shard.data
        return np.concatenate([jax.device_get(parts[start]) for start in sorted(parts)], axis)

    return jax.tree.map(fetch, tree)


def place_parameter(path: str, array: np.ndarray) -> jax.Array:
    """A parameter, named by its dotted path, as the rules have it; never whole on one device."""
    return _place(array, parameter_axes(path.split("."), np.ndim(array)))


def place_parameters(tree: Any) -> Any:
    """The same of a whole tree, whose arrays may lie on this host's devices already."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(leaf, parameter_axes(names_of(path), leaf.ndim)), tree
    )


def data_shards() -> int:
    """Parts that the mesh that is set divides rows into."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in data_axes())


@jax.jit
def gathered_width(tree: Any) -> Any:
    """Parameters that lie over `fsdp` along the model width, whole along it on every device.

    Once for many uses, such as the tokens of a rollout.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: constrain(
            leaf, parameter_axes(names_of(path), leaf.ndim).replace("D", ".")
        ),
        tree,
    )


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
