"""In what order work is done: prompts by their shards, and the rows of a pool by their segments.

Prompts are prefilled in groups of like length, the shortest first. The exits cut the stack into
segments. A tick runs one segment for as many sequences as it has places for; the weights of its
layers are read once for all of them. Segment 0 begins with the drawing of tokens: a sequence that
has left, or has run the last segment, draws its token and goes on with that through segment 0 in
the same tick, for nobody leaves before the first exit.
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

# Places of a tick. With fewer than the first, a layer's products take no less time: reading its
# weights is what they wait for (peak FLOP/s over bandwidth). More than the second gain nothing.
PLACES = {"cpu": (16, 128), "gpu": (256, 512), "tpu": (256, 512)}
ROWS_A_PLACE = 3  # of the pool: what waits at other segments while a tick's places fill
# Positions of one prefill, of each data shard. More of them read weights less often, and pad more.
PREFILL_TOKENS = {"cpu": 512, "gpu": 2048, "tpu": 2048}
GROUP_PARTS = (1, 2, 4)  # of the rows that so many positions hold, what a prefill may have
CALL_SHARE = 1 / 16  # of these positions: what a call costs, which reads all weights
# Of an accelerator's memory, for a pool's keys and values; the prompts' take up to as much again.
CACHE_SHARE = 0.3
LEAST_COLUMNS = 128  # tokens that a completion's records have room for: four numbers each
# A sequence that has waited for more ticks than this times the segments is overdue: the oldest of
# these goes next, however few wait with it.
PATIENCE = 4


AUTOMATIC = EngineSize()


def fitted(size: EngineSize, jobs: int, row_bytes: int = 0) -> tuple[int, int]:
    """(rows, places) of a shard for `jobs` completions, each with `row_bytes` of cache.

    A tick with few places takes as long as one with more (`PLACES`), so few completions are best
    run all at once. On CPUs, `size.rows` alone limits the pool's memory.
    """
    platform = target().platform
    least, most = PLACES[platform]
    rows = min(size.rows or ROWS_A_PLACE * (size.places or most), jobs)
    if platform != "cpu" and row_bytes and not size.rows:
        memory = int(CACHE_SHARE * chip().memory_gib * 2**30)
        rows = max(1, min(rows, memory // row_bytes))
    places = size.places or min(max(-(-rows // ROWS_A_PLACE), least), most)
    return rows, min(places, rows)


def prompts_bucket(prompts: int, samples: int) -> int:
    """The number of a shard's prompts, rounded up to one that programs are compiled for.

    Twice as many from one bucket to the next as long as a tick takes no longer for their
    completions (`PLACES`), then four sizes an octave.
    """
    doubled = 1 << (prompts - 1).bit_length()
    free = doubled * samples <= PLACES[target().platform][0]
    return doubled if free else bucket(prompts, 1)


def columns_bucket(tokens: int) -> int:
    """The tokens of a completion that programs are compiled for."""
    return bucket(tokens, LEAST_COLUMNS)


@dataclasses.dataclass(frozen=True)
class Group:
    """A prefill of each shard: prompts, rows of the program for them, slots of each."""

    prompts: int
    rows: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which shard has which prompts, and in what order they begin: the shortest first.

    Prompts lie in their shard in the caller's order, n to a shard; the last shards may have fewer.
    Programs are compiled for a bucket of n, whose last prompts no shard has. A shard's prompts are
    prefilled in groups of like length, and lie in a ring of `prefixes` slots.
    """

    length_SP: np.ndarray  # 0 where a shard has fewer prompts
    forced_SP: np.ndarray  # of these lengths, the forced prefixes
    samples: int
    rows: int
    places: int

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
        """For up to `new` tokens a completion, each of which takes so much of a device's cache."""
        shards = data_shards()
        most_prompts = -(-len(length_B) // shards)
        beyond = prompts_bucket(most_prompts, samples) - most_prompts

        def by_shard(values_B: np.ndarray) -> np.ndarray:
            filled_B = np.pad(values_B, (0, shards * most_prompts - len(values_B)))
            return np.pad(filled_B.reshape(shards, most_prompts), ((0, 0), (0, beyond)))

        slots = prompt_bucket(int(length_B.max()))
        most = cache_bucket(slots + new - 1, slots + new - 1)
        rows, places = fitted(size, (most_prompts + beyond) * samples, most * token_bytes)
        forced_B = np.zeros_like(length_B) if forced_B is None else forced_B
        return cls(by_shard(length_B), by_shard(forced_B), samples, rows, places)

    @property
    def shards(self) -> int:
        return self.length_SP.shape[0]

    @property
    def prompts(self) -> int:
        """That programs are compiled for, a shard."""
        return self.length_SP.shape[1]

    @property
    def most_prompts(self) -> int:
        """Of the shard with the most."""
        return int(self.prompts_S.max())

    @property
    def jobs(self) -> int:
        return self.prompts * self.samples

    @functools.cached_property
    def prompts_S(self) -> np.ndarray:
        return np.sum(self.length_SP > 0, axis=1)

    @property
    def jobs_S(self) -> np.ndarray:
        return self.prompts_S * self.samples

    @property
    def job_B(self) -> np.ndarray:
        """The jobs, counted over all shards, that are the caller's completions, in their order."""
        return np.flatnonzero(np.repeat(self.length_SP.reshape(-1) > 0, self.samples))

    def by_job(self, values_BX: np.ndarray) -> np.ndarray:
        """A value of each of the caller's completions as one of each job; 0 for the others."""
        values_JX = np.zeros((self.shards * self.jobs, *values_BX.shape[1:]), values_BX.dtype)
        values_JX[self.job_B] = values_BX
        return values_JX

    @functools.cached_property
    def order_SP(self) -> np.ndarray:
        """Prompts of each shard in the order in which they begin; those that it lacks are last."""
        length_SP = np.where(self.length_SP > 0, self.length_SP, np.iinfo(np.int32).max)
        return np.argsort(length_SP, axis=1, kind="stable")

    @functools.cached_property
    def groups(self) -> dict[int, Group]:
        """The prefills, by the turn of their first prompt: the cheapest of few sizes.

        A group runs as many slots as its longest prompt needs, and rows of `GROUP_PARTS` of what
        fits a prefill, so that a bucket of lengths has as many programs as there are parts,
        whatever batch comes. Left over rows and slots are paid for, and so is every call.
        """
        tokens, prompts = PREFILL_TOKENS[target().platform], self.most_prompts
        length_ST = np.take_along_axis(self.length_SP, self.order_SP[:, :prompts], axis=1)
        # The last prompt of one shard may be shorter than that before it of one that has fewer.
        longest_T = np.maximum.accumulate(length_ST.max(axis=0))
        slots_T = [prompt_bucket(int(length)) for length in longest_T]
        cost, last = [0.0], [Group(0, 0, 0)]  # of the first n prompts, and the group they end with
        for stop, slots in enumerate(slots_T, start=1):
            most = min(max(tokens // slots, 1), self.prompts)
            options = []
            for rows in sorted({-(-most // parts) for parts in GROUP_PARTS}):
                group = Group(min(rows, stop), rows, slots)
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
        """Slots of the prefix cache: prompts that begin at once, and a group to go on with."""
        largest = max(group.rows for group in self.groups.values())
        return min(self.prompts, -(-self.rows // self.samples) + largest)

    @property
    def prompt_slots(self) -> int:
        return prompt_bucket(int(self.length_SP.max()))

    def first_slots(self, most: int) -> int:
        """Slots of the initial cache: the longest prompt and some room, within the final `most`."""
        slots = self.prompt_slots + max(16, self.prompt_slots // 8)
        return cache_bucket(min(slots, most), most)

    def has_room(self, prefilled: int, started_S: np.ndarray) -> bool:
        """Whether the ring holds another group: prompts all of whose completions have begun go."""
        begun_S = np.where(started_S >= self.jobs_S, self.prompts, started_S // self.samples)
        return prefilled + self.groups[prefilled].prompts - self.prefixes <= int(begun_S.min())

    def group(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(prompts, their lengths) of the group that begins at `first`, of every shard.

        A prompt that does not exist has the number `prompts` and length 1.
        """
        group = self.groups[first]
        turn = first + np.arange(group.rows)
        index_SB = self.order_SP[:, np.minimum(turn, self.prompts - 1)]
        length_SB = np.take_along_axis(self.length_SP, index_SB, axis=1)
        exists_SB = (length_SB > 0) & (turn < first + group.prompts)
        index_SB = np.where(exists_SB, index_SB, self.prompts).astype(np.int32)
        return index_SB, np.where(exists_SB, length_SB, 1).astype(np.int32)

    def jobs_from(self, first_prompt: int) -> Jobs:
        """The completions of all shards."""
        shards, samples = self.shards, self.samples
        turn_SP = np.argsort(self.order_SP, axis=1)
        first_S1 = first_prompt + np.arange(shards)[:, None] * self.most_prompts
        sample_G = np.arange(samples)

        def by_job(values_SP: np.ndarray) -> np.ndarray:
            return np.repeat(values_SP.reshape(-1), samples).astype(np.int32)

        order_SPG = self.order_SP[:, :, None] * samples + sample_G
        return Jobs(
            number_J=by_job(first_S1 + np.arange(self.prompts)),
            sample_J=np.tile(sample_G, shards * self.prompts).astype(np.int32),
            prompt_length_J=by_job(self.length_SP),
            forced_J=by_job(self.forced_SP),
            slot_J=by_job(turn_SP % self.prefixes),
            order_J=order_SPG.reshape(-1).astype(np.int32),
        )


@dataclasses.dataclass(frozen=True)
class Segments:
    """Layers `bounds[s]` … `bounds[s + 1]` − 1 are segment s."""

    bounds: tuple[int, ...]
    head: float  # what drawing a token costs, in layers

    @classmethod
    def of(
        cls, arch: Architecture, exit_layers: tuple[int, ...], policy: Policy, *, hazards: bool
    ) -> Segments:
        """Of the exits; one segment of all layers where nobody leaves and nobody reads hazards."""
        inner = exit_layers if hazards or policy.leaves_early else ()
        heads = 2 * arch.head_dim * (arch.query_heads + arch.kv_heads)
        layer = arch.width * (heads + 3 * arch.mlp_width)
        return cls((0, *inner, arch.layers), arch.vocab_size * arch.width / layer)

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def starts_S(self) -> Array:
        return jnp.asarray(self.bounds[:-1], jnp.int32)

    @property
    def ends_S(self) -> Array:
        return jnp.asarray(self.bounds[1:], jnp.int32)

    @property
    def costs_S(self) -> np.ndarray:
        """Of a tick at each segment, in layers."""
        layers = [end - start for start, end in pairwise(self.bounds)]
        return np.asarray([layers[0] + self.head, *layers[1:]], np.float32)


def choose(
    segments: Segments,
    segment_P: Int[Array, "P"],
    waits_P: Bool[Array, "P"],
    since_P: Int[Array, "P"],
    tick: Int[Array, ""],
    places: int,
) -> Int[Array, ""]:
    """The segment to run for so many `places`, among the rows that wait.

    A tick with n of W places filled wastes cost · (W − n) / n per filled place. The segment with
    the least waste runs first (on ties the deepest), unless a row has waited for too long: then
    the segment of the row that has waited longest does.
    """
    count = segments.count
    if count == 1:
        return jnp.zeros((), jnp.int32)
    at_SP = (segment_P == jnp.arange(count)[:, None]) & waits_P
    filled_S = jnp.minimum(jnp.sum(at_SP, axis=1), places).astype(jnp.float32)
    waste_S = segments.costs_S * (places - filled_S) / filled_S
    waste_S = jnp.where(filled_S > 0, waste_S, jnp.inf)
    least = count - 1 - jnp.argmin(waste_S[::-1])
    age_P = jnp.where(waits_P, tick - since_P, -1)
    oldest = jnp.argmax(age_P)
    overdue = age_P[oldest] > PATIENCE * count
    return jnp.where(overdue, segment_P[oldest], least).astype(jnp.int32)


def pick(
    here_P: Bool[Array, "P"], since_P: Int[Array, "P"], tick: Int[Array, ""], places: int
) -> tuple[Int[Array, "B"] | None, Bool[Array, "B"]]:
    """(the rows that take the places, which of them belong there), those that waited longest first.

    None instead of rows when there is a place for each.
    """
    if places == here_P.shape[0]:
        return None, here_P
    priority_P = jnp.where(here_P, tick - since_P + 1, 0)
    priority_B, rows_B = jax.lax.top_k(priority_P, places)
    return rows_B.astype(jnp.int32), priority_B > 0
