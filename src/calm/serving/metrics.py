"""What the server counts, for Prometheus: requests, rows, tokens, times; never what was asked."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("calm_requests", "Requests answered", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            "calm_request_seconds", "From arrival to the last byte", ["path"], registry=registry, buckets=SECONDS
        )
        self.first_token_seconds = Histogram(
            "calm_first_token_seconds", "From arrival to the first token", registry=registry, buckets=SECONDS
        )
        self.waiting = Gauge("calm_rows_waiting", "Rows that wait for their batch", registry=registry)
        self.running = Gauge("calm_rows_running", "Rows of the batch that runs", registry=registry)
        self.batch_rows = Histogram(
            "calm_batch_rows", "Rows of a batch", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.prompt_tokens = Counter("calm_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter("calm_generated_tokens", "Tokens generated", registry=registry)

    def render(self) -> bytes:
        """All of them in the text format that Prometheus reads."""
        return generate_latest(self._registry)
