"""The jitted programs of the decoding engine: prefill of prompts, then ticks over a pool.

Under a mesh each data shard ticks for itself, over its own pool and completions; heads, MLP and
vocabulary are divided over `tensor` inside it.
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

from jexit.axes import Array, Bool, Int
from jexit.dist import constrain, data_axes, data_shards
from jexit.model.attention import KeysValues
from jexit.model.cache import Cache
from jexit.model.policies import Policy
from jexit.model.transformer import Transformer, logits_of, run
from jexit.rollout.layers import Layers
from jexit.rollout.state import FREE, Pool, Progress, Records, Work
from jexit.rollout.ticks import TOKEN_DRAW, Draws, Ticks, fold_in
from jexit.rollout.written import Written


@functools.partial(
    jax.jit,
    static_argnames=(
        "graphdef", "rows", "jobs", "prompts", "columns", "prompt_slots", "slots", "hazards"
    ),
)  # fmt: skip
def empty(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    *,
    rows: int,
    jobs: int,
    prompts: int,
    columns: int,
    prompt_slots: int,
    slots: int,
    hazards: bool,
) -> tuple[Pool, Records, Cache]:
    """(pool, records, room for the prompts' keys and values), of all shards together."""
    model: Transformer = nnx.merge(graphdef, *states)
    arch, exits = model.arch, len(model.exit_layers)
    cache = Cache.empty(arch, rows, slots, model.dtype)
    pool = Pool.empty(rows, arch.width, exits, cache, data_shards())
    records = Records.empty(jobs, columns, exits if hazards else None)
    return _pinned(pool), _pinned(records), Cache.empty(arch, prompts, prompt_slots, model.dtype)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "samples", "adapters"),
    donate_argnames=("prompts", "records"),
)
def prefill(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    prompts: Cache,
    records: Records,
    work: Work,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, "B"],
    index_B: Int[Array, "B"],
    draws: Draws,
    written: Written | None,
    *,
    samples: int,
    adapters: bool,
) -> tuple[Cache, Records]:
    """Runs right-padded prompts and draws the first token of each completion.

    `index_B` are the prompts' places in their shard's list; outside of it for rows that only fill
    the batch. Prompts run at full depth, but for what is `written` of a completion already. Returns
    the prompts' keys and values with these, and the records.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    length = tokens_BT.shape[1]
    valid_BT = jnp.arange(length) < length_B[:, None]
    keeps_hazards = records.hazard_logits_JTE is not None
    halting = {}
    if written is not None:
        halting = written.halting(work, draws, length_B, length) | {"hazards": keeps_hazards}
    result = run(
        model, tokens_BT, valid_BT=valid_BT, adapters=adapters, keys_values=True, **halting
    )

    def last(values_BTX: Array) -> Array:
        at = (length_B - 1).reshape(-1, *[1] * (values_BTX.ndim - 1))
        return jnp.take_along_axis(values_BTX, at, axis=1)[:, 0]

    logits_BV = constrain(logits_of(last(result.hidden_BTD), model.head_VD), "BV")
    depth_B, z_BE, depth_logprob_B = last(result.depth_BT), None, jnp.zeros(length_B.shape)
    if written is not None and result.hazard_logits_BTE is not None:
        z_BE = last(result.hazard_logits_BTE)
        depth_logprob_B = written.depth_log_prob(model, depth_B, z_BE)
        reached_BE = (jnp.asarray(model.exit_layers) <= depth_B[:, None]) & written.any_B[:, None]
        z_BE = jnp.where(reached_BE, z_BE, jnp.nan) if keeps_hazards else None

    def store(
        prompts: Cache, records: Records, work: Work, kv: KeysValues, index_B: Array,
        logits_BV: Array, depth_B: Array, depth_logprob_B: Array, z_BE: Array | None, draws: Draws,
    ) -> tuple[Cache, Records]:  # fmt: skip
        jobs = records.length_J.shape[0]
        job_B = (index_B[:, None] * samples + jnp.arange(samples)).reshape(-1)
        real_B = job_B < jobs
        known_B = jnp.minimum(job_B, jobs - 1)
        keys_B = draws.keys(work, known_B, jnp.zeros_like(known_B))
        token_B, logprob_B = draws.sampling.draw(
            jnp.repeat(logits_BV, samples, axis=0), fold_in(keys_B, TOKEN_DRAW)
        )
        place_B = jnp.where(real_B, work.place_J[known_B], prompts.keys_KLPSH.shape[2])
        prompts = prompts.with_prompts(place_B[::samples], kv)

        def first(record_JT: Array, new: Array) -> Array:
            return record_JT.at[job_B, 0].set(new, mode="drop")

        def of_prompt(record_JT: Array, new_B: Array) -> Array:
            return first(record_JT, jnp.repeat(new_B, samples, axis=0))

        records = dataclasses.replace(
            records,
            tokens_JT=first(records.tokens_JT, token_B),
            depths_JT=of_prompt(records.depths_JT, depth_B),
            logprobs_JT=first(records.logprobs_JT, logprob_B),
            depth_logprobs_JT=of_prompt(records.depth_logprobs_JT, depth_logprob_B),
            length_J=records.length_J.at[job_B].set(1, mode="drop"),
            ended_J=records.ended_J.at[job_B].set(draws.ends(token_B), mode="drop"),
        )
        if z_BE is not None:
            z_JTE = of_prompt(records.hazard_logits_JTE, z_BE)
            records = dataclasses.replace(records, hazard_logits_JTE=z_JTE)
        return prompts, records

    kv_spec, row = P(None, data_axes() or None), _rows()
    stored = _by_shard(
        store,
        in_specs=(*_specs((prompts, records, work)), kv_spec, row, row, row, row, row, P()),
        out_specs=_specs((prompts, records)),
    )
    return stored(
        prompts, records, work, result.keys_values, index_B, logits_BV, depth_B, depth_logprob_B,
        z_BE, draws,
    )  # fmt: skip


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "width", "adapters", "hazards"),
    donate_argnames=("pool", "records"),
)
def advance(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    layers: Layers | None,
    pool: Pool,
    records: Records,
    prompts: Cache,
    work: Work,
    ready: Int[Array, "shards"],
    more: Bool[Array, "shards"],
    emissions: Int[Array, ""],
    policy: Policy,
    draws: Draws,
    *,
    width: int,
    adapters: bool,
    hazards: bool,
) -> tuple[Pool, Records, Progress]:
    """Ticks until all completions have ended, or the host has to do something.

    That is: a row is free, all of its shard's `ready` completions have begun and `more` are to
    come; or a row needs a larger cache; or there were so many `emissions` (ticks that emit tokens).
    `width` is the number of places in a tick, of each shard.
    """

    def local(
        states: tuple, layers: Layers | None, pool: Pool, records: Records, prompts: Cache,
        work: Work, ready: Array, policy: Policy, draws: Draws, more: Array, emissions: Array,
    ) -> tuple[Pool, Records, Progress]:  # fmt: skip
        ticks = Ticks(
            nnx.merge(graphdef, *states),
            layers,
            prompts,
            work,
            ready[0],
            policy,
            draws,
            width,
            adapters,
            hazards,
        )

        def goes_on(carry: tuple[Pool, Records, Array]) -> Array:
            pool, _, emitted = carry
            free = jnp.any(pool.job_P == FREE)
            waiting = pool.started[0] < ready[0]
            busy = jnp.any(pool.job_P != FREE) | (free & waiting)
            starved = free & ~waiting & more[0]
            full = ticks.full(pool)
            return busy & ~starved & ~full & (emitted < emissions)

        def tick(carry: tuple[Pool, Records, Array]) -> tuple[Pool, Records, Array]:
            pool, records, emitted = carry
            pool, records, emits = ticks.tick(pool, records)
            return pool, records, emitted + emits

        pool, records, _ = jax.lax.while_loop(
            goes_on, tick, (pool, records, jnp.zeros((), jnp.int32))
        )
        progress = Progress(
            started=pool.started,
            under_way=jnp.sum(pool.job_P != FREE, keepdims=True).astype(jnp.int32),
            full=ticks.full(pool)[None],
            filled=pool.filled,
            places=pool.places,
            ticks=pool.tick,
        )
        return pool, records, progress

    carried = _specs((pool, records))
    rows_of_policy = jax.tree.map(lambda leaf: _rows() if jnp.ndim(leaf) else P(), policy)
    stepped = _by_shard(
        local,
        in_specs=(
            P(), P(), *carried, *_specs((prompts, work)), _rows(), rows_of_policy, P(), _rows(), P()
        ),
        out_specs=(*carried, _rows()),
    )  # fmt: skip
    pool, records, progress = stepped(
        states, layers, pool, records, prompts, work, ready, policy, draws, more, emissions
    )
    return pool, records, jax.tree.map(lambda part: constrain(part, "."), progress)


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

    carried = _specs((pool, records))
    return _by_shard(local, in_specs=(*carried, _rows()), out_specs=carried)(
        pool, records, length_J
    )


def _pinned(tree: Any) -> Any:
    """With the rows of every array where their shard is; caches are there already."""
    return jax.tree.map(
        lambda part: (
            part if isinstance(part, Cache) else constrain(part, "B" + "." * (part.ndim - 1))
        ),
        tree,
        is_leaf=lambda part: isinstance(part, Cache),
    )


@functools.partial(jax.jit, static_argnames="slots")
def grown(cache: Cache, *, slots: int) -> Cache:
    return cache.grown(slots)  # another size: nothing that a donated buffer could serve for


def _rows() -> P:
    return P(data_axes() or None)


def _specs(tree: Any) -> Any:
    """How each shard's part of arrays with their rows first, or of caches, lies on the mesh."""
    return jax.tree.map(
        lambda part: P(None, None, *_rows()) if isinstance(part, Cache) else _rows(),
        tree,
        is_leaf=lambda part: isinstance(part, Cache),
    )


def _by_shard(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
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
