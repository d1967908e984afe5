"""Sharding of the vocabulary ops over a mesh: tokens over the data axes, vocabulary over `tensor`.

Each device computes the statistics of its tokens over its part of the vocabulary. These are a few
numbers per token; they are gathered over the tensor axis and merged. In the backward pass each
device recomputes the logits of its tokens and vocabulary. The gradient for the hidden states is
summed over the tensor axis, and the gradient for the head over the data axes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jexit.errors import UserError

TOKEN_AXES = ("data", "fsdp")
VOCAB_AXIS = "tensor"

Partial = TypeVar("Partial")


class Shards(NamedTuple):
    """The sharding of a vocabulary op over a mesh; without a mesh, the op runs on one device.

    `token_axes` are the mesh axes that shard the tokens. `vocab_axis` is the axis that shards the
    vocabulary, or None.
    """

    mesh: AbstractMesh | None = None
    token_axes: tuple[str, ...] = ()
    vocab_axis: str | None = None

    @classmethod
    def current(cls, vocab: int) -> "Shards":
        """Returns the sharding over the current mesh (see `jax.set_mesh`), except for manual axes.

        Tokens are sharded over the axes `data` and `fsdp`, and the `vocab` entries of the
        vocabulary over `tensor`. If `vocab` is not a multiple of the size of `tensor`, every device
        has the whole vocabulary. Along axes with other names, the devices repeat the computation.
        Raises UserError for `Explicit` axes.
        """
        mesh = jax.sharding.get_abstract_mesh()
        divides = {
            name
            for name, size, kind in zip(
                mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
            )
            if size > 1 and kind != AxisType.Manual
        }
        explicit = [
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if name in divides and kind == AxisType.Explicit
        ]
        if explicit:
            raise UserError(
                f"the mesh axis {explicit[0]!r} is Explicit, but the vocabulary ops support only "
                "Auto axes; make the mesh with jexit.dist.make_mesh or axis_types=AxisType.Auto"
            )
        tokens = tuple(name for name in TOKEN_AXES if name in divides)
        whole = VOCAB_AXIS not in divides or vocab % mesh.shape[VOCAB_AXIS]
        vocab_axis = None if whole else VOCAB_AXIS
        return cls(mesh, tokens, vocab_axis) if divides else cls()

    @property
    def divides(self) -> bool:
        return self.mesh is not None

    @property
    def tokens(self) -> P:
        """The partition spec of arrays whose first axis (tokens) is sharded over `token_axes`."""
        return P(self.token_axes or None)

    @property
    def vocab(self) -> P:
        """The partition spec of the head and its gradient: rows sharded over `vocab_axis`."""
        return P(self.vocab_axis)

    def pad_tokens(self, array: jax.Array) -> jax.Array:
        """Pads the first axis with zeros to a multiple of the number of token shards."""
        if not self.divides:
            return array
        parts = 1
        for name in self.token_axes:
            parts *= self.mesh.shape[name]
        missing = -array.shape[0] % parts
        return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    def run(self, function: Callable[..., Any], arguments: tuple, specs: tuple, out: Any) -> Any:
        """Calls `function(*arguments)`, under `shard_map` if a mesh shards the op.

        `specs` and `out` are the partition specs of the arguments and of the outputs.
        """
        if not self.divides:
            return function(*arguments)
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False
        )
        return mapped(*arguments)

    def vocab_start(self, rows: int) -> jax.Array | int:
        """Returns the vocabulary index of the first row of this device's shard of the output head.

        Every shard has `rows` rows.
        """
        return 0 if self.vocab_axis is None else jax.lax.axis_index(self.vocab_axis) * rows

    def merged(self, part: Partial, merge: Callable[[Partial, Partial], Partial]) -> Partial:
        """Gathers the statistics of all vocabulary shards and merges them in order.

        `part` contains the statistics of this device's shard. `merge` combines those of two shards,
        the earlier one first.
        """
        if self.vocab_axis is None:
            return part
        parts = jax.lax.all_gather(part, self.vocab_axis)
        return fold(parts, merge, self.mesh.shape[self.vocab_axis])

    def sum_over_vocab(self, dh_ND: jax.Array) -> jax.Array:
        return dh_ND if self.vocab_axis is None else jax.lax.psum(dh_ND, self.vocab_axis)

    def sum_over_tokens(self, dhead_VD: jax.Array) -> jax.Array:
        return jax.lax.psum(dhead_VD, self.token_axes) if self.token_axes else dhead_VD


def fold(parts: Partial, merge: Callable[[Partial, Partial], Partial], count: int) -> Partial:
    """Merges, in order, the `count` entries along the first axis of the arrays in `parts`."""
    singles = [jax.tree.map(lambda array, i=i: array[i], parts) for i in range(count)]
    return functools.reduce(merge, singles)
