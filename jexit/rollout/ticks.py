"""A tick of the decoding engine, which runs one segment of layers for rows that wait for it.

A compiled program reads the segment's index at run time. The bounds of its loops over layers are
dynamic, so one loop body serves all segments and the drawing of tokens
(`jexit.rollout.scheduling`). The weights of a layer are taken inside these loops
(`jexit.rollout.weights`), so weights that no row needs are not read. The caches are carried through
the loops, never through `lax.cond`, which copies its results.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from jexit.axes import Array, Bool, Float, Int
from jexit.dist import constrain
from jexit.model.attention import KeysValues
from jexit.model.block import Block
from jexit.model.cache import Cache
from jexit.model.layers import rope_table
from jexit.model.policies import Policy
from jexit.model.transformer import Transformer
from jexit.rollout.pool import FREE, Jobs, Pool, Records, Status, by_shard, rows_spec, specs
from jexit.rollout.sampling import TOKEN_DRAW, Draws, fold_in
from jexit.rollout.scheduling import Segments, choose, pick
from jexit.rollout.weights import LayerWeights, at_layer, head_logits

# Names of the loops over layers in a compiled module.
LAYERS_SCOPE, FILL_SCOPE, COPY_SCOPE = "layers", "fill", "copy"


@struct.dataclass
class TickRows:
    """The rows of the pool that one tick runs."""

    job_B: Int[Array, "B"]
    index_B: Int[Array, "B"]
    depth_B: Int[Array, "B"]
    h_BD: Float[Array, "B D"]
    hazard_logits_BE: Float[Array, "B E"]
    here_B: Bool[Array, "B"]  # False for a row that only fills up the tick
    rows_B: Int[Array, "B"] | None  # None: all rows of the pool, in order

    @property
    def cache_rows_B(self) -> Int[Array, "B"]:
        batch = self.job_B.shape[0]
        return jnp.arange(batch, dtype=jnp.int32) if self.rows_B is None else self.rows_B

    @property
    def runs_B(self) -> Bool[Array, "B"]:
        return self.here_B & (self.job_B != FREE)


def _nothing_drawn(at: TickRows) -> tuple[Array, Array, Array]:
    zeros_B = jnp.zeros(at.job_B.shape)
    return zeros_B.astype(jnp.int32), zeros_B, zeros_B


@dataclasses.dataclass(frozen=True)
class Ticks:
    """Runs the ticks of one data shard; the fields stay constant during the ticks."""

    graphdef: nnx.GraphDef
    states: tuple[nnx.State, ...]
    layers: LayerWeights | None
    prefixes: Cache
    jobs: Jobs
    ready: Int[Array, "1"]
    policy: Policy
    draws: Draws
    tick_rows: int
    adapters: bool
    hazards: bool

    @functools.cached_property
    def model(self) -> Transformer:
        return nnx.merge(self.graphdef, *self.states)

    @functools.cached_property
    def segments(self) -> Segments:
        model = self.model
        return Segments.of(model.arch, model.exit_layers, self.policy, hazards=self.hazards)

    @property
    def reads_hazards(self) -> bool:
        return self.hazards or self.policy.reads_hazards

    def full(self, pool: Pool) -> Array:
        """Returns whether any row's next pass may need a slot beyond the end of the cache."""
        goes_on_P = (pool.job_P != FREE) & (pool.index_P + 1 < self.draws.limit_at(pool.job_P))
        slot_P = self.jobs.prompt_length_J[pool.job_P] + pool.index_P
        return jnp.any(goes_on_P & (slot_P >= pool.cache.slots))

    def tick(self, pool: Pool, records: Records) -> tuple[Pool, Records, Array]:
        """Runs one tick; returns the pool, the records, and 1 if tokens were drawn, else 0."""
        segments, tick = self.segments, pool.tick[0]
        free_P = pool.job_P == FREE
        # Free rows wait for segment 0 too, up to the number of completions that can begin.
        opens_P = free_P & (jnp.cumsum(free_P) <= self.ready[0] - pool.started[0])
        waits_P = ~free_P | opens_P
        segment = choose(segments, pool.segment_P, waits_P, pool.since_P, tick, self.tick_rows)
        there_P = waits_P & (pool.segment_P == segment)
        rows_B, here_B = pick(there_P, pool.since_P, tick, self.tick_rows)

        def of_rows(part: Array) -> Array:
            return part if rows_B is None else part[rows_B]

        state = (pool.job_P, pool.index_P, pool.depth_P, pool.h_PD, pool.hazard_logits_PE)
        at = TickRows(*map(of_rows, state), here_B=here_B, rows_B=rows_B)
        draws = segment == 0
        at, records, cache, started = self._next(at, records, pool, draws)
        at, cache = self._run(at, cache, segment)
        depth_end = segments.ends_Y[segment]
        leaves_B = (at.depth_B <= depth_end) | (segment == segments.count - 1)

        def back(part: Array, new: Array) -> Array:
            here = here_B.reshape(-1, *[1] * (new.ndim - 1))
            new = jnp.where(here, new, of_rows(part))
            return new if rows_B is None else part.at[rows_B].set(new, unique_indices=True)

        cost = jnp.asarray(segments.costs_Y)[segment]
        after = pool.replace(
            job_P=back(pool.job_P, at.job_B),
            index_P=back(pool.index_P, at.index_B),
            depth_P=back(pool.depth_P, at.depth_B),
            segment_P=back(
                pool.segment_P, jnp.where(leaves_B | (at.job_B == FREE), 0, segment + 1)
            ),
            since_P=back(pool.since_P, jnp.full_like(at.job_B, tick + 1)),
            h_PD=back(pool.h_PD, at.h_BD),
            hazard_logits_PE=back(pool.hazard_logits_PE, at.hazard_logits_BE),
            cache=cache,
            tick=pool.tick + 1,
            started=started,
            filled=pool.filled + cost * jnp.sum(at.runs_B),
            offered=pool.offered + cost * self.tick_rows,
        )
        return after, records, draws.astype(jnp.int32)

    def _next(
        self, at: TickRows, records: Records, pool: Pool, draws: Array
    ) -> tuple[TickRows, Records, Cache, Array]:
        """If `draws` (at segment 0), draws the tokens of finished passes and begins new passes.

        Returns the rows, the records, the cache, and how many completions have begun so far.
        """
        model, layers = self.model, self.model.arch.layers
        jobs = records.length_J.shape[0]
        draws_B = at.runs_B & draws
        # This comes before the draw, because the logits of a token that has left are computed from
        # the end of its continuation.
        at, cache = self._fill(at, pool.cache, draws_B)
        token_B, logprob_B, depth_logprob_B = jax.lax.cond(
            jnp.any(draws_B), self._draw, _nothing_drawn, at
        )
        ends_B, z_BE = self.draws.ends(token_B), None
        if self.hazards:
            reached_BE = jnp.asarray(model.exit_layers) <= at.depth_B[:, None]
            z_BE = jnp.where(reached_BE, at.hazard_logits_BE, jnp.nan)
        records = records.with_tokens(
            jnp.where(draws_B, at.job_B, jobs), at.index_B, token_B, at.depth_B, logprob_B,
            depth_logprob_B, z_BE, ends_B,
        )  # fmt: skip
        over_B = draws_B & (ends_B | (at.index_B + 1 >= self.draws.limit_at(at.job_B)))

        # Rows that are free, or have just become so, take the next completions in order.
        open_B = draws & at.here_B & ((at.job_B == FREE) | over_B)
        turn_B = pool.started[0] + jnp.cumsum(open_B) - 1
        begins_B = open_B & (turn_B < self.ready[0])
        started = pool.started + jnp.sum(begins_B, dtype=jnp.int32)
        next_B = self.jobs.order_J[jnp.minimum(turn_B, jobs - 1)]
        first_B = records.tokens_JT[next_B, 0]  # drawn by the prefill
        alive_B = begins_B & ~records.ended_J[next_B] & (self.draws.limit_at(next_B) > 1)
        job_B = jnp.where(open_B, jnp.where(alive_B, next_B, FREE), at.job_B)
        index_B = jnp.where(open_B, 1, at.index_B + draws_B)
        cache = self._copied(cache, at, alive_B, next_B)

        passes_B = draws & at.here_B & (job_B != FREE)
        token_B = jnp.where(open_B, first_B, token_B)
        h_BD = jax.lax.cond(
            draws, lambda: model.embed(token_B).astype(at.h_BD.dtype), lambda: at.h_BD
        )
        after = at.replace(job_B=job_B, index_B=index_B)
        depth_B = self._policy(after).start(job_B.shape, layers)
        after = after.replace(
            depth_B=jnp.where(passes_B, depth_B, at.depth_B),
            h_BD=jnp.where(passes_B[:, None], h_BD, at.h_BD),
            hazard_logits_BE=jnp.where(passes_B[:, None], 0.0, at.hazard_logits_BE),
        )
        return after, records, cache, started

    def _draw(self, at: TickRows) -> tuple[Array, Array, Array]:
        """Returns drawn tokens and the log-probabilities of the tokens and of their depths, [B]."""
        model = self.model
        logits_BV = constrain(head_logits(model.final_norm(at.h_BD), model.head_VD), ".V")
        sampling = self.draws.sampling.at(jnp.maximum(at.job_B, 0))
        token_B, logprob_B = sampling.draw(logits_BV, fold_in(self._keys(at), TOKEN_DRAW))
        depths = (*model.exit_layers, model.arch.layers)
        depth_logprob_B = self._policy(at).log_prob(at.depth_B, at.hazard_logits_BE, depths)
        return token_B, logprob_B, depth_logprob_B

    def _fill(self, at: TickRows, cache: Cache, fills_B: Array) -> tuple[TickRows, Cache]:
        """Runs the continuation in the skipped layers of rows `fills_B`; caches keys and values.

        Returns the rows and the cache. The rows in `fills_B` now have the residual after the last
        layer.
        """
        layers = self.model.arch.layers
        slot_B = self._slot(at)
        rope = rope_table(self.model.arch, slot_B[:, None])

        def skipped(block: Block, h_BD: Array) -> tuple[Array, KeysValues]:
            kv = self._keys_values(block, block.attn_norm(h_BD[:, None]), rope)
            return block.skipped(h_BD), kv

        def fill(layer: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            h_BD, cache = carry
            new_BD, kv = at_layer(layer, self.model.blocks, self.layers, skipped, h_BD)
            skips_B = fills_B & (at.depth_B <= layer)
            cache = cache.written(
                layer, at.cache_rows_B, jnp.where(skips_B, slot_B, cache.slots), kv
            )
            return jnp.where(skips_B[:, None], new_BD, h_BD), cache

        first = jnp.min(jnp.where(fills_B, at.depth_B, layers))
        with jax.named_scope(FILL_SCOPE):
            h_BD, cache = jax.lax.fori_loop(first, layers, fill, (at.h_BD, cache))
        return at.replace(h_BD=h_BD), cache

    def _copied(self, cache: Cache, at: TickRows, begins_B: Array, job_B: Array) -> Cache:
        """Returns the cache with the prompts' keys and values in rows whose completions begin.

        `begins_B` marks these rows, and `job_B` contains their completions.
        """

        def copy(_: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, left_B = carry
            begins = jnp.argmax(left_B)
            row, slot = at.cache_rows_B[begins], self.jobs.slot_J[job_B[begins]]
            return cache.with_row(row, self.prefixes, slot), left_B.at[begins].set(False)

        with jax.named_scope(COPY_SCOPE):
            return jax.lax.fori_loop(0, jnp.sum(begins_B), copy, (cache, begins_B))[0]

    def _run(self, at: TickRows, cache: Cache, segment: Array) -> tuple[TickRows, Cache]:
        """Runs the layers of `segment` that any row needs; decides which rows leave at its exit.

        Returns the rows with new residuals, depths and hazard logits, and the cache.
        """
        slot_B = self._slot(at)
        rope = rope_table(self.model.arch, slot_B[:, None])
        written_B = jnp.where(at.runs_B, slot_B, cache.slots)
        length_B = jnp.where(at.runs_B, slot_B + 1, 1)

        def inputs(block: Block, h_BD: Array) -> tuple[Array, KeysValues]:
            x_B1D = block.attn_norm(h_BD[:, None])
            q_B1NH = block.attn.queries(x_B1D, *rope, adapters=self.adapters, key=None)
            return q_B1NH[:, 0], self._keys_values(block, x_B1D, rope)

        def output(block: Block, h_BD: Array, mixed_BNH: Array) -> Array:
            return block.finish(h_BD[:, None], mixed_BNH[:, None], adapters=self.adapters)[:, 0]

        def layer_of(layer: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            h_BD, cache = carry
            q_BNH, kv = at_layer(layer, self.model.blocks, self.layers, inputs, h_BD)
            cache = cache.written(layer, at.cache_rows_B, written_B, kv)
            mixed_BNH = cache.attend(layer, at.rows_B, q_BNH, length_B)
            new_BD = at_layer(layer, self.model.blocks, self.layers, output, h_BD, mixed_BNH)
            return jnp.where((layer < at.depth_B)[:, None], new_BD, h_BD), cache

        first, end = self.segments.starts_Y[segment], self.segments.ends_Y[segment]
        deepest = jnp.max(jnp.where(at.runs_B, at.depth_B, 0))
        with jax.named_scope(LAYERS_SCOPE):
            h_BD, cache = jax.lax.fori_loop(
                first, jnp.minimum(end, deepest), layer_of, (at.h_BD, cache)
            )
        at = at.replace(h_BD=h_BD)
        if not self.reads_hazards or self.segments.count == 1:
            return at, cache

        def at_exit(at: TickRows) -> tuple[Array, Array]:
            z_B = self.model.exits(at.h_BD, segment)
            keys_B = fold_in(self._keys(at), 1 + segment)
            leaves_B = self._policy(at).leaves_by_row(z_B, keys_B) & (end < at.depth_B)
            z_BE = jax.lax.dynamic_update_slice(
                at.hazard_logits_BE, z_B[:, None], (jnp.zeros((), jnp.int32), segment)
            )
            return jnp.where(leaves_B, end, at.depth_B), z_BE

        depth_B, z_BE = jax.lax.cond(
            segment < self.segments.count - 1,
            at_exit,
            lambda at: (at.depth_B, at.hazard_logits_BE),
            at,
        )
        return at.replace(depth_B=depth_B, hazard_logits_BE=z_BE), cache

    def _keys_values(self, block: Block, x_B1D: Array, rope: tuple[Array, Array]) -> KeysValues:
        return block.attn.keys_values(x_B1D, *rope, adapters=self.adapters, key=None)

    def _slot(self, at: TickRows) -> Int[Array, "B"]:
        """Returns the cache slot of each row's current token: its position in the sequence."""
        return self.jobs.prompt_length_J[jnp.maximum(at.job_B, 0)] + at.index_B - 1

    def _policy(self, at: TickRows) -> Policy:
        """Returns the policy for each row's current token."""
        known_B = jnp.maximum(at.job_B, 0)
        return self.policy.at(known_B, at.index_B + self.jobs.forced_J[known_B])

    def _keys(self, at: TickRows) -> Array:
        return self.draws.keys(self.jobs, jnp.maximum(at.job_B, 0), at.index_B)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "tick_rows", "adapters", "hazards"),
    donate_argnames=("pool", "records"),
)
def advance(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    layers: LayerWeights | None,
    pool: Pool,
    records: Records,
    prefixes: Cache,
    jobs: Jobs,
    ready: Int[Array, "shards"],
    more: Bool[Array, "shards"],
    steps: Int[Array, ""],
    policy: Policy,
    draws: Draws,
    *,
    tick_rows: int,
    adapters: bool,
    hazards: bool,
) -> tuple[Pool, Records, Status]:
    """Runs ticks until all completions have ended or the host has to act.

    The host has to act in two cases: a row needs a larger cache; or a row is free, all `ready`
    (prefilled) completions of the row's data shard have begun, and `more` is True because further
    completions are to come. The ticks also stop when `steps` of them have drawn tokens. One tick of
    a shard runs up to `tick_rows` rows.
    """

    def local(
        pool: Pool, records: Records, more: Array, steps: Array, *held: Any
    ) -> tuple[Pool, Records, Status]:
        ticks = Ticks(graphdef, *held, tick_rows=tick_rows, adapters=adapters, hazards=hazards)

        def goes_on(carry: tuple[Pool, Records, Array]) -> Array:
            pool, _, drawn = carry
            free = jnp.any(pool.job_P == FREE)
            waiting = pool.started[0] < ticks.ready[0]
            busy = jnp.any(pool.job_P != FREE) | (free & waiting)
            starved = free & ~waiting & more[0]
            return busy & ~starved & ~ticks.full(pool) & (drawn < steps)

        def tick(carry: tuple[Pool, Records, Array]) -> tuple[Pool, Records, Array]:
            pool, records, drawn = carry
            pool, records, draws = ticks.tick(pool, records)
            return pool, records, drawn + draws

        pool, records, _ = jax.lax.while_loop(
            goes_on, tick, (pool, records, jnp.zeros((), jnp.int32))
        )
        status = Status(
            started=pool.started,
            under_way=jnp.sum(pool.job_P != FREE, keepdims=True).astype(jnp.int32),
            full=ticks.full(pool)[None],
            filled=pool.filled,
            offered=pool.offered,
        )
        return pool, records, status

    carried, rows, whole = specs((pool, records)), rows_spec(), P()
    by_row = jax.tree.map(lambda leaf: rows if jnp.ndim(leaf) else whole, policy)
    stepped = by_shard(
        local,
        in_specs=(
            *carried, rows, whole, whole, whole, *specs((prefixes, jobs)), rows, by_row, whole
        ),
        out_specs=(*carried, rows),
    )  # fmt: skip
    pool, records, status = stepped(
        pool, records, more, steps, states, layers, prefixes, jobs, ready, policy, draws
    )
    return pool, records, jax.tree.map(lambda part: constrain(part, "."), status)
