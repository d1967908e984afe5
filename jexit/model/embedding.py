"""The token embeddings, and the lookup of tokens in a table that is sharded over a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jexit.axes import Array, Float, Int
from jexit.dist.rules import divides, per_device, spec
from jexit.presets import Architecture


class Embedding(nnx.Module):
    """The token embeddings [V, D], which are also the output head of a model with tied weights."""

    def __init__(self, arch: Architecture, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (arch.vocab_size, arch.width)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * 0.02)

    def __call__(self, tokens: Int[Array, "B *T"]) -> Float[Array, "B *T D"]:
        return look_up(self.embedding[...], tokens)


def look_up(table_VD: Float[Array, "V D"], tokens: Int[Array, "B *T"]) -> Float[Array, "B *T D"]:
    """Returns `table_VD[tokens]`; under a mesh, the result is sharded like the batch.

    The compiler alone would compute the whole result on every device. Here each device gathers the
    tokens of the devices along the mesh axis `fsdp` and looks them up in its own shard of the
    table. A sum over the axis `tensor` combines the shards of the vocabulary. Then the devices
    along `fsdp` exchange slices of the width, so that each ends with its own rows at full width.
    """
    if not divides():
        return table_VD[tokens]
    table_spec = spec("VD", table_VD.shape)
    rows_spec = spec("B" + "." * (tokens.ndim - 1), tokens.shape)
    vocab_axes, width_axes = table_spec
    exchanges = bool(_names(width_axes)) and _names(width_axes) <= _names(rows_spec[0])
    last = tokens.ndim

    def local(table_VD: Array, tokens: Array) -> Array:
        if exchanges:
            tokens = jax.lax.all_gather(tokens, width_axes, axis=0, tiled=True)
        if vocab_axes is None:
            found = table_VD[tokens]
        else:
            place = tokens - jax.lax.axis_index(vocab_axes) * table_VD.shape[0]
            here = (place >= 0) & (place < table_VD.shape[0])
            found = jnp.where(here[..., None], jnp.take(table_VD, place, axis=0, mode="clip"), 0)
            found = jax.lax.psum(found, vocab_axes)  # exact: one number plus zeros
        if exchanges:
            return jax.lax.all_to_all(found, width_axes, 0, last, tiled=True)
        if width_axes is not None:
            return jax.lax.all_gather(found, width_axes, axis=last, tiled=True)
        return found

    in_specs = (table_spec, rows_spec)
    return per_device(local, in_specs=in_specs, out_specs=P(*rows_spec, None))(table_VD, tokens)


def _names(entry: str | tuple[str, ...] | None) -> set[str]:
    """Returns the names of the mesh axes in one entry of a `PartitionSpec` (None: no names)."""
    return {entry} if isinstance(entry, str) else set(entry or ())
