"""What ``/metrics`` says, in Prometheus' conventions; every server counts for itself."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from pvec.serve.answers import Outcome

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NORMS = (-2, -1, -0.75, -0.5, -0.3, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2)
"""Bounds of projections: residual norms."""


class Metrics:
    """The counters of one server."""

    def __init__(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pvec_requests", "HTTP requests by endpoint and status", ["endpoint", "status"],
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "pvec_request_seconds", "Duration of a request", ["endpoint"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._answers = Counter(
            "pvec_answers", "Answers by how they ended: stop, length, cancelled, error", ["reason"],
            registry=registry,
        )  # fmt: skip
        self._steered = Counter(
            "pvec_steered_answers", "Answers that were steered", registry=registry
        )
        self._prompt_tokens = Counter("pvec_prompt_tokens", "Tokens of prompts", registry=registry)
        self._tokens = Counter("pvec_generated_tokens", "Tokens generated", registry=registry)
        self._first_token = Histogram(
            "pvec_time_to_first_token_seconds", "Time until an answer's first token",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._projection = Histogram(
            "pvec_projection", "Projections of answers and prompts on a vector, in residual norms",
            ["model", "vector", "of"], buckets=_NORMS, registry=registry,
        )  # fmt: skip
        self.alarms = Counter(
            "pvec_alarms", "Answers whose projection passed a policy's alarm", ["vector"],
            registry=registry,
        )  # fmt: skip
        self._capped = Counter(
            "pvec_capped_answers", "Answers capped by a policy", ["vector"], registry=registry
        )
        self.log_errors = Counter(
            "pvec_log_errors", "Lines that could not be written into the log", registry=registry
        )
        self.gauge("pvec_answers_running", "Answers that are running", running)
        self.gauge("pvec_answers_waiting", "Answers that are waiting", waiting)

    def gauge(self, name: str, text: str, value: Callable[[], int]) -> None:
        """Also say what ``value`` returns."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def outcome(self, outcome: Outcome) -> None:
        """Count an answer that has ended, however it did."""
        self._answers.labels(outcome.reason).inc()
        self._prompt_tokens.inc(len(outcome.answer.request.prompt_ids))
        self._tokens.inc(outcome.tokens)
        if outcome.steering:
            self._steered.inc()
        if outcome.first_token is not None:
            self._first_token.observe(outcome.first_token)
        for vector in outcome.capped:
            self._capped.labels(vector).inc()
        watched = {alarm.vector for _, alarm in outcome.answer.alarms}
        for vector in watched.intersection(outcome.capped):
            self.alarms.labels(vector).inc()

    def projection(self, model: str, vector: str, *, of: str, value: float) -> None:
        """Count the projection of an answer or a prompt."""
        self._projection.labels(model, vector, of).observe(value)

    def text(self) -> bytes:
        """Return all of it in the text format."""
        return generate_latest(self._registry)
