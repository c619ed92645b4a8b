"""What a watcher reports: counters and gauges for Prometheus, and events for the webhook. Never a text."""

from __future__ import annotations

import logging
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from fastgpt.serve.watch.drift import Finding
from fastgpt.serve.watch.webhook import Webhook

log = logging.getLogger("fastgpt")


class Reports:
    """Counters, gauges and the webhook.

    Args:
        url, secret: of the webhook; None: no events are sent.
    """

    def __init__(self, registry: CollectorRegistry, url: str | None, secret: bytes) -> None:
        name: dict[str, Any] = {"registry": registry}
        drift: dict[str, Any] = {"labelnames": ["model", "measure"], **name}
        self._flags = Counter("fastgpt_flags", "Flagged answers and prompts.", ["name", "where"], **name)
        self._failures = Counter("fastgpt_watch_failures", "What watching failed to do.", ["part"], **name)
        self._value = Gauge("fastgpt_drift_value", "Mean of a measure over the latest answers.", **drift)
        self._baseline = Gauge("fastgpt_drift_baseline", "Mean of a measure over the baseline.", **drift)
        self._p = Gauge("fastgpt_drift_p", "P-value of the difference between the two.", **drift)
        self._alarm = Gauge("fastgpt_drift_alarm", "1 while a measure has drifted.", **drift)
        self._recorded = Gauge("fastgpt_drift_recorded", "Answers in the baseline.", ["model"], **name)
        self._failed_before = set[str]()
        self._webhook = Webhook(url, secret, lambda part: self.failed(f"webhook {part}")) if url else None

    def flagged(self, name: str, where: str, **about: str) -> None:
        """Report a flag of an answer or a prompt."""
        self._flags.labels(name, where).inc()
        self._send("flag.found", name=name, where=where, **about)

    def failed(self, part: str, e: Exception | None = None) -> None:
        """Count a failure, and log the first one of its part; without the error's message, which may have a text."""
        self._failures.labels(part).inc()
        if part not in self._failed_before:
            self._failed_before.add(part)
            log.warning("watching: %s failed%s", part, f" ({type(e).__name__})" if e else "")

    def recorded(self, model: str, answers: int) -> None:
        """Report how many answers a baseline has."""
        self._recorded.labels(model).set(answers)

    def drift(self, model: str, found: Finding) -> None:
        """Report the comparison of a measure; an alarm that begins or ends is an event."""
        where = (model, found.measure)
        for gauge, value in (
            (self._value, found.value),
            (self._baseline, found.baseline),
            (self._p, found.p),
            (self._alarm, found.alarm),
        ):
            gauge.labels(*where).set(value)
        if found.changed:
            about = {"value": found.value, "baseline": found.baseline, "p": found.p}
            log.warning("%s: %s %s", model, found.measure, "has drifted" if found.alarm else "drifts no longer")
            self._send("drift.began" if found.alarm else "drift.ended", model=model, measure=found.measure, **about)

    def _send(self, kind: str, **data: Any) -> None:
        if self._webhook is not None:
            self._webhook.send(kind, **data)

    def close(self) -> None:
        """Send the events that wait."""
        if self._webhook is not None:
            self._webhook.close()
