"""The thread that decodes for all clients, and the streams that deliver tokens to clients."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import pathlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from jexit.config import EngineSize
from jexit.data.tokenizer import Tokenizer
from jexit.errors import RunEnded, UserError
from jexit.io.model_dir import load
from jexit.model.policies import Speculate, check_policy, policy_of, warn_if_untrained
from jexit.model.transformer import Transformer
from jexit.rollout import Arrivals, Grown, Request
from jexit.rollout.speculation import Speculation
from jexit.serve.protocol import Asked, Choice, Limits, Refused, parse

TURN_SECONDS = 0.04  # between two looks at who joins and leaves
MOST_STEPS = 256  # sampling steps in this time

_log = logging.getLogger(__name__)


class PoolThread(threading.Thread):
    """A thread that owns a running decoding pool and takes requests from all other threads.

    If the pool fails, `failure` is the exception, and every stream raises RunEnded. Completions
    under `Speculate` are decoded outside the pool, one at a time. A failure of such a completion
    ends only its own request. `close` ends the thread.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        super().__init__(name="jexit-pool", daemon=True)
        self.arrivals = arrivals
        # Each message joins a stream to the pool, or lets a choice of a stream leave it.
        self._inbox: queue.SimpleQueue[tuple[Stream, int | None] | None] = queue.SimpleQueue()
        self._streams: dict[int, tuple[Stream, int]] = {}  # ticket → stream and its choice
        self._drafted: collections.deque[tuple[Stream, int]] = collections.deque()
        self._speculation: Speculation | None = None  # of the first of `_drafted`
        self.failure: Exception | None = None
        self._closed = False

    def join_pool(self, stream: Stream) -> None:
        """Queues the stream's request for decoding; raises RunEnded if the thread was closed."""
        if self._closed:
            raise RunEnded("the decoding pool has been closed; open the model again")
        self._inbox.put((stream, None))

    def leave_pool(self, stream: Stream, choice: int) -> None:
        """Stops decoding one choice (completion) of a stream."""
        self._inbox.put((stream, choice))

    def close(self) -> None:
        """Ends the thread and waits for its end; streams that are still open raise RunEnded."""
        self._closed = True
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        try:
            self._decode()
            error: Exception = RunEnded("the decoding pool has been closed")
        except Exception as failure:  # of the device: out of memory, lost
            _log.exception("the decoding pool has failed")
            self.failure = error = failure
        for stream in {stream for stream, _ in (*self._drafted, *self._streams.values())}:
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
            if self._drafted:
                self._speculate(*self._drafted[0])

    def _speculate(self, stream: Stream, choice: int) -> None:
        """Runs one round of self-speculative decoding for a choice of a stream."""
        try:
            if self._speculation is None:
                request = stream.request
                alone = dataclasses.replace(
                    request,
                    prompts=[request.prompts[choice]],
                    first_prompt=request.first_prompt + choice,
                )
                self._speculation = Speculation(self.arrivals.split, alone)
            for grown in self._speculation.turn():
                stream.deliver(choice, grown)
            if self._speculation.ended:
                self._leave(stream, choice)
        except Exception as error:
            _log.exception("a speculation has failed")
            self._leave(stream, choice)
            stream.deliver(choice, error)

    def _read(self) -> bool:
        """Handles all messages; if there is nothing to decode, waits for one.

        Returns False if a message asks the thread to end (see `close`), and True otherwise.
        """
        while True:
            try:
                idle = not self.arrivals.under_way and not self._drafted
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            stream, choice = message
            if choice is None:
                self._join(stream)
            else:
                self._leave(stream, choice)

    def _join(self, stream: Stream) -> None:
        try:
            if isinstance(stream.request.policy, Speculate):
                self._drafted.extend((stream, n) for n in range(len(stream.request.prompts)))
                return
            for choice, ticket in enumerate(self.arrivals.join(stream.request)):
                self._streams[ticket] = stream, choice
        except Exception as error:  # of this request alone
            _log.exception("a request could not join the decoding pool")
            stream.deliver(0, error)

    def _leave(self, stream: Stream, choice: int) -> None:
        if (stream, choice) in self._drafted:
            if self._drafted[0] == (stream, choice):
                self._speculation = None
            self._drafted.remove((stream, choice))
        for ticket, owner in list(self._streams.items()):
            if owner == (stream, choice):
                self.arrivals.leave(ticket)
                del self._streams[ticket]


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

    def asked(self, values: Mapping[str, Any], *, chat: bool) -> Asked:
        """Parses a request from the fields `values`; raises Refused if it cannot be served."""
        try:
            asked = parse(values, chat=chat, tokenizer=self.tokenizer, limits=self.limits)
            self.pool.arrivals.check(asked.request)
        except UserError as error:
            raise Refused(400, str(error)) from None
        return asked

    async def answer(self, asked: Asked) -> AsyncGenerator[tuple[Choice, dict[str, Any]]]:
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
    size, default = EngineSize(rows=rows), policy_of(policy)
    model, tokenizer = load(directory)
    check_policy(default, (*model.exit_layers, model.arch.layers))
    warn_if_untrained(default, model)
    most = model.arch.max_positions
    half = min(1024, most // 2)
    prompt, new = max_prompt_tokens or half, max_new_tokens or half
    if prompt + new > most:
        raise UserError(
            f"--max-prompt-tokens and --max-new-tokens are {prompt + new} together, but the model "
            f"has only {most} positions for both; lower one of them"
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
    return Opened(model, tokenizer, pool, Limits(name=name, policy=default, new_tokens=new))
