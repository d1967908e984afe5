"""The server's metrics, in Prometheus's format."""

from __future__ import annotations

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ServerMetrics:
    """The Prometheus metrics of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=registry)
        seconds = functools.partial(Histogram, buckets=SECONDS, registry=registry)
        self.requests = counter("jexit_requests", "Requests that were answered", ["status"])
        self.prompt_tokens = counter("jexit_prompt_tokens", "Tokens of prompts that were accepted")
        self.tokens = counter("jexit_tokens", "Tokens that were generated")
        self.layers_run = counter("jexit_layers_run", "Layers that ran for generated tokens")
        self.hangups = counter(
            "jexit_hangups", "Clients that left before their answer was complete"
        )
        self.completions = Gauge(
            "jexit_completions", "Completions that wait or are being decoded", registry=registry
        )
        self.first_token = seconds(
            "jexit_first_token_seconds", "Time from a request to its first token"
        )
        self.whole = seconds(
            "jexit_request_seconds", "Time from a request to the end of its answer"
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
