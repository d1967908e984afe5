"""Logical axes of every array, and the mesh axes that each of them is divided over.

An axis is divided only where its size divides: Qwen3's 8 key/value heads on `tensor=16` stay whole
on every device, and so does everything on a mesh of one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# By the letters of jexit.axes; a letter that is missing here, or a dot, is divided over nothing.
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
    """Partition spec of an array with these logical axes (default mesh: the one in context)."""
    sizes = free_axes(jax.sharding.get_abstract_mesh()) if mesh is None else dict(mesh.shape)
    entries: list[tuple[str, ...] | None] = []
    for letter, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(letter, ()) if sizes.get(name, 1) > 1)
        divides = names and size % math.prod(sizes[name] for name in names) == 0
        entries.append(names if divides else None)
    return P(*entries)


def free_axes(mesh: Any) -> dict[str, int]:
    """Sizes of the axes that arrays can still be divided over: not those of a `shard_map` around."""
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def divides(mesh: Any) -> bool:
    """Whether there is anything to divide over."""
    return not mesh.empty and math.prod(free_axes(mesh).values()) > 1


def data_axes() -> tuple[str, ...]:
    """The axes that divide rows on the mesh that is set, as far as they do."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else free_axes(mesh)
    return tuple(name for name in RULES["B"] if sizes.get(name, 1) > 1)


def parameter_axes(path: Sequence[str], ndim: int) -> str:
    """Logical axes of a parameter, or of an optimiser's moment of it, by the end of its path."""
    axes = PARAMETERS.get(tuple(path[-2:]), "." * ndim)
    return axes if len(axes) == ndim else "." * ndim


def constrain(array: jax.Array, axes: str) -> jax.Array:
    """Pins an intermediate array with these logical axes to the mesh that is set, if any."""
    if not divides(jax.sharding.get_abstract_mesh()):
        return array
    return jax.lax.with_sharding_constraint(array, spec(axes, array.shape))


def constrain_parameters(tree: Any) -> Any:
    """Pins parameters, moments and gradients, so that a step returns them where it found them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: constrain(leaf, parameter_axes(names_of(path), leaf.ndim)), tree
    )


def names_of(path: tuple) -> list[str]:
    """A tree path's keys and attributes."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
