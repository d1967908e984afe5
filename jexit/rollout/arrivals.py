"""A running decoding pool that requests can join and leave, each with its own settings."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable

import jax
import numpy as np

from jexit.config import EngineSize
from jexit.dist import data_axes
from jexit.errors import UserError
from jexit.model.cache import SMALLEST_PROMPT, cache_bucket, token_bytes
from jexit.model.policies import Full, Mixed, Policy, Sample
from jexit.model.transformer import Transformer
from jexit.rollout.engine import Decodable, Engine
from jexit.rollout.pool import Jobs
from jexit.rollout.requests import Request
from jexit.rollout.results import Grown
from jexit.rollout.sampling import TRUNCATIONS, Draws, MixedSampling, Sampling
from jexit.rollout.scheduling import AUTOMATIC, columns_bucket, fitted
from jexit.settings import shown

AT_ONCE = 64  # most completions under way at a time; `EngineSize` can only lower it
PREFIXES = 8  # most prefilled prompts whose completions wait for a row
SHARED = 8  # most completions that share the prefill of a prompt
TOGETHER = 4  # different prompts that are prefilled at once where so many wait


@dataclasses.dataclass(kw_only=True, eq=False)
class _CompletionJob:
    """One prompt of a request with its settings; `sent` counts the tokens reported so far."""

    ticket: int
    prompt: list[int]
    number: int
    policy: Policy
    sampling: Sampling
    key: np.ndarray  # the key's data: NumPy stacks it a hundred times as fast as JAX
    limit: int
    sent: int = 0


class Arrivals:
    """A running decoding pool: requests with different settings can join and leave at any time.

    Each request gets the tokens, depths and log-probabilities that `rollout` returns for it alone.
    One compiled program serves all halting policies. The pool decodes at most `size.rows`
    completions at a time, and never more than `AT_ONCE`; further completions wait. Each completion
    has room for `max_prompt_tokens` + `max_new_tokens` from the start, so nothing is compiled while
    requests wait, unless the pool meets a truncation (`top_p`, `top_k`, `min_p`) for the first
    time. Equal prompts that follow one another share a prefill. The pool works on one data shard (a
    mesh with more raises UserError) and supports neither forced prefixes nor several samples per
    prompt.
    """

    def __init__(
        self,
        model: Transformer | Decodable,
        *,
        eos_ids: Iterable[int],
        pad_id: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        adapters: bool = True,
        size: EngineSize = AUTOMATIC,
    ) -> None:
        if data_axes():
            raise UserError(
                "a running pool supports only one data shard, but this mesh has several; run one "
                "process per device, or use a mesh that divides only the tensor axis"
            )
        self._engine = engine = Engine(model, adapters=adapters, hazards=True)
        self._eos_N, self._pad_id = np.asarray(sorted(eos_ids), np.int32), pad_id
        self._limits = max_prompt_tokens, max_new_tokens
        prompt_slots = _prompt_slots(max_prompt_tokens)
        most = prompt_slots + max_new_tokens - 1
        row_bytes = most * token_bytes(engine.model.arch, engine.model.dtype)
        rows, tick_rows = fitted(size, AT_ONCE, row_bytes)
        engine.open(
            rows=rows,
            jobs=rows + PREFIXES,
            prefixes=PREFIXES,
            columns=columns_bucket(max_new_tokens),
            prompt_slots=prompt_slots,
            slots=cache_bucket(most, most),
            most=most,
            tick_rows=tick_rows,
        )
        idle = _CompletionJob(
            ticket=-1, prompt=[pad_id], number=0, policy=Full(), sampling=Sampling.of(0.0),
            key=np.asarray(jax.random.key_data(jax.random.key(0))), limit=1,
        )  # fmt: skip
        self._idle, self._jobs = idle, [idle] * (rows + PREFIXES)
        self._slot_J = np.zeros(len(self._jobs), np.int32)
        self._queue: collections.deque[_CompletionJob] = collections.deque()
        self._ready: list[int] = []  # prefilled jobs that wait for a row, in order of arrival
        self._tickets = 0
        self._settings: tuple[Policy, Draws] | None = None  # None: the jobs have changed

    @property
    def split(self) -> Decodable:
        """The model as the tuple that `nnx.split` returns."""
        return self._engine.graphdef, *self._engine.states

    @property
    def under_way(self) -> int:
        """The number of completions that wait or are being decoded."""
        return len(self._queue) + sum(job is not self._idle for job in self._jobs)

    def warm_up(self) -> None:
        """Compiles the programs that the pool needs, for prompts of all lengths that it allows."""
        longest, most_new = self._limits
        lengths, length = [], longest
        while length:
            lengths.append(length)
            length = _prompt_slots(length) // 2 if _prompt_slots(length) > SMALLEST_PROMPT else 0
        for length in lengths:
            alike = [self._pad_id] * length
            for prompts in ([alike], [alike] * 2, [[*alike[1:], n] for n in range(TOGETHER)]):
                self.join(
                    Request(
                        prompts=prompts, policy=Sample(), max_new_tokens=min(2, most_new),
                        eos_ids=self._eos_N.tolist(), pad_id=self._pad_id, key=0,
                        adapters=self._engine.adapters,
                    )
                )  # fmt: skip
                while self.under_way:
                    self.turn()

    def join(self, request: Request) -> list[int]:
        """Adds a request and returns one ticket number per prompt; raises the errors of `check`.

        Tickets identify completions in `Grown` and `leave`.
        """
        self.check(request)
        key = np.asarray(jax.random.key_data(request.prng_key))
        tickets = range(self._tickets, self._tickets + len(request.prompts))
        self._tickets = tickets.stop
        for index, ticket in enumerate(tickets):
            self._queue.append(
                _CompletionJob(
                    ticket=ticket,
                    prompt=request.prompts[index],
                    number=request.first_prompt + index,
                    policy=request.policy,
                    sampling=request.sampling,
                    key=key,
                    limit=request.max_new_tokens,
                )
            )
        return list(tickets)

    def leave(self, ticket: int) -> None:
        """Ends the completion `ticket`, so that no more of its tokens are reported.

        Does nothing if the completion has already finished.
        """
        self._queue = collections.deque(c for c in self._queue if c.ticket != ticket)
        for job, completion in enumerate(self._jobs):
            if completion.ticket == ticket:
                length_J = np.zeros(len(self._jobs), np.int32)
                length_J[job] = max(completion.sent, 1)
                self._engine.cut(length_J)
                self._release(job)

    def turn(self, steps: int = 1) -> list[Grown]:
        """Prefills prompts, then runs ticks until `steps` have drawn tokens; returns new tokens.

        Stops earlier if a row is free while prompts wait, or if all completions have ended. The
        list has one entry per completion that has new tokens or has finished.
        """
        while self._queue and self._free_slots and self._idle in self._jobs:
            self._admit()
        if all(completion is self._idle for completion in self._jobs):
            return []
        # `started` counts the ready jobs that begin in this turn, so it is reset here.
        started = np.zeros(1, np.int32)
        self._engine.pool = self._engine.pool.replace(started=started)
        status = self._engine.advance(
            self._placed_jobs(),
            np.asarray([len(self._ready)], np.int32),
            np.asarray([bool(self._queue)]),
            steps,
            *self._settings_of_jobs(),
        )
        del self._ready[: int(status.started[0])]
        return self._news()

    def check(self, request: Request) -> None:
        """Raises UserError if a request is invalid or does not suit this pool; is thread-safe."""
        longest, (most_prompt, most_new) = max(map(len, request.prompts), default=0), self._limits
        if longest > most_prompt:
            raise UserError(
                f"a prompt has {longest} tokens, but this pool allows at most {most_prompt}; "
                "shorten the prompt, or open a larger pool"
            )
        if request.max_new_tokens > most_new:
            raise UserError(
                f"max_new_tokens is {request.max_new_tokens}, but this pool allows at most "
                f"{most_new}; lower it, or open a larger pool"
            )
        request.check(self._engine.model)
        _ = request.policy.setting  # raises UserError for a policy that differs between tokens
        demanded = {
            "eos_ids": tuple(self._eos_N.tolist()),
            "adapters": self._engine.adapters,
            "samples_per_prompt": 1,
            "forced": None,
            "total": None,
        }
        asked = vars(request) | {"eos_ids": tuple(sorted(request.eos_ids))}
        for name, value in demanded.items():
            if asked[name] != value:
                raise UserError(
                    f"{name} is {shown(asked[name])}, but a request that joins this running pool "
                    f"needs {name}={shown(value)}; change it, or decode the request with rollout"
                )

    @property
    def _free_slots(self) -> set[int]:
        """The slots of the prefix cache that no completion waiting for a row needs."""
        return set(range(PREFIXES)) - {int(self._slot_J[job]) for job in self._ready}

    def _admit(self) -> None:
        """Prefills the next prompts and draws the first tokens of their completions.

        One call prefills either one prompt, from which one or several completions start, or several
        prompts with one completion each. The completions then wait for a row of the pool.
        """
        free = sorted(self._free_slots)
        waiting = list(itertools.islice(self._queue, self._jobs.count(self._idle)))
        first, length = waiting[0].prompt, _prompt_slots(len(waiting[0].prompt))
        equal = itertools.takewhile(lambda c: c.prompt == first, waiting[:SHARED])
        alike = itertools.takewhile(lambda c: _prompt_slots(len(c.prompt)) == length, waiting)
        prompts, samples = 1, len(list(equal))
        if samples == 1 and min(len(list(alike)), len(free)) >= TOGETHER:
            prompts = TOGETHER
        # Three shapes, so that one completion does not pay for the rows and draws of others.
        tokens_BT = np.full((prompts, length), self._pad_id, np.int32)
        length_B = np.zeros(prompts, np.int32)
        job_BG = np.full((prompts, 1 if samples == 1 else SHARED), len(self._jobs), np.int32)
        for row, sample in np.ndindex(prompts, samples):
            job = self._jobs.index(self._idle)
            completion = self._jobs[job] = self._queue.popleft()
            self._slot_J[job], job_BG[row, sample] = free[row], job
            tokens_BT[row, : len(completion.prompt)] = completion.prompt
            length_B[row] = len(completion.prompt)
            self._ready.append(job)
        self._settings = None
        placed = tokens_BT, length_B, job_BG
        self._engine.prefill(self._placed_jobs(), placed, self._settings_of_jobs()[1])

    def _release(self, job: int) -> None:
        self._jobs[job], self._settings = self._idle, None
        if job in self._ready:  # it ended before it had a row
            self._ready.remove(job)

    def _news(self) -> list[Grown]:
        records, news = jax.device_get(self._engine.records), []
        for job, completion in enumerate(self._jobs):
            if completion is self._idle:
                continue
            length = int(records.length_J[job])
            finished = bool(records.ended_J[job]) or length >= completion.limit
            if length == completion.sent and not finished:
                continue
            part = slice(completion.sent, length)
            completion.sent = length
            news.append(
                Grown(
                    ticket=completion.ticket,
                    tokens=records.tokens_JT[job, part].tolist(),
                    depths=records.depths_JT[job, part].tolist(),
                    logprobs=records.logprobs_JT[job, part].tolist(),
                    hazard_logits=records.hazard_logits_JTE[job, part].tolist(),
                    finished=finished,
                )
            )
            if finished:
                self._release(job)
        return news

    def _placed_jobs(self) -> Jobs:
        order = [*self._ready, *[0] * (len(self._jobs) - len(self._ready))]
        zeros_J = np.zeros(len(self._jobs), np.int32)
        return Jobs(
            number_J=np.asarray([c.number for c in self._jobs], np.int32),
            sample_J=zeros_J,
            prompt_length_J=np.asarray([len(c.prompt) for c in self._jobs], np.int32),
            forced_J=zeros_J,
            slot_J=self._slot_J.copy(),
            order_J=np.asarray(order, np.int32),
        )

    def _settings_of_jobs(self) -> tuple[Policy, Draws]:
        if self._settings is None:
            used = {name for job in self._jobs for name in job.sampling.truncations}
            truncations = tuple(name for name in TRUNCATIONS if name in used)
            draws = Draws(
                jax.random.wrap_key_data(np.stack([job.key for job in self._jobs])),
                self._eos_N,
                np.asarray([completion.limit for completion in self._jobs], np.int32),
                MixedSampling.of([completion.sampling for completion in self._jobs], truncations),
            )
            self._settings = Mixed.of([completion.policy for completion in self._jobs]), draws
        return self._settings


def _prompt_slots(length: int) -> int:
    """Returns the length to which a prompt is padded: a power of two from 16, for few programs."""
    return max(SMALLEST_PROMPT, 1 << (length - 1).bit_length())
