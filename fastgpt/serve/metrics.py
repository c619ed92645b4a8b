"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastgpt.inference import Piece

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name: dict[str, Any] = {"registry": self.registry}
        self.answers = Counter("fastgpt_http_requests", "Answers by route and status.", ["route", "status"], **name)
        self.prompt_tokens = Counter("fastgpt_prompt_tokens", "Tokens of prompts.", **name)
        self.cached = Counter("fastgpt_cached_prompt_tokens", "Tokens of prompts that were not read again.", **name)
        pages = "Pages of the cache that texts use, that are kept for texts that begin alike, and that are free."
        self.pages = Gauge("fastgpt_cache_pages", pages, ["model", "state"], **name)
        self.new_tokens = Counter("fastgpt_generated_tokens", "Tokens that were generated.", **name)
        self.requests = Gauge("fastgpt_requests", "Requests that run or wait.", **name)
        self.restarts = Gauge("fastgpt_engine_restarts", "Engines that ended and were started again.", **name)
        self.first = Histogram("fastgpt_first_token_seconds", "Time to the first token.", buckets=SECONDS, **name)
        self.each = Histogram("fastgpt_token_seconds", "Time between tokens.", buckets=SECONDS, **name)

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Count requests while they run or wait."""
        self.requests.inc(count)
        try:
            yield
        finally:
            self.requests.dec(count)

    def token(self, piece: Piece, seconds: float, first: bool) -> None:
        """Count a piece, and the seconds since the one before it or, for the first one, since the request came."""
        if piece.result is not None:
            self.prompt_tokens.inc(piece.result.prompt_tokens)
            self.cached.inc(piece.result.cached_tokens)
        if piece.id is not None:
            self.new_tokens.inc()
        (self.first if first else self.each).observe(seconds)

    def text(self) -> bytes:
        """Return the metrics in the text format."""
        return generate_latest(self.registry)
