"""One jitted step of a run, with abstract arguments, and where its arrays would lie."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jexit.dist.rules import names_of, parameter_axes, spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One jitted step: what it is called with, and what lies on the devices while it runs.

    `beside` is what the run keeps there that is none of its arguments; `loops` has the rounds of
    loops that the compiled module does not tell, by their scope.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    beside: Any = None
    note: str = ""

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments, **self.options)

    @property
    def inputs(self) -> dict[str, Any]:
        """Its arguments by name."""
        bound = inspect.signature(self.function).bind(*self.arguments, **self.options)
        return bound.arguments


def on_devices(tree: Any) -> list[tuple[tuple, Any]]:
    """The arrays without values that have a place on devices, with their paths in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, leaf) for path, leaf in leaves if getattr(leaf, "sharding", None) is not None]


def device_bytes(tree: Any) -> int:
    """Bytes that arrays without values would take on each device, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for _, leaf in on_devices(tree)
    )


def placed_parameters(tree: Any, mesh: Mesh, *, whole_width: bool = False) -> Any:
    """Shapes with the shardings that the rules give parameters, moments and counters.

    `whole_width`: as `jexit.dist.gathered_width` leaves them.
    """

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        axes = parameter_axes(names_of(path), leaf.ndim)
        return placed(leaf, mesh, axes.replace("D", ".") if whole_width else axes)

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(leaf: Any, mesh: Mesh, axes: str) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, spec(axes, leaf.shape, mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array with rows on its first axis, spread over the data axes."""
    return placed(jax.ShapeDtypeStruct(shape, dtype), mesh, "B" + "." * (len(shape) - 1))


def abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
