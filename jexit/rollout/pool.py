"""What decoding carries: completions to make, their records, and the pool of those under way.

Arrays have their rows first, so that each data shard of a mesh holds its own: J completions (jobs),
P rows of the pool, one number a shard. Shards decode by themselves; heads, MLP and vocabulary are
divided over `tensor` inside them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jexit.axes import Array, Bool, Float, Int
from jexit.dist import constrain, data_axes, data_shards
from jexit.model.attention import KeysValues
from jexit.model.cache import Cache
from jexit.model.transformer import Transformer

FREE = -1  # a row of the pool without a completion


def pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Jobs:
    """The completions to make; those of one prompt are adjacent."""

    number_J: Int[Array, "J"]  # of the prompt in the caller's whole list
    sample_J: Int[Array, "J"]
    prompt_length_J: Int[Array, "J"]  # with its forced prefix
    forced_J: Int[Array, "J"]  # tokens of that prefix
    slot_J: Int[Array, "J"]  # of the prompt in the prefix cache
    order_J: Int[Array, "J"]  # completions in the order in which they start


@pytree
class Records:
    """What is kept of every completion; T is no less than `max_new_tokens`."""

    tokens_JT: Int[Array, "J T"]
    depths_JT: Int[Array, "J T"]
    logprobs_JT: Float[Array, "J T"]
    depth_logprobs_JT: Float[Array, "J T"]
    hazard_logits_JTE: Float[Array, "J T E"] | None
    length_J: Int[Array, "J"]
    ended_J: Bool[Array, "J"]

    @classmethod
    def empty(cls, rows: int, columns: int, exits: int | None) -> Records:
        """`exits` None: hazards are not kept."""
        integers_JT = jnp.zeros((rows, columns), jnp.int32)
        floats_JT = jnp.zeros((rows, columns), jnp.float32)
        z_JTE = None if exits is None else jnp.full((rows, columns, exits), jnp.nan, jnp.float32)
        return cls(
            integers_JT,
            integers_JT,
            floats_JT,
            floats_JT,
            z_JTE,
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, bool),
        )


@pytree
class Pool:
    """Completions under way, each with its last token somewhere on its way through the layers."""

    job_P: Int[Array, "P"]  # the completion, or FREE
    index_P: Int[Array, "P"]  # tokens that are out
    depth_P: Int[Array, "P"]
    segment_P: Int[Array, "P"]  # that the row waits for; at 0 it draws a token
    since_P: Int[Array, "P"]  # tick from which it waits
    h_PD: Float[Array, "P D"]
    hazard_logits_PE: Float[Array, "P E"]  # zeros at exits that were not reached
    cache: Cache
    tick: Int[Array, "1"]
    started: Int[Array, "1"]  # completions that have begun, of `Jobs.order_J`
    filled: Float[Array, "1"]  # places that ran, weighted by what a place costs, in layers
    offered: Float[Array, "1"]  # likewise, that there were

    @classmethod
    def empty(cls, rows: int, width: int, exits: int, cache: Cache, shards: int) -> Pool:
        """Of all shards together, with free rows."""
        integers_P, one = jnp.zeros(rows, jnp.int32), jnp.zeros(shards, jnp.int32)
        return cls(
            job_P=integers_P + FREE,
            index_P=integers_P,
            depth_P=integers_P,
            segment_P=integers_P,
            since_P=integers_P,
            h_PD=jnp.zeros((rows, width), cache.keys_KLPSH.dtype),
            hazard_logits_PE=jnp.zeros((rows, exits), jnp.float32),
            cache=cache,
            tick=one,
            started=one,
            filled=one.astype(jnp.float32),
            offered=one.astype(jnp.float32),
        )


@pytree
class Status:
    """What the host decides by, of every shard."""

    started: Int[Array, "shards"]
    under_way: Int[Array, "shards"]  # completions
    full: Bool[Array, "shards"]  # a row needs a larger cache
    filled: Float[Array, "shards"]
    offered: Float[Array, "shards"]


@functools.partial(
    jax.jit,
    static_argnames=(
        "graphdef", "rows", "jobs", "prefixes", "columns", "prompt_slots", "slots", "hazards"
    ),
)  # fmt: skip
def empty(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    *,
    rows: int,
    jobs: int,
    prefixes: int,
    columns: int,
    prompt_slots: int,
    slots: int,
    hazards: bool,
) -> tuple[Pool, Records, Cache]:
    """(pool, records, prefix cache), of all shards together."""
    model: Transformer = nnx.merge(graphdef, *states)
    arch, exits = model.arch, len(model.exit_layers)
    cache = Cache.empty(arch, rows, slots, model.dtype)
    pool = Pool.empty(rows, arch.width, exits, cache, data_shards())
    records = Records.empty(jobs, columns, exits if hazards else None)
    prefix_cache = Cache.empty(arch, prefixes, prompt_slots, model.dtype)
    return _pinned(pool), _pinned(records), prefix_cache


@functools.partial(jax.jit, donate_argnames=("pool", "records"))
def cut(pool: Pool, records: Records, length_J: Int[Array, "J"]) -> tuple[Pool, Records]:
    """Ends completions after `length_J` of their tokens; 0 leaves one alone."""

    def local(pool: Pool, records: Records, length_J: Array) -> tuple[Pool, Records]:
        over_J = length_J > 0
        over_P = (pool.job_P != FREE) & over_J[pool.job_P]
        pool = dataclasses.replace(
            pool,
            job_P=jnp.where(over_P, FREE, pool.job_P),
            segment_P=jnp.where(over_P, 0, pool.segment_P),
            since_P=jnp.where(over_P, pool.tick[0], pool.since_P),
        )
        records = dataclasses.replace(
            records,
            length_J=jnp.where(over_J, length_J, records.length_J),
            ended_J=records.ended_J | over_J,
        )
        return pool, records

    carried = specs((pool, records))
    return by_shard(local, in_specs=(*carried, rows_spec()), out_specs=carried)(
        pool, records, length_J
    )


@functools.partial(jax.jit, static_argnames="slots")
def grown(cache: Cache, *, slots: int) -> Cache:
    return cache.grown(slots)  # another size: nothing that a donated buffer could serve for


def _pinned(tree: Any) -> Any:
    """With the rows of every array where their shard is; caches are there already."""
    return jax.tree.map(
        lambda part: (
            part if isinstance(part, Cache) else constrain(part, "B" + "." * (part.ndim - 1))
        ),
        tree,
        is_leaf=lambda part: isinstance(part, Cache),
    )


def rows_spec() -> P:
    return P(data_axes() or None)


def specs(tree: Any) -> Any:
    """How arrays with their rows first, keys and values, and caches lie on the mesh."""
    rows = rows_spec()
    inside = {Cache: P(None, None, *rows), KeysValues: P(None, *rows)}
    return jax.tree.map(
        lambda part: inside.get(type(part), rows),
        tree,
        is_leaf=lambda part: type(part) in inside,
    )


def by_shard(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each data shard by itself; what is divided over `tensor` stays so."""
    axes, mesh = data_axes(), jax.sharding.get_abstract_mesh()
    if not axes:
        return function
    # With axes of size 1: kernels want no axis left to the compiler where there is none to divide.
    single = {name for name, size in mesh.shape.items() if size == 1}
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=single | set(axes),
        check_vma=False,
    )
