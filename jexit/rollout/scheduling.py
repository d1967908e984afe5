"""Scheduling of the decoding engine: which prompts to prefill, and which segment a tick runs.

Prompts are prefilled in groups of similar length, the shortest first. The exits divide the stack of
layers into segments. A tick of the decoding engine runs one segment for a limited number of rows
and reads the weights of the segment's layers once for all of them. A tick of segment 0 begins by
drawing tokens: a row that has left at an exit, or has run the last segment, draws its token. In the
same tick the new token runs through segment 0, because no token can leave before the first exit.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array, Bool, Int
from jexit.config import EngineSize
from jexit.dist import data_shards
from jexit.kernels.chips import chip
from jexit.kernels.dispatch import target
from jexit.model.cache import bucket, cache_bucket, prompt_bucket
from jexit.model.policies import Policy
from jexit.presets import Architecture
from jexit.rollout.pool import Jobs

# The (least, most) rows of a tick. With fewer than the least, a layer's products take no less time,
# because they wait for its weights (peak FLOP/s over bandwidth). More than the most gain nothing.
TICK_ROWS = {"cpu": (16, 128), "gpu": (256, 512), "tpu": (256, 512)}
POOL_ROWS_PER_TICK_ROW = 3  # rows of the pool per row of a tick: some wait at other segments
# Positions of one prefill on each data shard. More positions read the weights less often, but add
# more padding.
PREFILL_TOKENS = {"cpu": 512, "gpu": 2048, "tpu": 2048}
GROUP_PARTS = (1, 2, 4)  # a prefill has the rows that fit these positions, divided by one of these
CALL_SHARE = 1 / 16  # cost of a call, which reads all weights, as a fraction of these positions
# Share of an accelerator's memory for the pool's keys and values. Those of the prompts take up to
# the same amount again.
CACHE_SHARE = 0.3
LEAST_COLUMNS = 128  # least tokens per completion in the records, which have four numbers per token
# A row is overdue if it has waited for more than PATIENCE ticks per segment. The segment of the
# oldest overdue row runs next, even if few other rows wait there.
PATIENCE = 4


AUTOMATIC = EngineSize()


def fitted(size: EngineSize, jobs: int, row_bytes: int = 0) -> tuple[int, int]:
    """Returns (rows of the pool, rows of a tick) of one data shard for `jobs` completions.

    `row_bytes` is the size of the KV cache of one row. A tick with fewer rows than the lower number
    in `TICK_ROWS` takes no less time, so a few completions are best run all at once. On CPUs, only
    `size.rows` limits the memory of the pool.
    """
    platform = target().platform
    least, most = TICK_ROWS[platform]
    rows = min(size.rows or POOL_ROWS_PER_TICK_ROW * (size.tick_rows or most), jobs)
    if platform != "cpu" and row_bytes and not size.rows:
        memory = int(CACHE_SHARE * chip().memory_gib * 2**30)
        rows = max(1, min(rows, memory // row_bytes))
    tick_rows = size.tick_rows or min(max(-(-rows // POOL_ROWS_PER_TICK_ROW), least), most)
    return rows, min(tick_rows, rows)


def prompts_bucket(prompts: int, samples: int) -> int:
    """Rounds a shard's number of prompts up to the next number that programs are compiled for.

    These numbers are powers of two as long as the additional completions (`samples` per prompt) do
    not make a tick slower (`TICK_ROWS`). Beyond that, there are four numbers per doubling.
    """
    doubled = 1 << (prompts - 1).bit_length()
    free = doubled * samples <= TICK_ROWS[target().platform][0]
    return doubled if free else bucket(prompts, 1)


def columns_bucket(tokens: int) -> int:
    """Returns the number of columns (one per token) to allocate for up to `tokens` per completion.

    Programs are compiled for few numbers: multiples of 128 up to 1,024, and above that four per
    doubling, without an upper limit. The result is the smallest of them that is at least `tokens`.
    """
    return bucket(tokens, LEAST_COLUMNS)


@dataclasses.dataclass(frozen=True)
class PrefillGroup:
    """One prefill on each data shard: `prompts` prompts, padded to `rows` × `slots` tokens."""

    prompts: int
    rows: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The division of the prompts over data shards, and the order in which prompts begin.

    Each shard has n prompts, in the caller's order; the last shards may have fewer. Programs are
    compiled for n rounded up to a bucket, so a shard's last prompts may be padding. The prompts are
    prefilled in groups of similar length, the shortest first, into a ring buffer of `prefixes`
    cache slots.
    """

    length_ZQ: np.ndarray  # 0 where a shard has fewer prompts
    forced_ZQ: np.ndarray  # lengths of the forced prefixes, which are part of length_ZQ
    samples: int
    rows: int
    tick_rows: int

    @classmethod
    def of(
        cls,
        length_B: np.ndarray,
        samples: int,
        size: EngineSize,
        *,
        token_bytes: int,
        new: int,
        forced_B: np.ndarray | None = None,
    ) -> Layout:
        """Divides prompts of lengths `length_B` over data shards, for `new` tokens per completion.

        There are `samples` completions per prompt. `token_bytes` is the size of a token in the KV
        cache, and `forced_B` contains the lengths of forced prefixes (None: no prefixes).
        """
        shards = data_shards()
        most_prompts = -(-len(length_B) // shards)
        beyond = prompts_bucket(most_prompts, samples) - most_prompts

        def by_shard(values_B: np.ndarray) -> np.ndarray:
            filled_B = np.pad(values_B, (0, shards * most_prompts - len(values_B)))
            return np.pad(filled_B.reshape(shards, most_prompts), ((0, 0), (0, beyond)))

        slots = prompt_bucket(int(length_B.max()))
        most = cache_bucket(slots + new - 1, slots + new - 1)
        rows, tick_rows = fitted(size, (most_prompts + beyond) * samples, most * token_bytes)
        forced_B = np.zeros_like(length_B) if forced_B is None else forced_B
        return cls(by_shard(length_B), by_shard(forced_B), samples, rows, tick_rows)

    @property
    def shards(self) -> int:
        return self.length_ZQ.shape[0]

    @property
    def prompts(self) -> int:
        """The number of prompts per shard that programs are compiled for."""
        return self.length_ZQ.shape[1]

    @property
    def most_prompts(self) -> int:
        """The largest number of prompts on any shard."""
        return int(self.prompts_Z.max())

    @property
    def jobs(self) -> int:
        return self.prompts * self.samples

    @functools.cached_property
    def prompts_Z(self) -> np.ndarray:
        return np.sum(self.length_ZQ > 0, axis=1)

    @property
    def jobs_Z(self) -> np.ndarray:
        return self.prompts_Z * self.samples

    @property
    def job_B(self) -> np.ndarray:
        """The indices of the caller's completions among the jobs of all shards, without padding."""
        return np.flatnonzero(np.repeat(self.length_ZQ.reshape(-1) > 0, self.samples))

    def by_job(self, values_BX: np.ndarray) -> np.ndarray:
        """Reorders the caller's values [B, ...] into job order [J, ...]; padding jobs get 0.

        There is one entry per completion.
        """
        values_JX = np.zeros((self.shards * self.jobs, *values_BX.shape[1:]), values_BX.dtype)
        values_JX[self.job_B] = values_BX
        return values_JX

    @functools.cached_property
    def order_ZQ(self) -> np.ndarray:
        """The indices of each shard's prompts in the order in which they start; padding is last."""
        length_ZQ = np.where(self.length_ZQ > 0, self.length_ZQ, np.iinfo(np.int32).max)
        return np.argsort(length_ZQ, axis=1, kind="stable")

    @functools.cached_property
    def groups(self) -> dict[int, PrefillGroup]:
        """The division of the prompts into prefill groups that has the least total cost.

        The keys are the positions of the groups' first prompts in `order_ZQ`. A group has the slots
        that its longest prompt needs, and either all rows that fit a prefill or a fraction of them
        (`GROUP_PARTS`), so that few programs are compiled for any batch. The cost is rows times
        slots, including padding, plus a fixed cost per call.
        """
        tokens, prompts = PREFILL_TOKENS[target().platform], self.most_prompts
        ordered_ZQ = np.take_along_axis(self.length_ZQ, self.order_ZQ[:, :prompts], axis=1)
        # The last prompt of one shard may be shorter than an earlier prompt of a shard with fewer.
        longest_Q = np.maximum.accumulate(ordered_ZQ.max(axis=0))
        slots_Q = [prompt_bucket(int(length)) for length in longest_Q]
        # Of the first n prompts: the least cost, and the last group at this cost.
        cost, last = [0.0], [PrefillGroup(0, 0, 0)]
        for stop, slots in enumerate(slots_Q, start=1):
            most = min(max(tokens // slots, 1), self.prompts)
            options = []
            for rows in sorted({-(-most // parts) for parts in GROUP_PARTS}):
                group = PrefillGroup(min(rows, stop), rows, slots)
                spent = rows * slots + CALL_SHARE * tokens
                options.append((cost[stop - group.prompts] + spent, group))
            cheapest, group = min(options, key=operator.itemgetter(0))
            cost.append(cheapest)
            last.append(group)
        groups, stop = {}, prompts
        while stop:
            group = last[stop]
            stop -= group.prompts
            groups[stop] = group
        return dict(sorted(groups.items()))

    @functools.cached_property
    def prefixes(self) -> int:
        """The number of prompts in the prefix cache: enough for the pool and one more group."""
        largest = max(group.rows for group in self.groups.values())
        return min(self.prompts, -(-self.rows // self.samples) + largest)

    @property
    def prompt_slots(self) -> int:
        return prompt_bucket(int(self.length_ZQ.max()))

    def first_slots(self, most: int) -> int:
        """Returns the slots per row of the initial cache: the longest prompt plus some room.

        `most` is the number of slots that a row may need at the end.
        """
        slots = self.prompt_slots + max(16, self.prompt_slots // 8)
        return cache_bucket(min(slots, most), most)

    def has_room(self, prefilled: int, started_Z: np.ndarray) -> bool:
        """Returns whether the prefix cache has free slots for the prompts of `groups[prefilled]`.

        `prefilled` is the number of prompts that each shard has prefilled, and `started_Z` is the
        number of completions that have begun on each shard. A prompt's slot is free once all its
        completions have begun.
        """
        begun_Z = np.where(started_Z >= self.jobs_Z, self.prompts, started_Z // self.samples)
        return prefilled + self.groups[prefilled].prompts - self.prefixes <= int(begun_Z.min())

    def group(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices and lengths [Z, B] of each shard's prompts in `groups[first]`.

        Padding has the index `prompts` and the length 1.
        """
        group = self.groups[first]
        turn = first + np.arange(group.rows)
        index_ZB = self.order_ZQ[:, np.minimum(turn, self.prompts - 1)]
        length_ZB = np.take_along_axis(self.length_ZQ, index_ZB, axis=1)
        exists_ZB = (length_ZB > 0) & (turn < first + group.prompts)
        index_ZB = np.where(exists_ZB, index_ZB, self.prompts).astype(np.int32)
        return index_ZB, np.where(exists_ZB, length_ZB, 1).astype(np.int32)

    def jobs_from(self, first_prompt: int) -> Jobs:
        """Returns the decoding jobs of all shards, with prompts numbered from `first_prompt`."""
        shards, samples = self.shards, self.samples
        turn_ZQ = np.argsort(self.order_ZQ, axis=1)
        first_Z1 = first_prompt + np.arange(shards)[:, None] * self.most_prompts
        sample_G = np.arange(samples)

        def by_job(values_ZQ: np.ndarray) -> np.ndarray:
            return np.repeat(values_ZQ.reshape(-1), samples).astype(np.int32)

        order_ZQG = self.order_ZQ[:, :, None] * samples + sample_G
        return Jobs(
            number_J=by_job(first_Z1 + np.arange(self.prompts)),
            sample_J=np.tile(sample_G, shards * self.prompts).astype(np.int32),
            prompt_length_J=by_job(self.length_ZQ),
            forced_J=by_job(self.forced_ZQ),
            slot_J=by_job(turn_ZQ % self.prefixes),
            order_J=order_ZQG.reshape(-1).astype(np.int32),
        )


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of the layer stack; segment s has layers `bounds[s]` to `bounds[s + 1]` − 1."""

    bounds: tuple[int, ...]
    head: float  # the cost of drawing a token, in layers

    @classmethod
    def of(
        cls, arch: Architecture, exit_layers: tuple[int, ...], policy: Policy, *, hazards: bool
    ) -> Segments:
        """Divides the stack at its exits, or makes one segment of all layers if no exit is used.

        Exits are used if `policy` may leave early or if `hazards` are recorded.
        """
        inner = exit_layers if hazards or policy.leaves_early else ()
        heads = 2 * arch.head_dim * (arch.query_heads + arch.kv_heads)
        layer = arch.width * (heads + 3 * arch.mlp_width)
        return cls((0, *inner, arch.layers), arch.vocab_size * arch.width / layer)

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def starts_Y(self) -> Array:
        return jnp.asarray(self.bounds[:-1], jnp.int32)

    @property
    def ends_Y(self) -> Array:
        return jnp.asarray(self.bounds[1:], jnp.int32)

    @property
    def costs_Y(self) -> np.ndarray:
        """The cost of one row in a tick of each segment, in units of one layer.

        The cost of segment 0 includes drawing a token.
        """
        layers = [end - start for start, end in pairwise(self.bounds)]
        return np.asarray([layers[0] + self.head, *layers[1:]], np.float32)


def choose(
    segments: Segments,
    segment_P: Int[Array, "P"],
    waits_P: Bool[Array, "P"],
    since_P: Int[Array, "P"],
    tick: Int[Array, ""],
    tick_rows: int,
) -> Int[Array, ""]:
    """Chooses the segment that the next tick runs, given the segment for which each row waits.

    A tick of cost c with n of w = `tick_rows` rows filled wastes c · (w − n) / n per filled row.
    The segment with the least waste is chosen (in a tie, the deepest), unless some row is overdue
    (`PATIENCE`); then it is the segment of the longest-waiting row.
    """
    count = segments.count
    if count == 1:
        return jnp.zeros((), jnp.int32)
    at_YP = (segment_P == jnp.arange(count)[:, None]) & waits_P
    filled_Y = jnp.minimum(jnp.sum(at_YP, axis=1), tick_rows).astype(jnp.float32)
    waste_Y = segments.costs_Y * (tick_rows - filled_Y) / filled_Y
    waste_Y = jnp.where(filled_Y > 0, waste_Y, jnp.inf)
    least = count - 1 - jnp.argmin(waste_Y[::-1])
    age_P = jnp.where(waits_P, tick - since_P, -1)
    oldest = jnp.argmax(age_P)
    overdue = age_P[oldest] > PATIENCE * count
    return jnp.where(overdue, segment_P[oldest], least).astype(jnp.int32)


def pick(
    here_P: Bool[Array, "P"], since_P: Int[Array, "P"], tick: Int[Array, ""], tick_rows: int
) -> tuple[Int[Array, "B"] | None, Bool[Array, "B"]]:
    """Returns the rows of a tick, longest-waiting first, and a mask of rows that do work.

    A tick has `tick_rows` rows. `here_P` is True for rows that wait for the tick's segment. The
    mask is False for other rows, which only fill up the tick. If a tick holds every row of the
    pool, returns (None, `here_P`).
    """
    if tick_rows == here_P.shape[0]:
        return None, here_P
    priority_P = jnp.where(here_P, tick - since_P + 1, 0)
    priority_B, rows_B = jax.lax.top_k(priority_P, tick_rows)
    return rows_B.astype(jnp.int32), priority_B > 0
