"""The decoding engine's host side: rollouts, evaluation and `generate` all run through it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import PRNGKey
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
from jexit.errors import UserError
from jexit.model.cache import cache_bucket, token_bytes
from jexit.model.policies import Full, Policy, Prescribed
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.rollout import programs
from jexit.rollout.checks import check_policy, check_prompts, check_written, fitted_policy
from jexit.rollout.layers import KEPT, Layers, apart, on_cpu
from jexit.rollout.layout import AUTOMATIC, Layout, columns_bucket
from jexit.rollout.rollouts import Efficiency, Rollouts
from jexit.rollout.sampling import Sampling
from jexit.rollout.state import Progress, Records
from jexit.rollout.ticks import Draws
from jexit.rollout.written import Written

T = TypeVar("T")
SplitModel: TypeAlias = tuple[Any, ...]  # (graphdef, *states) as `nnx.split` returns them

NO_LIMIT = np.int32(2**31 - 1)


def rollout(
    model: Transformer | SplitModel,
    prompts: Sequence[Sequence[int]],
    *,
    policy: Policy = Full(),
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    eos_ids: Iterable[int],
    pad_id: int,
    key: PRNGKey | int,
    samples_per_prompt: int = 1,
    adapters: bool = True,
    hazards: bool = False,
    first_prompt: int = 0,
    total: int | None = None,
    written: Sequence[int] | None = None,
    size: EngineSize = AUTOMATIC,
) -> Rollouts:
    """Generates `samples_per_prompt` completions of each prompt; one prefill serves them all.

    `model` is a `Transformer` or what `nnx.split(model, ...)` returned, which saves the splitting
    in a training loop; new parameter values never recompile. Temperature 0 is greedy. A row's draws
    depend on the key, `first_prompt` plus its prompt's index, the sample's index and the token's,
    not on other rows nor on `size`. With several hosts `prompts` are this host's of `total`
    (`jexit.dist.host_rows`), and `Prescribed` holds the depths of all.

    `written` says of each prompt how many of its last tokens are the beginning of its completion:
    they leave as the policy says, as if they had been decoded, and columns of `Prescribed` count
    from the first of them. The result holds new tokens only. Samples of one prompt share the depths
    that its beginning drew.

    Raises UserError when a prompt is empty or does not fit the model with its completion, when
    `written` leaves nothing of it, or when `Prescribed` has another number of rows or too few
    columns.
    """
    decoding = Decoding(
        model,
        prompts,
        policy=policy,
        max_new_tokens=max_new_tokens,
        sampling=Sampling.of(temperature, top_p, top_k=top_k, min_p=min_p),
        eos_ids=eos_ids,
        pad_id=pad_id,
        key=key,
        samples_per_prompt=samples_per_prompt,
        adapters=adapters,
        hazards=hazards,
        first_prompt=first_prompt,
        total=total,
        written=written,
        size=size,
    )
    while not decoding.turn():
        pass
    return decoding.rollouts()


class Decoding:
    """One batch on its way: prefills prompts as places for them come free, and lets the pool tick.

    Every data shard of the mesh has its own prompts, completions and pool; the host does the same
    for all of them, so that several hosts stay in step.
    """

    def __init__(
        self,
        model: Transformer | SplitModel,
        prompts: Sequence[Sequence[int]],
        *,
        policy: Policy,
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Iterable[int],
        pad_id: int,
        key: PRNGKey | int,
        samples_per_prompt: int = 1,
        adapters: bool = True,
        hazards: bool = False,
        first_prompt: int = 0,
        total: int | None = None,
        written: Sequence[int] | None = None,
        size: EngineSize = AUTOMATIC,
    ) -> None:
        self._began, self._compiling = time.perf_counter(), 0.0
        self._graphdef, self._states, arch, dtype = self._compiled(
            gathered_width, lambda: _split_for_decoding(model)
        )
        self._layers: Layers | None = None  # taken apart when there is a first tick
        self._arch, self._columns, self._pad_id = arch, max_new_tokens, pad_id
        self._samples, self._adapters, self._hazards = samples_per_prompt, adapters, hazards
        self._prompts = [[int(token) for token in prompt] for prompt in prompts]
        check_prompts(arch, self._prompts, max_new_tokens)
        check_policy(policy)
        if samples_per_prompt < 1:
            raise UserError(f"samples_per_prompt is {samples_per_prompt}; it must be at least 1")
        self._here = host_rows(len(self._prompts) if total is None else total)
        self._total = self._here.total
        self._writes = written is not None
        written = [0] * len(self._prompts) if written is None else [int(n) for n in written]
        check_written(self._prompts, written)
        length_B, written_B = self._of_all(map(len, self._prompts)), self._of_all(written)
        self._layout = Layout.of(
            length_B,
            samples_per_prompt,
            size,
            token_bytes=token_bytes(arch, dtype),
            new=max_new_tokens,
            written_B=written_B,
        )
        columns = self._columns + int(written_B.max())
        self._policy = self._placed(
            fitted_policy(policy, self._total * samples_per_prompt, columns)
        )
        if self._writes and samples_per_prompt > 1 and isinstance(policy, Prescribed):
            raise UserError(
                f"{samples_per_prompt} samples share one prefill and Prescribed gives each its own "
                "depths, which the written part has too; repeat the prompts instead"
            )
        self._draws = Draws(
            jax.random.key(key) if isinstance(key, int | np.integer) else key,
            np.asarray(sorted(eos_ids), np.int32),
            np.int32(max_new_tokens),
            sampling,
        )
        layout = self._layout
        self._most = layout.prompt_slots + max_new_tokens - 1
        self.slots = layout.first_slots(self._most)
        self._work = place_rows(layout.work(first_prompt))
        self._pool, self._records, self._store = self._compiled(
            programs.empty,
            lambda: programs.empty(
                self._graphdef,
                self._states,
                rows=layout.shards * layout.rows,
                jobs=layout.shards * layout.jobs,
                prompts=layout.shards * layout.places,
                columns=columns_bucket(max_new_tokens),
                prompt_slots=layout.prompt_slots,
                slots=self.slots,
                hazards=hazards,
            ),
        )
        self._prefilled, self._positions, self._compiled_slots = 0, 0, 0
        self._prefills = 0  # of prompts that exist, each time that one is
        self._held = {int(index): place for place, index in enumerate(self._here.index_B)}
        self.progress = Progress(
            started=np.zeros(layout.shards, np.int32),
            under_way=np.zeros(layout.shards, np.int32),
            full=np.zeros(layout.shards, bool),
            filled=np.zeros(layout.shards),
            places=np.zeros(layout.shards),
            ticks=np.zeros(layout.shards, np.int32),
        )

    def turn(self, emissions: int | None = None) -> bool:
        """Works until the host has something to do, or for so many ticks that emit tokens.

        Returns whether all completions have ended.
        """
        layout = self._layout
        one_token = self._columns == 1  # which the prefill draws; nothing of a prompt stays in use
        while self._prefilled < layout.most_prompts and (
            one_token or layout.has_room(self._prefilled, self.progress.started)
        ):
            self._prefill()
        if one_token:
            return True
        if self.progress.full.any():
            self.slots = cache_bucket(self.slots + 1, self._most)
            cache = self._compiled(
                programs.grown, lambda: programs.grown(self._pool.cache, slots=self.slots)
            )
            self._pool = dataclasses.replace(self._pool, cache=cache)
        if self._layers is None and on_cpu():
            self._layers = self._compiled(apart, lambda: KEPT.of(self._graphdef, self._states))
        if self.slots != self._compiled_slots:  # no ticks: what it takes is the compilation
            self._compiled(programs.advance, lambda: self._advance(np.int32(0)))
            self._compiled_slots = self.slots
        with waiting("the rollouts"):
            progress = self._advance(NO_LIMIT if emissions is None else np.int32(emissions))
            self.progress = jax.device_get(progress)
        begun = self.progress.started >= layout.jobs_S
        return bool(np.all(begun & (self.progress.under_way == 0)))

    def so_far(self) -> Records:
        """What there is of this host's completions; those without a prefill have length 0."""
        return self._fetched()

    def cut(self, length_B: np.ndarray) -> None:
        """Ends completions after so many of the tokens that they have; 0 leaves one alone.

        For all rows of the batch, as a call on every host.
        """
        length_J = place_rows(self._layout.by_job(np.asarray(length_B, np.int32)))
        self._pool, self._records = self._compiled(
            programs.cut, lambda: programs.cut(self._pool, self._records, length_J)
        )

    def rollouts(self) -> Rollouts:
        """The completions, when all have ended."""
        records = self._fetched()
        layout, length_B, z_BTE = self._layout, records.length_J, records.hazard_logits_JTE
        beyond_BT = np.arange(self._columns) >= length_B[:, None]
        rows_here = host_rows(self._total * self._samples)
        positions, tokens = self._positions, int(layout.length_SP.sum())
        return Rollouts(
            prompts=self._prompts,
            written=self._writes,
            prompt_B=self._here.find(rows_here.index_B // self._samples),
            host_rows=rows_here,
            layers=self._arch.layers,
            pad_id=self._pad_id,
            tokens_BT=np.where(beyond_BT, np.int32(self._pad_id), records.tokens_JT),
            lengths_B=length_B,
            depths_BT=np.where(beyond_BT, 0, records.depths_JT),
            logprobs_BT=np.where(beyond_BT, np.float32(0), records.logprobs_JT),
            depth_logprobs_BT=np.where(beyond_BT, np.float32(0), records.depth_logprobs_JT),
            hazard_logits_BTE=None
            if z_BTE is None
            else np.where(beyond_BT[..., None], np.float32(np.nan), z_BTE),
            truncated_B=~records.ended_J,
            shape=(layout.prompt_slots, self.slots),
            seconds=time.perf_counter() - self._began - self._compiling,
            efficiency=Efficiency(
                prefills=self._prefills,
                prompt_padding=1.0 - tokens / positions,
                idle=self._idle(),
                ticks=int(self.progress.ticks.max()),
            ),
        )

    def _fetched(self) -> Records:
        """This host's completions, of as many columns as they may have tokens."""
        layout = self._layout
        job_B = layout.job_B[host_rows(self._total * self._samples).index_B]
        with waiting("the rollouts"):
            if layout.shards * layout.most_prompts == self._total:
                records = fetch_rows(self._records)
                job_B = host_rows(layout.shards * layout.jobs).find(job_B)
            else:  # prompts that do not divide over the shards: all hosts have all completions
                records = whole(self._records, "the rollouts")
        return jax.tree.map(
            lambda part: part[job_B, : self._columns] if part.ndim > 1 else part[job_B], records
        )

    def _idle(self) -> float:
        places = float(self.progress.places.sum())
        return 1.0 - float(self.progress.filled.sum()) / places if places else 0.0

    def _of_all(self, numbers: Iterable[int]) -> np.ndarray:
        """A number of every prompt, from those of the prompts that are here."""
        mine = [self._here.index_B.tolist(), list(numbers)]
        number_B = np.zeros(self._total, np.int32)
        for index_B, here_B in gather("the prompts' lengths", mine):
            number_B[index_B] = here_B
        return number_B

    def _placed(self, policy: Policy) -> Policy:
        """`Prescribed` with a row for each job; others have none."""
        if not isinstance(policy, Prescribed):
            return policy
        columns = policy.depth_BT.shape[1]
        depth_JT = self._layout.by_job(policy.depth_BT)
        room = ((0, 0), (0, columns_bucket(columns) - columns))
        return Prescribed(place_rows(np.pad(depth_JT, room)))

    def _prefill(self) -> None:
        layout = self._layout
        group = layout.groups[self._prefilled]
        index_SB, length_SB = layout.group(self._prefilled)
        slots = group.slots
        tokens_SBT = np.full((*index_SB.shape, slots), self._pad_id, np.int32)
        for shard, place in np.ndindex(index_SB.shape):
            index = index_SB[shard, place]
            prompt = self._held.get(int(shard * layout.most_prompts + index))
            if index < layout.prompts and prompt is not None:  # another host's lie there
                tokens_SBT[shard, place, : length_SB[shard, place]] = self._prompts[prompt]
        self._prefilled += group.prompts
        self._prefills += int(np.sum(index_SB < layout.prompts))
        self._positions += tokens_SBT.size
        rows = (tokens_SBT.reshape(-1, slots), length_SB.reshape(-1), index_SB.reshape(-1))
        written = self._written(index_SB) if self._writes else None

        def run() -> None:
            self._store, self._records = programs.prefill(
                self._graphdef,
                self._states,
                self._store,
                self._records,
                self._work,
                *place_rows(rows),
                self._draws,
                written,
                samples=self._samples,
                adapters=self._adapters,
            )

        self._compiled(programs.prefill, run)

    def _written(self, index_SB: np.ndarray) -> Written:
        """Of a group's prompts; none of it where one only fills the batch."""
        layout = self._layout
        known_SB = np.minimum(index_SB, layout.prompts - 1)
        tokens_SB = np.take_along_axis(layout.written_SP, known_SB, axis=1)
        tokens_SB = np.where(index_SB < layout.prompts, tokens_SB, 0)
        job_SB = (np.arange(layout.shards)[:, None] * layout.prompts + known_SB) * self._samples
        rows = tokens_SB.reshape(-1).astype(np.int32), job_SB.reshape(-1).astype(np.int32)
        return Written(*place_rows(rows), self._policy)

    def _advance(self, emissions: np.int32) -> Progress:
        layout = self._layout
        prompts_S = np.minimum(self._prefilled, layout.prompts_S)
        self._pool, self._records, progress = programs.advance(
            self._graphdef,
            self._states,
            self._layers,
            self._pool,
            self._records,
            self._store,
            self._work,
            place_rows((prompts_S * self._samples).astype(np.int32)),
            place_rows(prompts_S < layout.prompts_S),
            emissions,
            self._policy,
            self._draws,
            width=layout.width,
            adapters=self._adapters,
            hazards=self._hazards,
        )
        return progress

    def _compiled(self, program: Any, run: Callable[[], T]) -> T:
        """Runs it and, when that meant compiling it, leaves that time out of the batch's."""
        known, began = program._cache_size(), time.perf_counter()
        with waiting("the rollouts"):
            result = run()
        if program._cache_size() > known:
            self._compiling += time.perf_counter() - began
        return result


def _split_for_decoding(
    model: Transformer | SplitModel,
) -> tuple[nnx.GraphDef, tuple[Any, ...], Architecture, jnp.dtype]:
    """(graphdef, states, architecture, dtype); weights whole along the model width."""
    graphdef, *states = nnx.split(model) if isinstance(model, nnx.Module) else model
    whole, mesh = nnx.merge(graphdef, *states), jax.sharding.get_abstract_mesh()
    divided = not mesh.empty and mesh.shape["fsdp"] > 1
    states = gathered_width(tuple(states)) if divided else tuple(states)
    return graphdef, states, whole.arch, whole.dtype
