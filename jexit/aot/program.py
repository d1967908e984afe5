"""One jitted step of a run, with abstract arguments that have shapes, dtypes and shardings."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jexit.dist.rules import map_parameters, spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One jitted step: its arguments, and the arrays that lie on the devices while it runs.

    `options` are the keyword arguments. `resident` is the state that the run keeps on the devices
    besides this step's arguments. `loops` maps the name of a `jax.named_scope` to the trip count of
    the loops inside this scope, where the compiled module does not contain the trip count. `note`
    is a sentence to print about the step.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    resident: Any = None
    note: str = ""

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments, **self.options)

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the step by parameter name, including keyword arguments."""
        bound = inspect.signature(self.function).bind(*self.arguments, **self.options)
        return bound.arguments


def on_devices(tree: Any) -> list[tuple[tuple, Any]]:
    """Returns (path, array) for each abstract array in `tree` that has a sharding."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, leaf) for path, leaf in leaves if getattr(leaf, "sharding", None) is not None]


def device_bytes(tree: Any) -> int:
    """Returns the bytes that the arrays in `tree` take on one device, given their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for _, leaf in on_devices(tree)
    )


def placed_parameters(tree: Any, mesh: Mesh, *, whole_width: bool = False) -> Any:
    """Returns parameters or optimiser state as abstract arrays, sharded as in a run.

    With `whole_width`, the model width is not sharded.
    """

    return map_parameters(
        lambda leaf, axes: placed(leaf, mesh, axes.replace("D", ".") if whole_width else axes), tree
    )


def placed(leaf: Any, mesh: Mesh, axes: str) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, spec(axes, leaf.shape, mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """Returns an abstract array of shape `shape`; its first axis is sharded over the data axes."""
    return placed(jax.ShapeDtypeStruct(shape, dtype), mesh, "B" + "." * (len(shape) - 1))


def abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
