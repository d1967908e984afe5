"""The HTTP application: routes, API keys, limits and streaming."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import pathlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from jexit.errors import RunEnded
from jexit.serve.metrics import ServerMetrics
from jexit.serve.pool import Opened
from jexit.serve.protocol import (
    Choice,
    ParsedRequest,
    Refused,
    check_model,
    choice_body,
    gathered,
    usage,
    values_of,
)

PAGE = pathlib.Path(__file__).parent / "page"
LARGE = 1 << 14  # bytes of a body that is parsed and tokenised beside the event loop
SENT = 20.0  # seconds that a client may take to send its request's body
STALLED = 60.0  # seconds until a client that reads nothing has left
# The page loads nothing from elsewhere and runs no script but its own.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(kw_only=True)
class Server:
    """An HTTP server for one model, with limits on the requests of clients.

    `most_waiting` limits the number of completions of all clients together, and `most_bytes` the
    size of a request's body. Without `api_key`, every client is served.
    """

    opened: Opened
    api_key: str = ""
    most_waiting: int = 256
    most_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics()
        self.completions = 0
        self.started = int(time.time())

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.page),
                Mount("/page", _PageFiles(directory=PAGE)),
                Route("/health", self.health),
                Route("/metrics", self.prometheus),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.text, methods=["POST"]),
            ],
            exception_handlers={
                Refused: self.refuse,
                404: self.not_found,
                405: self.not_found,
                Exception: self.failed,
            },
        )

    async def page(self, request: Request) -> Response:
        return Response(
            (PAGE / "index.html").read_bytes(),
            media_type="text/html",
            headers={"Content-Security-Policy": PAGE_POLICY},
        )

    async def health(self, request: Request) -> Response:
        works = self.opened.pool.failure is None
        said = "ok" if works else "the decoding pool has failed; restart the server"
        return JSONResponse({"status": said}, 200 if works else 503)

    async def prometheus(self, request: Request) -> Response:
        self.metrics.completions.set(self.completions)
        return PlainTextResponse(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        check_model(request.path_params["name"], self.opened.limits)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.opened.limits.name,
            "object": "model",
            "created": self.started,
            "owned_by": "jexit",
            "layers": self.opened.model.arch.layers,
            "exit_layers": list(self.opened.model.exit_layers),
            "policy": self.opened.limits.policy.name,
            "max_new_tokens": self.opened.limits.new_tokens,
        }

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, chat=True)

    async def text(self, request: Request) -> Response:
        return await self._complete(request, chat=False)

    async def refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        self.metrics.requests.labels(str(error.status)).inc()
        # Without the rest of a body that is too large, the connection cannot be used again.
        headers = {429: {"Retry-After": "1"}, 413: {"Connection": "close"}}.get(error.status)
        return JSONResponse(error.body, error.status, headers)

    async def not_found(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        said = (
            f"{request.method} {request.url.path[:200]} is not served here; use another path or "
            "method, such as GET /v1/models"
        )
        answer = await self.refuse(request, Refused(status, said))
        answer.headers.update(getattr(error, "headers", None) or {})  # Allow, of a wrong method
        return answer

    async def failed(self, request: Request, error: Exception) -> Response:
        return await self.refuse(request, Refused(500, "the server failed; see its log"))

    async def _complete(self, request: Request, *, chat: bool) -> Response:
        self._check_key(request)
        began = time.perf_counter()
        data = await self._body(request)
        if len(data) < LARGE:
            asked = self._asked(data, chat)
        else:
            asked = await asyncio.to_thread(self._asked, data, chat)
        with contextlib.ExitStack() as admitted:
            admitted.enter_context(self._admitted(len(asked.request.prompts)))
            self.metrics.prompt_tokens.inc(asked.prompt_tokens)
            parts = self._answer(asked, began)
            if asked.stream:
                return _Events(self._events(asked, parts), admitted.pop_all())
            whole = asyncio.ensure_future(self._whole(asked, parts))
            left = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
                if not whole.done():
                    return Response(status_code=499)  # nobody is there to read it
                return JSONResponse(whole.result())
            except RunEnded as error:
                raise Refused(503, str(error)) from None
            finally:
                for task in (whole, left):
                    task.cancel()
                await asyncio.wait({whole, left})

    def _asked(self, data: bytes, chat: bool) -> ParsedRequest:
        return self.opened.asked(values_of(data), chat=chat)

    def _check_key(self, request: Request) -> None:
        if not self.api_key:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Refused(
                401,
                "the API key is wrong or missing; send the header Authorization: Bearer KEY, where "
                "KEY is the key that the server was started with (--api-key or JEXIT_API_KEY)",
            )

    @contextlib.contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        """Counts `count` completions as in progress during the `with` block.

        Raises Refused if they would exceed `most_waiting`, or if the pool has failed.
        """
        if self.opened.pool.failure is not None:
            raise Refused(503, "the decoding pool has failed; restart the server")
        if self.completions + count > self.most_waiting:
            raise Refused(
                429,
                f"{self.completions} completions wait or are being decoded, and the server takes "
                f"at most {self.most_waiting}; try again later",
            )
        self.completions += count
        try:
            yield
        finally:
            self.completions -= count

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(
                415,
                f"the content type is {kind!r}, but it must be application/json; set the header "
                "Content-Type: application/json",
            )
        parts, size = [], 0
        try:
            async with asyncio.timeout(SENT):
                async for part in request.stream():
                    size += len(part)
                    if size > self.most_bytes:
                        raise Refused(
                            413,
                            f"the body is larger than {self.most_bytes} bytes, the most that this "
                            "server accepts; shorten the request",
                        )
                    parts.append(part)
        except TimeoutError:
            raise Refused(
                408,
                f"the body has not arrived within {SENT:g} seconds; send the request again",
            ) from None
        except ClientDisconnect:
            raise Refused(
                400, "the connection was closed before the body ended; send the request again"
            ) from None
        return b"".join(parts)

    async def _answer(
        self, asked: ParsedRequest, began: float
    ) -> AsyncIterator[tuple[Choice, dict[str, Any]]]:
        """Decodes a request; yields (choice, fields of its new tokens) and updates the metrics."""
        first = True
        try:
            async with contextlib.aclosing(self.opened.answer(asked)) as parts:
                async for choice, fields in parts:
                    if first:
                        self.metrics.first_token.observe(time.perf_counter() - began)
                        first = False
                    self.metrics.tokens.inc(len(fields["depths"]))
                    self.metrics.layers_run.inc(sum(fields["depths"]))
                    yield choice, fields
        except (GeneratorExit, asyncio.CancelledError):  # the client has gone
            self.metrics.hangups.inc()
            raise
        self.metrics.requests.labels("200").inc()
        self.metrics.whole.observe(time.perf_counter() - began)

    async def _whole(self, asked: ParsedRequest, parts: Any) -> dict[str, Any]:
        whole = await gathered(parts)
        made = [choice_body(choice, fields, part=False) for choice, fields in whole]
        used = usage(asked, [choice for choice, _ in whole])
        return self._head(asked, "") | {"choices": made, "usage": used}

    async def _events(self, asked: ParsedRequest, parts: Any) -> AsyncGenerator[bytes]:
        head, choices = self._head(asked, ".chunk" if asked.chat else ""), {}
        try:
            async with contextlib.aclosing(parts):
                async for choice, fields in parts:
                    choices[choice.index] = choice
                    yield _event(head | {"choices": [choice_body(choice, fields, part=True)]})
        except RunEnded as error:
            self.metrics.requests.labels("503").inc()
            yield _event(Refused(503, str(error)).body)
            return
        if asked.usage:
            yield _event(head | {"choices": [], "usage": usage(asked, list(choices.values()))})
        yield b"data: [DONE]\n\n"

    def _head(self, asked: ParsedRequest, suffix: str) -> dict[str, Any]:
        kind, prefix = (
            ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        )
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind + suffix,
            "created": int(time.time()),
            "model": self.opened.limits.name,
        }


class _Events(StreamingResponse):
    """A response of server-sent events; when it ends for any reason, it closes `admitted`.

    `admitted` counts the completions as in progress (see `Server._admitted`). The response also
    ends if the client has read nothing for `STALLED` seconds.
    """

    def __init__(self, events: AsyncGenerator[bytes], admitted: contextlib.ExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._admitted = events, admitted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timely(message: Message) -> None:
            await asyncio.wait_for(send(message), STALLED)

        with self._admitted, contextlib.suppress(TimeoutError, ClientDisconnect):
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, timely)


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **settings: Any) -> Response:
        answer = super().file_response(*args, **settings)
        answer.headers["Content-Security-Policy"] = PAGE_POLICY
        return answer


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(request: Request) -> None:
    """Returns when the client disconnects; the body of `request` must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
