"""The threads that decode for all clients, and the streams that deliver tokens to clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from jexit.config import EngineSize, parse_policy
from jexit.data.tokenizer import Tokenizer
from jexit.errors import RunEnded, UserError
from jexit.io.model_dir import load
from jexit.model.policies import Sample, check_policy, policy_of, warn_if_untrained
from jexit.model.transformer import Transformer
from jexit.rollout import Arrivals, Grown, Request
from jexit.rollout.speculation import Speculation
from jexit.serve.protocol import Choice, Limits, ParsedRequest, Refused, parse

TURN_SECONDS = 0.04  # between two looks at who joins and leaves
MOST_STEPS = 256  # sampling steps in this time
DRAFTED = 4  # completions under `Speculate` at a time; each has a cache of its own

_log = logging.getLogger(__name__)


class _Worker(threading.Thread):
    """A thread that takes streams from all other threads, and decodes them until `close`."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        # Each message adds a stream, or ends the decoding of a choice of a stream.
        self._inbox: queue.SimpleQueue[tuple[Stream, int | None] | None] = queue.SimpleQueue()

    def put(self, stream: Stream, choice: int | None = None) -> None:
        """Adds a stream, or ends the decoding of its completion `choice`."""
        self._inbox.put((stream, choice))

    def close(self) -> None:
        """Ends the thread and waits for its end; streams that are still open raise RunEnded."""
        self._inbox.put(None)
        self.join()

    def _read(self) -> bool:
        """Handles all messages; if there is nothing to decode, waits for the next.

        Returns False if a message asks the thread to end (see `close`), and True otherwise.
        """
        while True:
            try:
                message = self._inbox.get(block=not self.under_way)
            except queue.Empty:
                return True
            if message is None:
                return False
            stream, choice = message
            if choice is not None:
                self._leave(stream, choice)
                continue
            try:
                self._join(stream)
            except Exception as error:  # of this request alone
                _log.exception("a request could not join the decoding pool")
                stream.deliver(0, error)

    @property
    def under_way(self) -> bool:
        """Whether there is something to decode."""
        raise NotImplementedError

    def _join(self, stream: Stream) -> None:
        raise NotImplementedError

    def _leave(self, stream: Stream, choice: int) -> None:
        raise NotImplementedError


class PoolThread(_Worker):
    """The thread that owns a running decoding pool, which serves all policies but `Speculate`.

    The thread `drafting` decodes completions under `Speculate`. If the pool fails, `failure` is the
    exception, and every stream raises RunEnded. `close` ends both threads.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        super().__init__("jexit-pool")
        self.arrivals = arrivals
        self.drafting = _Drafting(arrivals)
        self._streams: dict[int, tuple[Stream, int]] = {}  # ticket → stream and its choice
        self.failure: Exception | None = None
        self._closed = False

    def join_pool(self, stream: Stream) -> None:
        """Queues the stream's request for decoding; raises RunEnded after `close`."""
        if self._closed:
            raise RunEnded("the decoding pool has been closed; open the model again")
        self._worker_of(stream).put(stream)

    def leave_pool(self, stream: Stream, choice: int) -> None:
        """Stops decoding one choice (completion) of a stream."""
        self._worker_of(stream).put(stream, choice)

    def _worker_of(self, stream: Stream) -> _Worker:
        return self.drafting if stream.request.policy.drafts else self

    def start(self) -> None:
        super().start()
        self.drafting.start()

    def close(self) -> None:
        self._closed = True
        self.drafting.close()
        super().close()

    def run(self) -> None:
        try:
            self._decode()
            error: Exception = RunEnded("the decoding pool has been closed")
        except Exception as failure:  # of the device: out of memory, lost
            _log.exception("the decoding pool has failed")
            self.failure = error = failure
        for stream in {stream for stream, _ in self._streams.values()}:
            stream.deliver(0, error)
        while self.failure is not None and (message := self._inbox.get()) is not None:
            stream, choice = message
            if choice is None:
                stream.deliver(0, error)

    def _decode(self) -> None:
        steps = 1
        while self._read():
            began = time.perf_counter()
            news = self.arrivals.turn(steps)
            if news:  # an empty pool returns at once, which says nothing about a step
                share = TURN_SECONDS / (time.perf_counter() - began)
                steps = min(max(1, round(steps * min(max(share, 0.5), 2.0))), MOST_STEPS)
            for grown in news:
                stream, choice = self._streams[grown.ticket]
                if grown.finished:
                    del self._streams[grown.ticket]
                stream.deliver(choice, grown)

    @property
    def under_way(self) -> bool:
        return bool(self.arrivals.under_way)

    def _join(self, stream: Stream) -> None:
        for choice, ticket in enumerate(self.arrivals.join(stream.request)):
            self._streams[ticket] = stream, choice

    def _leave(self, stream: Stream, choice: int) -> None:
        for ticket, owner in list(self._streams.items()):
            if owner == (stream, choice):
                self.arrivals.leave(ticket)
                del self._streams[ticket]


