"""What the server counts, in Prometheus's format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "jexit_requests", "Requests that were answered", ["status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "jexit_prompt_tokens", "Tokens of prompts that were accepted", registry=registry
        )
        self.tokens = Counter("jexit_tokens", "Tokens that were generated", registry=registry)
        self.layers_run = Counter(
            "jexit_layers_run", "Layers that ran for generated tokens", registry=registry
        )
        self.hangups = Counter(
            "jexit_hangups", "Clients that left before their answer was complete", registry=registry
        )
        self.completions = Gauge(
            "jexit_completions", "Completions that wait or are being decoded", registry=registry
        )
        self.first_token = Histogram(
            "jexit_first_token_seconds",
            "Time from a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "jexit_request_seconds",
            "Time from a request to the end of its answer",
            buckets=SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
