"""The host side of the decoding engine, which serves rollouts, evaluation and `generate`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import nnx

from jexit.config import EngineSize
from jexit.dist import fetch_rows, gather, gathered_width, host_rows, place_rows, waiting, whole
from jexit.model.cache import cache_bucket, token_bytes
from jexit.model.policies import Policy
from jexit.model.transformer import Transformer
from jexit.rollout import pool, prefill, ticks
from jexit.rollout.pool import Jobs, Records, Status
from jexit.rollout.prefill import ForcedPrefix
from jexit.rollout.requests import Request
from jexit.rollout.results import Rollouts
from jexit.rollout.sampling import Draws
from jexit.rollout.scheduling import AUTOMATIC, Layout, columns_bucket
from jexit.rollout.weights import KEPT, LayerWeights, apart, on_cpu

T = TypeVar("T")
Decodable: TypeAlias = tuple[Any, ...]  # a model as `nnx.split` returns it: (graphdef, *states)

NO_LIMIT = np.int32(2**31 - 1)


def rollout(
    model: Transformer | Decodable,
    prompts: Sequence[Sequence[int]],
    *,
    size: EngineSize = AUTOMATIC,
    **settings: Any,
) -> Rollouts:
    """Completes prompts of token IDs with early exits, after one prefill per prompt.

    `prompts` and `settings` are the fields of `jexit.rollout.Request`. `model` is a `Transformer`
    or the tuple that `nnx.split(model, ...)` returns; a training loop passes the tuple, which saves
    splitting the model on each call. New parameter values never cause a recompilation. Raises
    UserError if the model cannot serve the request (`Request.check`), or if the depths of a
    `Prescribed` policy have the wrong number of rows or too few columns.
    """
    decoding = Decoding(model, Request(prompts=prompts, **settings), size)
    while not decoding.turn():
        pass
    return decoding.rollouts()


class Engine:
    """A model with the device arrays that store the completions being decoded.

    `open` creates these arrays. With `hazards`, hazard logits are recorded. `compiling` is the time
    spent on compilations, in seconds.
    """

    def __init__(self, model: Transformer | Decodable, *, adapters: bool, hazards: bool) -> None:
        self.compiling = 0.0
        self.graphdef, *states = nnx.split(model) if isinstance(model, nnx.Module) else model
        # Plain arrays: in a state of variables, the paths would not end in the parameters' names.
        self.states = tuple(nnx.as_pure(state) for state in states)
        self.adapters, self.hazards = adapters, hazards
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.shape["fsdp"] > 1:  # gather the weights along the model width
            self.states = self._timed(gathered_width, lambda: gathered_width(self.states))
        self.model: Transformer = nnx.merge(self.graphdef, *self.states)

    def open(self, *, rows: int, slots: int, most: int, tick_rows: int, **sizes: int) -> None:
        """Creates an empty pool whose KV cache has `slots` tokens per row and can grow to `most`.

        One tick runs at most `tick_rows` rows per data shard. `sizes` contains the other arguments
        of `pool.empty`.
        """
        self.slots, self._most, self._tick_rows, self._compiled_slots = slots, most, tick_rows, 0
        sizes |= {"rows": rows, "slots": slots, "hazards": self.hazards}
        self.pool, self.records, self.prefixes = self._timed(
            pool.empty, lambda: pool.empty(self.graphdef, self.states, **sizes)
        )

    def prefill(
        self, jobs: Jobs, prompts: tuple, draws: Draws, forced: ForcedPrefix | None = None
    ) -> None:
        """Prefills `prompts` and draws the first token of each completion (see `prefill.prefill`).

        `prompts` is the triple (tokens_BT, length_B, job_BG).
        """
        self.prefixes, self.records = self._timed(
            prefill.prefill,
            lambda: prefill.prefill(
                self.graphdef, self.states, self.prefixes, self.records, jobs, *prompts, draws,
                forced, adapters=self.adapters,
            ),
        )  # fmt: skip

    def advance(
        self, jobs: Jobs, ready: Any, more: Any, steps: int | None, policy: Policy, draws: Draws
    ) -> Status:
        """Runs ticks until the host has to act, or until `steps` of them have drawn tokens.

        The host acts by prefilling prompts or enlarging the cache (see `ticks.advance`). `ready` is
        the number of prefilled completions on each data shard, and `more` whether further
        completions are to come. `steps=None` means no limit.
        """

        layers = self.layers  # whose own compilation is not to be counted twice

        def run(steps: np.int32) -> Status:
            self.pool, self.records, status = ticks.advance(
                self.graphdef, self.states, layers, self.pool, self.records, self.prefixes,
                jobs, ready, more, steps, policy, draws, tick_rows=self._tick_rows,
                adapters=self.adapters, hazards=self.hazards,
            )  # fmt: skip
            return status

        if self.slots != self._compiled_slots:  # with 0 steps, the call only compiles
            self._timed(ticks.advance, lambda: run(np.int32(0)))
            self._compiled_slots = self.slots
        with waiting("the rollouts"):
            return jax.device_get(run(NO_LIMIT if steps is None else np.int32(steps)))

    @functools.cached_property
    def layers(self) -> LayerWeights | None:
        """The weights of each layer as separate arrays on CPUs; None on accelerators."""
        if not on_cpu():
            return None
        return self._timed(
            apart, lambda: KEPT.of(self.graphdef, self.states, adapters=self.adapters)
        )

    def grow(self) -> None:
        """Enlarges the KV cache of every row of the pool to the next size of `cache_bucket`."""
        self.slots = cache_bucket(self.slots + 1, self._most)
        cache = self._timed(pool.grown, lambda: pool.grown(self.pool.cache, slots=self.slots))
        self.pool = self.pool.replace(cache=cache)

    def cut(self, length_J: Any) -> None:
        """Ends completion j after its first `length_J[j]` tokens, unless `length_J[j]` is 0."""
        self.pool, self.records = self._timed(
            pool.cut, lambda: pool.cut(self.pool, self.records, length_J)
        )

    def _timed(self, program: Any, run: Callable[[], T]) -> T:
        """Returns `run()`; if this compiles the jitted function `program`, adds to `compiling`."""
        known, began = program._cache_size(), time.perf_counter()
        with waiting("the rollouts"):
            result = run()
        if program._cache_size() > known:
            self.compiling += time.perf_counter() - began
        return result


class Decoding:
    """Decodes one request: prefills prompts as cache slots become free, and runs the ticks.

    A tick runs one segment of layers. Each data shard of the mesh decodes its own prompts in its
    own pool. Every host calls the same programs for all shards at once, so several hosts stay
    synchronised.
    """

    def __init__(
        self, model: Transformer | Decodable, request: Request, size: EngineSize = AUTOMATIC
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
            tick_rows=layout.tick_rows,
        )
        self._prefilled, self._positions = 0, 0
        self._held = {int(number): index for index, number in enumerate(self._here.index_B)}
        self._status = Status(*np.zeros((len(dataclasses.fields(Status)), layout.shards), np.int32))

    def turn(self, steps: int | None = None) -> bool:
        """Prefills prompts while there is room, then decodes until the host has to act again.

        The host has to act if prompts can be prefilled or the cache is full. Decoding also stops
        after `steps` ticks that draw tokens (None: no limit). Returns whether all completions have
        ended.
        """
        layout = self._layout
        # The prefill draws it, so no tick runs and the prompts' slots are free again at once.
        one_token = self.request.max_new_tokens == 1
        while self._prefilled < layout.most_prompts and (
            one_token or layout.has_room(self._prefilled, self._status.started)
        ):
            self._prefill()
        if one_token:
            return True
        if self._status.full.any():
            self.engine.grow()
        prompts_Z = np.minimum(self._prefilled, layout.prompts_Z)
        ready = place_rows((prompts_Z * layout.samples).astype(np.int32))
        more = place_rows(prompts_Z < layout.prompts_Z)
        self._status = self.engine.advance(
            self._jobs, ready, more, steps, self._policy, self._draws
        )
        begun = self._status.started >= layout.jobs_Z
        return bool(np.all(begun & (self._status.under_way == 0)))

    def so_far(self) -> Records:
        """Returns what has been recorded of this host's completions so far, in batch order."""
        layout, columns = self._layout, self.request.max_new_tokens
        job_B = layout.job_B[host_rows(self._total * layout.samples).index_B]
        with waiting("the rollouts"):
            if layout.shards * layout.most_prompts == self._total:
                records = fetch_rows(self.engine.records)
                job_B = host_rows(layout.shards * layout.jobs).find(job_B)
            else:  # the prompts do not divide over the shards, so every host has all completions
                records = whole(self.engine.records, "the rollouts")
        return jax.tree.map(
            lambda part: part[job_B, :columns] if part.ndim > 1 else part[job_B], records
        )

    def cut(self, length_B: np.ndarray) -> None:
        """Ends completion b after its first `length_B[b]` tokens, unless `length_B[b]` is 0.

        Every host must call this.
        """
        self.engine.cut(place_rows(self._layout.by_job(np.asarray(length_B, np.int32))))

    def rollouts(self) -> Rollouts:
        """Returns this host's completions; call this only after all completions have ended."""
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
            prompt_padding=1.0 - int(layout.length_ZQ.sum()) / self._positions,
            idle=1.0 - float(status.filled.sum()) / offered if offered else 0.0,
        )

    def _of_all(self, numbers: Iterable[int]) -> np.ndarray:
        """Gathers one number per prompt from all hosts, as int32 [prompts] in batch order.

        `numbers` contains the numbers of this host's prompts.
        """
        mine = [self._here.index_B.tolist(), list(numbers)]
        number_B = np.zeros(self._total, np.int32)
        for index_B, here_B in gather("the prompts' lengths", mine):
            number_B[index_B] = here_B
        return number_B

    def _placed(self, policy: Policy, columns: int) -> Policy:
        """Returns the policy with its per-completion arrays in job order, sharded over the mesh.

        Raises UserError unless these arrays have a row per completion and at least `columns`
        columns (tokens).
        """
        policy.check_rows(self._total * self._layout.samples, columns)
        room = ((0, 0), (0, columns_bucket(columns) - columns))

        def by_job(depth_BT: Any) -> Any:
            depth_BT = np.asarray(depth_BT, np.int32)[:, :columns]
            return place_rows(np.pad(self._layout.by_job(depth_BT), room))

        return policy.map_rows(by_job)

    def _prefill(self) -> None:
        """Prefills the next group of prompts on every data shard."""
        layout = self._layout
        group = layout.groups[self._prefilled]
        index_ZB, length_ZB = layout.group(self._prefilled)
        tokens_ZBT = np.full((*index_ZB.shape, group.slots), self.request.pad_id, np.int32)
        for shard, row in np.ndindex(index_ZB.shape):
            index = index_ZB[shard, row]
            prompt = self._held.get(int(shard * layout.most_prompts + index))
            if index < layout.prompts and prompt is not None:  # None: on another host
                tokens_ZBT[shard, row, : length_ZB[shard, row]] = self.request.prompts[prompt]
        self._prefilled += group.prompts
        self._positions += tokens_ZBT.size
        sample_G = np.arange(layout.samples, dtype=np.int32)
        job_BG = index_ZB.reshape(-1, 1) * layout.samples + sample_G
        rows = (tokens_ZBT.reshape(-1, group.slots), length_ZB.reshape(-1), job_BG)
        forced = None if self.request.forced is None else self._forced(index_ZB)
        self.engine.prefill(self._jobs, place_rows(rows), self._draws, forced)

    def _forced(self, index_ZB: np.ndarray) -> ForcedPrefix:
        """Returns the forced prefixes of the prompts `index_ZB` of each shard; padding has none."""
        layout = self._layout
        known_ZB = np.minimum(index_ZB, layout.prompts - 1)
        tokens_ZB = np.take_along_axis(layout.forced_ZQ, known_ZB, axis=1)
        tokens_ZB = np.where(index_ZB < layout.prompts, tokens_ZB, 0)
        first_Z1 = np.arange(layout.shards)[:, None] * layout.prompts
        job_ZB = (first_Z1 + known_ZB) * layout.samples
        rows = tokens_ZB.reshape(-1).astype(np.int32), job_ZB.reshape(-1).astype(np.int32)
        return ForcedPrefix(*place_rows(rows), self._policy)
