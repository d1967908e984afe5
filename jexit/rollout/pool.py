"""The state of decoding: the jobs (completions to make), their records, and the pool of rows.

Each row of the pool decodes one completion at a time. The first axis of each array (in a cache, the
row axis) is sharded over the data shards of the mesh; its size is J jobs, P rows of the pool, or
one entry per shard. Each shard decodes independently. Within a shard, the heads, MLP and vocabulary
are sharded over `tensor`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from jexit.axes import Array, Bool, Float, Int
from jexit.dist import constrain, data_axes, data_shards
from jexit.model.attention import KeysValues
from jexit.model.cache import Cache
from jexit.model.transformer import Transformer

FREE = -1  # a row of the pool without a completion


@struct.dataclass
class Jobs:
    """The completions to make, one entry per completion; completions of one prompt are adjacent."""

    number_J: Int[Array, "J"]  # the prompt's number in the caller's whole list
    sample_J: Int[Array, "J"]
    prompt_length_J: Int[Array, "J"]  # including the forced prefix
    forced_J: Int[Array, "J"]  # the length of the forced prefix
    slot_J: Int[Array, "J"]  # the prompt's slot in the prefix cache
    order_J: Int[Array, "J"]  # completions in the order in which they start


@struct.dataclass
class Records:
    """The tokens of every completion and their depths, in T columns (at least `max_new_tokens`)."""

    tokens_JT: Int[Array, "J T"]
    depths_JT: Int[Array, "J T"]
    logprobs_JT: Float[Array, "J T"]
    depth_logprobs_JT: Float[Array, "J T"]
    hazard_logits_JTE: Float[Array, "J T E"] | None
    length_J: Int[Array, "J"]
    ended_J: Bool[Array, "J"]

    @classmethod
    def empty(cls, rows: int, columns: int, exits: int | None) -> Records:
        """Returns records of `rows` completions without tokens.

        Hazard logits are recorded for `exits` exits; if this is None, they are not recorded.
        """
        integers_JT = jnp.zeros((rows, columns), jnp.int32)
        floats_JT = jnp.zeros((rows, columns), jnp.float32)
        z_JTE = None if exits is None else jnp.full((rows, columns, exits), jnp.nan, jnp.float32)
        length_J, ended_J = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
        return cls(integers_JT, integers_JT, floats_JT, floats_JT, z_JTE, length_J, ended_J)

    def with_tokens(
        self,
        job_B: Int[Array, "B"],
        index: Int[Array, "B"] | int,
        token_B: Int[Array, "B"],
        depth_B: Int[Array, "B"],
        logprob_B: Float[Array, "B"],
        depth_logprob_B: Float[Array, "B"],
        hazard_logits_BE: Float[Array, "B E"] | None,
        ends_B: Bool[Array, "B"],
    ) -> Records:
        """Returns the records after storing token number `index` of each job in `job_B`.

        The jobs' lengths become `index` + 1, and `ends_B` marks those that have ended. Jobs out of
        range are ignored.
        """

        def kept(record: Array, new: Array) -> Array:
            return record.at[job_B, index].set(new, mode="drop")

        z_JTE = self.hazard_logits_JTE
        return Records(
            tokens_JT=kept(self.tokens_JT, token_B),
            depths_JT=kept(self.depths_JT, depth_B),
            logprobs_JT=kept(self.logprobs_JT, logprob_B),
            depth_logprobs_JT=kept(self.depth_logprobs_JT, depth_logprob_B),
            hazard_logits_JTE=z_JTE if hazard_logits_BE is None else kept(z_JTE, hazard_logits_BE),
            length_J=self.length_J.at[job_B].set(index + 1, mode="drop"),
            ended_J=self.ended_J.at[job_B].set(ends_B, mode="drop"),
        )


@struct.dataclass
class Pool:
    """The completions being decoded; a row contains the state of its completion's current token."""

    job_P: Int[Array, "P"]  # the completion, or FREE
    index_P: Int[Array, "P"]  # tokens drawn so far
    depth_P: Int[Array, "P"]
    segment_P: Int[Array, "P"]  # the segment that the row waits for; at segment 0 it draws a token
    since_P: Int[Array, "P"]  # the tick since which the row waits
    h_PD: Float[Array, "P D"]
    hazard_logits_PE: Float[Array, "P E"]  # zeros at exits that were not reached
    cache: Cache
    tick: Int[Array, "1"]
    started: Int[Array, "1"]  # how many completions of `Jobs.order_J` have begun
    filled: Float[Array, "1"]  # rows that ticks ran, weighted by their cost in layers
    offered: Float[Array, "1"]  # rows that ticks had room for, weighted likewise

    @classmethod
    def empty(cls, rows: int, width: int, exits: int, cache: Cache, shards: int) -> Pool:
        """Returns the pool of all data shards together, with every one of its `rows` rows free."""
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


@struct.dataclass
class Status:
    """The state of every data shard, from which the host decides what to do next."""

    started: Int[Array, "shards"]
    under_way: Int[Array, "shards"]  # completions being decoded
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
    """Returns an empty (pool, records, prefix cache) for all data shards together.

    The caches have `slots` slots in each of `rows` rows of the pool, and `prompt_slots` in each of
    `prefixes` prefixes. The records have `columns` tokens for each of `jobs` completions.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    arch, exits = model.arch, len(model.exit_layers)
    cache = Cache.empty(arch, rows, slots, model.dtype)
    pool = Pool.empty(rows, arch.width, exits, cache, data_shards())
    records = Records.empty(jobs, columns, exits if hazards else None)
    prefix_cache = Cache.empty(arch, prefixes, prompt_slots, model.dtype)
    return _pinned(pool), _pinned(records), prefix_cache


@functools.partial(jax.jit, donate_argnames=("pool", "records"))
def cut(pool: Pool, records: Records, length_J: Int[Array, "J"]) -> tuple[Pool, Records]:
    """Ends each completion j after its first `length_J[j]` tokens, unless `length_J[j]` is 0."""

    def local(pool: Pool, records: Records, length_J: Array) -> tuple[Pool, Records]:
        over_J = length_J > 0
        over_P = (pool.job_P != FREE) & over_J[pool.job_P]
        pool = pool.replace(
            job_P=jnp.where(over_P, FREE, pool.job_P),
            segment_P=jnp.where(over_P, 0, pool.segment_P),
            since_P=jnp.where(over_P, pool.tick[0], pool.since_P),
        )
        records = records.replace(
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
    return cache.grown(slots)  # a donated buffer could not be reused, because the size differs


def _pinned(tree: Any) -> Any:
    """Returns `tree` with the first axis of its arrays sharded over the mesh's data axes.

    Caches, which are sharded already, are left as they are.
    """
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
    """Returns partition specs that shard the rows of all arrays in `tree` over the data axes."""
    rows = rows_spec()
    inside = {Cache: P(None, None, *rows), KeysValues: P(None, *rows)}
    return jax.tree.map(
        lambda part: inside.get(type(part), rows),
        tree,
        is_leaf=lambda part: type(part) in inside,
    )


def by_shard(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """Returns `function` mapped over data shards; the axis `tensor` is left to the compiler.

    Without several data shards, this is `function` itself.
    """
    axes, mesh = data_axes(), jax.sharding.get_abstract_mesh()
    if not axes:
        return function
    # Axes of size 1 are included, because kernels accept an axis that is left to the compiler only
    # if something is divided over it.
    single = {name for name, size in mesh.shape.items() if size == 1}
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=single | set(axes),
        check_vma=False,
    )
