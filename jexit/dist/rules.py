"""The logical axes of every array, and the mesh axes over which each logical axis is sharded.

A logical axis is a letter, such as D for the model width. It is sharded only if its size is a
multiple of the size of its mesh axes. With `tensor=16`, for example, every device has all 8
key/value heads of Qwen3. On a mesh of one device, no axis is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jexit.kernels.shards import TOKEN_AXES, VOCAB_AXIS

AXES = ("data", "fsdp", "tensor")

# Keys are letters of jexit.axes. A dot, or a letter that is missing here, is never sharded. Batch
# rows are sharded over both data axes; weights over fsdp along the model width, and over tensor
# along the other axis, so that each pair of projections needs one all-reduce.
RULES: dict[str, tuple[str, ...]] = {
    "B": TOKEN_AXES,
    "V": (VOCAB_AXIS,),
    "D": ("fsdp",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
}

# Axes of the parameters, by the end of their path in the model.
PARAMETERS: dict[tuple[str, ...], str] = {
    ("embed", "embedding"): "VD",
    ("head", "kernel"): "VD",
    ("update", "kernel"): "LDF",  # of continuations; with a rank it is [L, R, D]
    ("reduce", "kernel"): "LDR",
    ("exits", "w1"): "EDF",
    ("exits", "b1"): "EF",
    ("exits", "w2"): "EF",
}
for _name, _inputs, _outputs in (
    *(("q", "D", "NH"), ("k", "D", "KH"), ("v", "D", "KH"), ("o", "NH", "D")),
    *(("gate", "D", "F"), ("up", "D", "F"), ("down", "F", "D")),
):
    PARAMETERS[_name, "kernel"] = f"L{_inputs}{_outputs}"
    PARAMETERS[_name, "bias"] = f"L{_outputs}"
    PARAMETERS[_name, "lora_a"] = f"L{_inputs}R"
    PARAMETERS[_name, "lora_b"] = f"LR{_outputs}"


def spec(axes: str, shape: Sequence[int], mesh: Any = None) -> P:
    """Returns the partition spec of an array whose logical axes are the letters in `axes`.

    An axis is sharded only if its size is a multiple of the size of its mesh axes. `mesh` defaults
    to the mesh set by `jax.set_mesh`.
    """
    sizes = free_axes(jax.sharding.get_abstract_mesh()) if mesh is None else dict(mesh.shape)
    entries: list[tuple[str, ...] | None] = []
    for letter, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(letter, ()) if sizes.get(name, 1) > 1)
        divides = names and size % math.prod(sizes[name] for name in names) == 0
        entries.append(names if divides else None)
    return P(*entries)


def free_axes(mesh: Any) -> dict[str, int]:
    """Returns {name: size} of the mesh axes, without axes that are manual in a `shard_map`."""
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def divides() -> bool:
    """Returns whether the current mesh, without manual axes, has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(free_axes(mesh).values()) > 1


def per_device(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """Returns a function that applies `function` on each device to the shards of that device.

    `in_specs` and `out_specs` are the partition specs of the arguments and results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(free_axes(mesh)),
        check_vma=False,
    )


def data_axes() -> tuple[str, ...]:
    """Returns the names of the current mesh's axes that shard rows, without axes of size 1."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else free_axes(mesh)
    return tuple(name for name in RULES["B"] if sizes.get(name, 1) > 1)


def parameter_axes(path: Sequence[str], ndim: int) -> str:
    """Returns the logical axes of a parameter or of its optimiser moments.

    The last two names of `path` determine the axes. Each axis is a letter, or a dot if it is never
    sharded. Arrays with unknown names get only dots.
    """
    axes = PARAMETERS.get(tuple(path[-2:]), "." * ndim)
    return axes if len(axes) == ndim else "." * ndim


def constrain(array: jax.Array, axes: str) -> jax.Array:
    """Constrains the sharding of an intermediate array with the logical axes `axes` (see `spec`).

    On a single device, returns the array unchanged.
    """
    if not divides():
        return array
    return jax.lax.with_sharding_constraint(array, spec(axes, array.shape))


def constrain_parameters(tree: Any) -> Any:
    """Constrains parameters, moments or gradients to the shardings of the parameters."""
    return map_parameters(constrain, tree)


def map_parameters(function: Callable[[Any, str], Any], tree: Any) -> Any:
    """Maps `function(leaf, axes)` over a tree, where `axes` are the leaf's `parameter_axes`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf, parameter_axes(names_of(path), leaf.ndim)), tree
    )


def names_of(path: tuple) -> list[str]:
    """Returns the keys and attribute names in a JAX tree path as strings."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
