"""Serves a model over HTTP with OpenAI's interface.

    python -m jexit.serve --model=DIR [--host=127.0.0.1] [--port=8000] [--api-key=KEY]
                          [--policy=threshold:0.5] [--max-prompt-tokens=N] [--max-new-tokens=N]
                          [--rows=N] [--max-waiting=N]

Needs the extra `serve` (`pip install -e '.[serve]'` in the checkout). `POST /v1/chat/completions`
and `/v1/completions` accept the requests of OpenAI's clients, streamed or not, with the additional
fields `policy`, `top_k`, `min_p` and `hazards`. Each choice of a response has `depths`, the number
of layers run for each token. `/` is a page to try the model; `/health` and `/metrics` are for
monitoring. The requests of all clients are decoded together in one pool.

The programs are compiled before the server listens, which takes from seconds to minutes. After
SIGTERM or Ctrl-C, the server completes the responses in progress and then exits.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from jexit.errors import UserError, command, missing_package

SHUTDOWN = 300  # seconds that answers may take to end after a signal
KEY_VARIABLE = "JEXIT_API_KEY"


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(missing_package(error.name, "serve")) from error
    try:
        with contextlib.closing(_listening(arguments.host, arguments.port)) as listening:
            server = _server(arguments)
            # Otherwise each full collection walks through all of JAX's and transformers' objects
            # and stops the server for a fifth of a second.
            gc.collect()
            gc.freeze()
            listening.listen()  # who reads the next line can connect
            host, port = listening.getsockname()[:2]
            print(f"jexit: serving {server.opened.limits.name} on http://{host}:{port}", flush=True)
            config = uvicorn.Config(
                server.app(),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_keep_alive=75,  # longer than clients keep an idle connection
                timeout_graceful_shutdown=SHUTDOWN,
            )
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _ended)  # uvicorn finishes its answers, then raises it again
            uvicorn.Server(config).run(sockets=[listening])
            server.opened.pool.close()
    except KeyboardInterrupt:  # while the programs are compiled
        return 130
    return 0 if server.opened.pool.failure is None else 1


def _ended(*_: object) -> None:
    """Ignores the signal that uvicorn raises again after it has shut down."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jexit.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a model directory, or a run's WORKDIR/model")
    add("--name", help="the model's name for clients; default: the directory's, or the run's")
    add("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too; set a key then")
    add("--port", type=int, default=8000)
    add("--api-key", default=os.environ.get(KEY_VARIABLE, ""),
        help=f"clients must send it; default: the environment variable {KEY_VARIABLE}")  # fmt: skip
    add("--policy", default="full", help="full, sample, threshold:X, fixed:N or speculate:LAYER, "
        "for requests that name none")  # fmt: skip
    limit = "default: 1024, or half of the model's positions if they are fewer than 2048"
    add("--max-prompt-tokens", type=int, help=f"tokens of a prompt; {limit}")
    add("--max-new-tokens", type=int, help=f"tokens of a completion; {limit}")
    add("--rows", type=int, default=0, help="completions decoded at a time, at most 64 (default)")
    add("--max-waiting", type=int, default=256, help="completions of all clients together")
    return parser


def _listening(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the address, so that a bad address fails before compilation."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}, but it must be from 0 to 65535; choose another")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"the server cannot listen on {host}:{port} ({reason}); choose another --port or --host"
        ) from error
    return bound


def _server(arguments: Any) -> Any:
    """Loads the model, compiles the pool's programs, starts the pool, and returns the server."""
    from jexit.serve.app import Server
    from jexit.serve.pool import open_pool

    if arguments.max_waiting < 1:
        raise UserError(
            f"--max-waiting is {arguments.max_waiting}, but it must be at least 1; raise it"
        )
    print("jexit: compiling", flush=True)
    opened = open_pool(
        arguments.model,
        name=arguments.name or "",
        policy=arguments.policy,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        rows=arguments.rows,
    )
    return Server(opened=opened, api_key=arguments.api_key, most_waiting=arguments.max_waiting)


if __name__ == "__main__":
    sys.exit(main())
