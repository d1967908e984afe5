"""The mesh of devices, and batches spread over it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jexit.dist.rules import AXES, names_of, parameter_axes, spec


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`, neighbours along `tensor` the closest.

    Takes as many of the devices as the sizes ask for. Raises ValueError when there are fewer.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, tensor)
    wanted = math.prod(sizes)
    if wanted > len(devices):
        raise ValueError(
            f"config.mesh asks for data {data} × fsdp {fsdp} × tensor {tensor} = {wanted} devices "
            f"and there are {len(devices)}; lower the sizes"
        )
    devices = devices[:wanted]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Everything traced inside is divided over the mesh; one device needs no dividing."""
    if mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def place_rows(tree: Any) -> Any:
    """Host arrays with rows on their first axis, as device arrays spread over the data axes."""
    return jax.tree.map(lambda array: _place(array, "B" + "." * (np.ndim(array) - 1)), tree)


def place_parameter(path: str, array: np.ndarray) -> jax.Array:
    """A parameter, named by its dotted path, as the rules have it; never whole on one device."""
    return _place(array, parameter_axes(path.split("."), np.ndim(array)))


def place_parameters(tree: Any) -> Any:
    """The same of a tree of parameters that are on this host's devices already."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(leaf, parameter_axes(names_of(path), leaf.ndim)), tree
    )


def _place(array: np.ndarray | jax.Array, axes: str) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.asarray(array)
    sharding = NamedSharding(jax.sharding.get_mesh(), spec(axes, np.shape(array)))
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(np.shape(array), sharding, lambda index: array[index])
