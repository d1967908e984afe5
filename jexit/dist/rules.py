"""The logical axes of every array, and the mesh axes over which each logical axis is sharded.

A logical axis is a letter, such as D for the model width. An axis is sharded only if the mesh axes
divide its size: Qwen3's 8 key/value heads stay whole on every device with `tensor=16`, and so does
every array on a mesh of one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# Keys are letters of jexit.axes; an axis with a dot, or a letter missing here, is not divided.
# Rows lie over both data axes. Weights lie over fsdp along the model width and over tensor along
# what the width is projected to, so that one all-reduce follows each pair of projections.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "V": ("tensor",),
    "D": ("fsdp",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
}

# Axes of the parameters, by the end of their path in the model.
PARAMETERS: dict[tuple[str, ...], str] = {
    ("embed", "embedding"): "VD",
    ("head", "kernel"): "VD",
    ("q", "kernel"): "LDNH",
    ("k", "kernel"): "LDKH",
    ("v", "kernel"): "LDKH",
    ("o", "kernel"): "LNHD",
    ("gate", "kernel"): "LDF",
    ("up", "kernel"): "LDF",
    ("down", "kernel"): "LFD",
    ("q", "bias"): "LNH",
    ("k", "bias"): "LKH",
    ("v", "bias"): "LKH",
    ("q", "lora_a"): "LDR",
    ("k", "lora_a"): "LDR",
    ("v", "lora_a"): "LDR",
    ("o", "lora_a"): "LNHR",
    ("gate", "lora_a"): "LDR",
    ("up", "lora_a"): "LDR",
    ("down", "lora_a"): "LFR",
    ("q", "lora_b"): "LRNH",
    ("k", "lora_b"): "LRKH",
    ("v", "lora_b"): "LRKH",
    ("o", "lora_b"): "LRD",
    ("gate", "lora_b"): "LRF",
    ("up", "lora_b"): "LRF",
    ("down", "lora_b"): "LRD",
    ("update", "kernel"): "LDF",  # of continuations, or [L, R, D] with a rank
    ("reduce", "kernel"): "LDR",
    ("exits", "w1"): "EDF",
    ("exits", "b1"): "EF",
    ("exits", "w2"): "EF",
}


def spec(axes: str, shape: Sequence[int], mesh: Any = None) -> P:
    """Returns the partition spec of an array whose logical axes are the letters of `axes`.

    An axis is sharded only if the mesh axes divide its size. `mesh` defaults to the mesh that
    `jax.set_mesh` has set.
    """
    sizes = free_axes(jax.sharding.get_abstract_mesh()) if mesh is None else dict(mesh.shape)
    entries: list[tuple[str, ...] | None] = []
    for letter, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(letter, ()) if sizes.get(name, 1) > 1)
        divides = names and size % math.prod(sizes[name] for name in names) == 0
        entries.append(names if divides else None)
    return P(*entries)


def free_axes(mesh: Any) -> dict[str, int]:
    """Returns the sizes of the mesh axes by name, without axes that are manual in a `shard_map`."""
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def divides(mesh: Any) -> bool:
    """Checks whether the mesh axes that are not manual in a `shard_map` have several devices."""
    return not mesh.empty and math.prod(free_axes(mesh).values()) > 1


def data_axes() -> tuple[str, ...]:
    """Returns the names of the current mesh's axes that shard rows, without axes of size 1."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else free_axes(mesh)
    return tuple(name for name in RULES["B"] if sizes.get(name, 1) > 1)


def parameter_axes(path: Sequence[str], ndim: int) -> str:
    """Returns the logical axes of a parameter or its optimiser moment, one letter per axis.

    The last two names of `path` decide. Arrays with other names get only dots; a dot stands for an
    axis that is never sharded.
    """
    axes = PARAMETERS.get(tuple(path[-2:]), "." * ndim)
    return axes if len(axes) == ndim else "." * ndim


def constrain(array: jax.Array, axes: str) -> jax.Array:
    """Constrains the sharding of an intermediate array with the logical axes `axes`.

    Without a mesh of several devices, the array is returned unchanged.
    """
    if not divides(jax.sharding.get_abstract_mesh()):
        return array
    return jax.lax.with_sharding_constraint(array, spec(axes, array.shape))


def constrain_parameters(tree: Any) -> Any:
    """Constrains a tree of parameters, moments or gradients to the sharding of the parameters.

    As a result, a step does not move these arrays between devices.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: constrain(leaf, parameter_axes(names_of(path), leaf.ndim)), tree
    )


def names_of(path: tuple) -> list[str]:
    """Returns the keys and attribute names of a JAX tree path as strings."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
