"""Counts what the app does, for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # upper ends of the histogram's bins
OUTCOMES = ("done", "refused", "cancelled", "timeout", "error")


class Metrics:
    """Counts nothing; `PrometheusMetrics` counts."""

    def running(self, change: int) -> None:
        """Counts a request that starts (1) or ends (-1)."""

    def finished(self, work: str, outcome: str, seconds: float) -> None:
        """Counts a request's end.

        Args:
            work: "segment", "complete", ...
            outcome: one of OUTCOMES.
            seconds: that it took, without its time in the queue.
        """

    def rejected(self, reason: str) -> None:
        """Counts a request that was turned away before any work: "queue", "upload", "auth" or "disk"."""

    def segments(self, number: int) -> None:
        """Counts segments that were found."""


class PrometheusMetrics(Metrics):
    """Counts in a registry of its own.

    Args:
        queued: gives how many requests wait.
    """

    def __init__(self, queued: Callable[[], int] = lambda: 0) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("ldmseg_requests", "Requests by work and outcome", ["work", "outcome"], **made)
        self._seconds = Histogram("ldmseg_request_seconds", "Seconds of work", ["work"], buckets=SECONDS, **made)
        self._running = Gauge("ldmseg_running", "Requests that are worked on", **made)
        self._queue = Gauge("ldmseg_queue", "Requests that wait", **made)
        self._rejected = Counter("ldmseg_rejected", "Requests turned away before any work", ["reason"], **made)
        self._errors = Counter("ldmseg_errors", "Requests that met a fault of the app", **made)
        self._segments = Counter("ldmseg_segments", "Segments that were found", **made)
        self.observe_queue(queued)

    def observe_queue(self, queued: Callable[[], int]) -> None:
        """Says what gives the number of requests that wait."""
        self._queue.set_function(queued)

    def running(self, change: int) -> None:
        self._running.inc(change)

    def finished(self, work: str, outcome: str, seconds: float) -> None:
        self._requests.labels(work, outcome).inc()
        self._seconds.labels(work).observe(seconds)
        if outcome == "error":
            self._errors.inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def segments(self, number: int) -> None:
        self._segments.inc(number)

    def text(self) -> bytes:
        """Writes all numbers in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
