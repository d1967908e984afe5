"""The decoding engine's host side: rollouts, evaluation and `generate` all run through it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import nnx

from jexit.config import EngineSize
from jexit.dist import (
    fetch_rows,
    gather,
    gathered_width,
    host_rows,
    place_rows,
    waiting,
    whole,
)
from jexit.model.cache import cache_bucket, token_bytes
from jexit.model.policies import Policy
from jexit.model.transformer import Transformer
from jexit.rollout import pool, prefill, ticks
from jexit.rollout.pool import Jobs, Records, Status
from jexit.rollout.prefill import ForcedPrefix
from jexit.rollout.requests import Request
from jexit.rollout.results import Efficiency, Rollouts
from jexit.rollout.sampling import Draws
from jexit.rollout.scheduling import AUTOMATIC, Layout, columns_bucket
from jexit.rollout.weights import KEPT, LayerWeights, apart, on_cpu

T = TypeVar("T")
SplitModel: TypeAlias = tuple[Any, ...]  # (graphdef, *states) as `nnx.split` returns them

NO_LIMIT = np.int32(2**31 - 1)


def rollout(
    model: Transformer | SplitModel,
    prompts: Sequence[Sequence[int]],
    *,
    size: EngineSize = AUTOMATIC,
    **settings: Any,
) -> Rollouts:
    """Completes prompts as `Request(prompts=prompts, **settings)` says; one prefill for each.

    `model` is a `Transformer` or what `nnx.split(model, ...)` returned, which saves the splitting
    in a training loop; new parameter values never recompile. Raises UserError for what the model
    cannot do (`Request.check`), or when `Prescribed` has another number of rows or too few columns.
    """
    decoding = Decoding(model, Request(prompts=prompts, **settings), size)
    while not decoding.turn():
        pass
    return decoding.rollouts()


class Engine:
    """A model, and a pool of its completions on the device.

    The pool, its records and the prefix cache are made by `open`. `compiling` is how many seconds
    went by for compilations.
    """

    def __init__(self, model: Transformer | SplitModel, *, adapters: bool, hazards: bool) -> None:
        self.compiling = 0.0
        self.graphdef, *states = nnx.split(model) if isinstance(model, nnx.Module) else model
        self.states, self.adapters, self.hazards = tuple(states), adapters, hazards
        self._layers: LayerWeights | None = None  # taken apart when there is a first tick
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.shape["fsdp"] > 1:  # weights whole along the model width
            self.states = self._timed(gathered_width, lambda: gathered_width(self.states))
        self.model: Transformer = nnx.merge(self.graphdef, *self.states)

    def open(self, *, rows: int, slots: int, most: int, places: int, **sizes: int) -> None:
        """Creates an empty pool whose caches have `slots` per row and grow up to `most`.

        `sizes` are the other arguments of `pool.empty`.
        """
        self.slots, self._most, self._places, self._compiled_slots = slots, most, places, 0
        sizes |= {"rows": rows, "slots": slots, "hazards": self.hazards}
        self.pool, self.records, self.prefixes = self._timed(
            pool.empty, lambda: pool.empty(self.graphdef, self.states, **sizes)
        )

    def prefill(
        self, jobs: Jobs, prompts: tuple, draws: Draws, forced: ForcedPrefix | None, samples: int
    ) -> None:
        """Runs prompts, given as (tokens, lengths, numbers) of `jexit.rollout.prefill.prefill`."""
        self.prefixes, self.records = self._timed(
            prefill.prefill,
            lambda: prefill.prefill(
                self.graphdef, self.states, self.prefixes, self.records, jobs, *prompts, draws,
                forced, samples=samples, adapters=self.adapters,
            ),
        )  # fmt: skip

    def advance(
        self, jobs: Jobs, ready: Any, more: Any, steps: int | None, policy: Policy, draws: Draws
    ) -> Status:
        """Ticks until the host has something to do, or for so many steps that draw tokens."""
        if self._layers is None and on_cpu():
            self._layers = self._timed(apart, lambda: KEPT.of(self.graphdef, self.states))

        def run(steps: np.int32) -> Status:
            self.pool, self.records, status = ticks.advance(
                self.graphdef, self.states, self._layers, self.pool, self.records, self.prefixes,
                jobs, ready, more, steps, policy, draws, places=self._places,
                adapters=self.adapters, hazards=self.hazards,
            )  # fmt: skip
            return status

        if self.slots != self._compiled_slots:  # no ticks: what it takes is the compilation
            self._timed(ticks.advance, lambda: run(np.int32(0)))
            self._compiled_slots = self.slots
        with waiting("the rollouts"):
            return jax.device_get(run(NO_LIMIT if steps is None else np.int32(steps)))

    def grow(self) -> None:
        """Gives the rows larger caches."""
        self.slots = cache_bucket(self.slots + 1, self._most)
        cache = self._timed(pool.grown, lambda: pool.grown(self.pool.cache, slots=self.slots))
        self.pool = dataclasses.replace(self.pool, cache=cache)

    def cut(self, length_J: Any) -> None:
        """Ends each completion after `length_J` of its tokens; 0 leaves it unchanged."""
        self.pool, self.records = self._timed(
            pool.cut, lambda: pool.cut(self.pool, self.records, length_J)
        )

    def _timed(self, program: Any, run: Callable[[], T]) -> T:
        """Runs it; if that compiled the program, its time counts as compilation."""
        known, began = program._cache_size(), time.perf_counter()
        with waiting("the rollouts"):
            result = run()
        if program._cache_size() > known:
            self.compiling += time.perf_counter() - began
        return result


class Decoding:
    """One request on its way: prefills prompts as slots for them come free, and lets the pool tick.

    Every data shard of the mesh has its own prompts, completions and pool; the host does the same
    for all of them, so that several hosts stay in step.
    """

    def __init__(
        self, model: Transformer | SplitModel, request: Request, size: EngineSize = AUTOMATIC
    ) -> None:
        self._began = time.perf_counter()
        self.engine = Engine(model, adapters=request.adapters, hazards=request.hazards)
        model, new, samples = self.engine.model, request.max_new_tokens, request.samples_per_prompt
        request.check(model)
        self.request = request
        self._here = host_rows(len(request.prompts) if request.total is None else request.total)
        self._total = self._here.total
        length_B, forced_B = self._of_all(map(len, request.prompts)), self._of_all(request.forced_B)
        self._layout = layout = Layout.of(
            length_B,
            samples,
            size,
            token_bytes=token_bytes(model.arch, model.dtype),
            new=new,
            forced_B=forced_B,
        )
        self._policy = self._placed(request.policy, new + int(forced_B.max()))
        self._draws = Draws(
            request.prng_key,
            np.asarray(sorted(request.eos_ids), np.int32),
            np.int32(new),
            request.sampling,
        )
        self._jobs = place_rows(layout.jobs_from(request.first_prompt))
        most = layout.prompt_slots + new - 1
        self.engine.open(
            rows=layout.shards * layout.rows,
            jobs=layout.shards * layout.jobs,
            prefixes=layout.shards * layout.prefixes,
            columns=columns_bucket(new),
            prompt_slots=layout.prompt_slots,
            slots=layout.first_slots(most),
            most=most,
            places=layout.places,
        )
        self._prefilled, self._positions = 0, 0
        self._held = {int(number): index for index, number in enumerate(self._here.index_B)}
        self._status = Status(*np.zeros((len(dataclasses.fields(Status)), layout.shards), np.int32))

    def turn(self, steps: int | None = None) -> bool:
        """Decodes until the host has to act, or for at most `steps` ticks that draw tokens.

        Returns whether all completions have ended.
        """
        layout = self._layout
        # Which the prefill draws; nothing of a prompt stays in use.
        one_token = self.request.max_new_tokens == 1
        while self._prefilled < layout.most_prompts and (
            one_token or layout.has_room(self._prefilled, self._status.started)
        ):
            self._prefill()
        if one_token:
            return True
        if self._status.full.any():
            self.engine.grow()
        prompts_S = np.minimum(self._prefilled, layout.prompts_S)
        ready = place_rows((prompts_S * layout.samples).astype(np.int32))
        more = place_rows(prompts_S < layout.prompts_S)
        self._status = self.engine.advance(
            self._jobs, ready, more, steps, self._policy, self._draws
        )
        begun = self._status.started >= layout.jobs_S
        return bool(np.all(begun & (self._status.under_way == 0)))

    def so_far(self) -> Records:
        """What there is of this host's completions; those without a prefill have length 0.

        Records have as many columns as completions may have tokens.
        """
        layout, columns = self._layout, self.request.max_new_tokens
        job_B = layout.job_B[host_rows(self._total * layout.samples).index_B]
        with waiting("the rollouts"):
            if layout.shards * layout.most_prompts == self._total:
                records = fetch_rows(self.engine.records)
                job_B = host_rows(layout.shards * layout.jobs).find(job_B)
            else:  # prompts that do not divide over the shards: all hosts have all completions
                records = whole(self.engine.records, "the rollouts")
        return jax.tree.map(
            lambda part: part[job_B, :columns] if part.ndim > 1 else part[job_B], records
        )

    def cut(self, length_B: np.ndarray) -> None:
        """Ends each completion after `length_B` of its tokens; 0 leaves it unchanged.

        Every host must call it, with the lengths of all rows of the batch.
        """
        self.engine.cut(place_rows(self._layout.by_job(np.asarray(length_B, np.int32))))

    def rollouts(self) -> Rollouts:
        """The completions, when all have ended."""
        records, request, layout, status = self.so_far(), self.request, self._layout, self._status
        length_B, z_BTE = records.length_J, records.hazard_logits_JTE
        beyond_BT = np.arange(request.max_new_tokens) >= length_B[:, None]
        rows_here = host_rows(self._total * layout.samples)
        offered = float(status.offered.sum())
        return Rollouts(
            prompts=request.prompts,
            prompt_B=self._here.find(rows_here.index_B // layout.samples),
            host_rows=rows_here,
            tokens_BT=np.where(beyond_BT, np.int32(request.pad_id), records.tokens_JT),
            lengths_B=length_B,
            depths_BT=np.where(beyond_BT, 0, records.depths_JT),
            logprobs_BT=np.where(beyond_BT, 0.0, records.logprobs_JT),
            depth_logprobs_BT=np.where(beyond_BT, 0.0, records.depth_logprobs_JT),
            hazard_logits_BTE=(
                None if z_BTE is None else np.where(beyond_BT[..., None], np.nan, z_BTE)
            ),
            truncated_B=~records.ended_J,
            shape=(layout.prompt_slots, self.engine.slots),
            seconds=time.perf_counter() - self._began - self.engine.compiling,
            efficiency=Efficiency(
                prompt_padding=1.0 - int(layout.length_SP.sum()) / self._positions,
                idle=1.0 - float(status.filled.sum()) / offered if offered else 0.0,
            ),
        )

    def _of_all(self, numbers: Iterable[int]) -> np.ndarray:
        """A number of every prompt, from those of the prompts that are here."""
        mine = [self._here.index_B.tolist(), list(numbers)]
        number_B = np.zeros(self._total, np.int32)
        for index_B, here_B in gather("the prompts' lengths", mine):
            number_B[index_B] = here_B
        return number_B

    def _placed(self, policy: Policy, columns: int) -> Policy:
        """With a row for each job, where the policy has rows."""
        policy.check_rows(self._total * self._layout.samples, columns)
        room = ((0, 0), (0, columns_bucket(columns) - columns))

        def by_job(depth_BT: Any) -> Any:
            depth_BT = np.asarray(depth_BT, np.int32)[:, :columns]
            return place_rows(np.pad(self._layout.by_job(depth_BT), room))

        return policy.map_rows(by_job)

    def _prefill(self) -> None:
        """The next group of prompts, of every shard."""
        layout = self._layout
        group = layout.groups[self._prefilled]
        index_SB, length_SB = layout.group(self._prefilled)
        slots = group.slots
        tokens_SBT = np.full((*index_SB.shape, slots), self.request.pad_id, np.int32)
        for shard, row in np.ndindex(index_SB.shape):
            index = index_SB[shard, row]
            prompt = self._held.get(int(shard * layout.most_prompts + index))
            if index < layout.prompts and prompt is not None:  # another host's lie there
                tokens_SBT[shard, row, : length_SB[shard, row]] = self.request.prompts[prompt]
        self._prefilled += group.prompts
        self._positions += tokens_SBT.size
        rows = (tokens_SBT.reshape(-1, slots), length_SB.reshape(-1), index_SB.reshape(-1))
        forced = None if self.request.forced is None else self._forced(index_SB)
        self.engine.prefill(self._jobs, place_rows(rows), self._draws, forced, layout.samples)

    def _forced(self, index_SB: np.ndarray) -> ForcedPrefix:
        """Of a group's prompts; none where one only fills the batch."""
        layout = self._layout
        known_SB = np.minimum(index_SB, layout.prompts - 1)
        tokens_SB = np.take_along_axis(layout.forced_SP, known_SB, axis=1)
        tokens_SB = np.where(index_SB < layout.prompts, tokens_SB, 0)
        first_S1 = np.arange(layout.shards)[:, None] * layout.prompts
        job_SB = (first_S1 + known_SB) * layout.samples
        rows = tokens_SB.reshape(-1).astype(np.int32), job_SB.reshape(-1).astype(np.int32)
        return ForcedPrefix(*place_rows(rows), self._policy)