class _Drafting(_Worker):
    """The thread that decodes completions under `Speculate`, `DRAFTED` at a time, in turns.

    Its programs are compiled when a request first needs them, while the pool continues. A failure
    of a completion ends only its own request.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        super().__init__("jexit-drafting")
        self._arrivals = arrivals
        self._begun: dict[tuple[Stream, int], Speculation | None] = {}  # None: it waits

    def run(self) -> None:
        while self._read():
            for stream, choice in list(self._begun)[:DRAFTED]:
                self._round(stream, choice)
        for stream in {stream for stream, _ in self._begun}:
            stream.deliver(0, RunEnded("the decoding pool has been closed"))

    def _round(self, stream: Stream, choice: int) -> None:
        """Runs one round of self-speculative decoding for a choice of a stream."""
        try:
            speculation = self._begun[stream, choice]
            if speculation is None:
                request = stream.request
                alone = dataclasses.replace(
                    request,
                    prompts=[request.prompts[choice]],
                    first_prompt=request.first_prompt + choice,
                )
                speculation = Speculation(self._arrivals.split, alone)
                self._begun[stream, choice] = speculation
            for grown in speculation.turn():
                stream.deliver(choice, grown)
            if speculation.ended:
                self._leave(stream, choice)
        except Exception as error:
            _log.exception("a speculation has failed")
            self._leave(stream, choice)
            stream.deliver(choice, error)

    @property
    def under_way(self) -> bool:
        return bool(self._begun)

    def _join(self, stream: Stream) -> None:
        for choice in range(len(stream.request.prompts)):
            self._begun[stream, choice] = None

    def _leave(self, stream: Stream, choice: int) -> None:
        self._begun.pop((stream, choice), None)


@dataclasses.dataclass(eq=False)
class Stream:
    """The growing completions of one request; leaving the `async with` block cancels the rest.

    Iteration yields (index of the choice, `Grown`) and ends after the last choice. Raises RunEnded
    if the pool has failed or has been closed.
    """

    pool: PoolThread
    request: Request

    async def __aenter__(self) -> Stream:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._open = set(range(len(self.request.prompts)))
        self.pool.join_pool(self)
        return self

    async def __aexit__(self, *_: Any) -> None:
        for choice in list(self._open):
            self.end(choice)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Grown]]:
        while self._open:
            choice, news = await self._news.get()
            if isinstance(news, RunEnded):
                raise news
            if isinstance(news, Exception):
                raise RunEnded("decoding has failed; see the server's log") from news
            if choice in self._open:
                if news.finished:
                    self._open.discard(choice)
                yield choice, news

    def end(self, choice: int) -> None:
        """Ends one choice: the pool stops decoding it, and no more of its tokens are yielded."""
        if choice in self._open:
            self._open.discard(choice)
            self.pool.leave_pool(self, choice)

    def deliver(self, choice: int, news: Grown | Exception) -> None:
        """Passes new tokens or an error to the stream's event loop; called by the pool's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._news.put_nowait, (choice, news))


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that is ready to decode, with its running pool."""

    model: Transformer
    tokenizer: Tokenizer
    pool: PoolThread
    limits: Limits

    def asked(self, values: Mapping[str, Any], *, chat: bool) -> ParsedRequest:
        """Parses a request from the fields `values`; raises Refused if it cannot be served."""
        try:
            asked = parse(values, chat=chat, tokenizer=self.tokenizer, limits=self.limits)
            self.pool.arrivals.check(asked.request)
        except UserError as error:
            raise Refused(400, str(error)) from None
        return asked

    async def answer(self, asked: ParsedRequest) -> AsyncGenerator[tuple[Choice, dict[str, Any]]]:
        """Decodes a request; yields (choice, response fields of its new tokens) at each update."""
        count = len(asked.request.prompts)
        choices = [Choice(asked, index, self.tokenizer) for index in range(count)]
        async with Stream(self.pool, asked.request) as stream:
            async for number, grown in stream:
                choice = choices[number]
                fields = choice.grow(grown)
                if choice.finish_reason:
                    stream.end(number)
                yield choice, fields


def open_pool(
    directory: str,
    *,
    name: str = "",
    policy: str = "full",
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    rows: int = 0,
) -> Opened:
    """Loads a model, compiles the programs of its pool and starts the pool's thread.

    `name` is the model's name for clients, by default that of the directory or, for WORKDIR/model,
    of the run. `policy` applies to requests without one. By default, prompts and completions may
    have up to 1,024 tokens each, or half of the model's positions if that is less. `rows` is the
    number of completions decoded at a time (0: automatic). Raises UserError if a value or the
    directory is not valid.
    """
    for what, value in (("prompt", max_prompt_tokens), ("new", max_new_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--max-{what}-tokens is {value}, but it must be at least 1; raise it")
    size = EngineSize(rows=rows)
    parse_policy(policy, "speculate")  # before the model is loaded, which may take minutes
    model, tokenizer = load(directory)
    sample = Sample.trained(model.exit_head)
    default = policy_of(policy, sample, "speculate")
    check_policy(default, (*model.exit_layers, model.arch.layers))
    warn_if_untrained(default, model)
    most = model.arch.max_positions
    half = min(1024, most // 2)
    prompt, new = max_prompt_tokens or half, max_new_tokens or half
    if prompt + new > most:
        raise UserError(
            f"--max-prompt-tokens ({prompt}) and --max-new-tokens ({new}) add up to "
            f"{prompt + new}, but the model has only {most} positions for both; lower one of them"
        )
    arrivals = Arrivals(
        model,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        max_prompt_tokens=prompt,
        max_new_tokens=new,
        size=size,
    )
    arrivals.warm_up()
    pool = PoolThread(arrivals)
    pool.start()
    path = pathlib.Path(directory).resolve()
    name = name or (path.parent if path.name == "model" else path).name
    return Opened(
        model, tokenizer, pool, Limits(name=name, policy=default, sample=sample, new_tokens=new)
    )
