"""Prometheus metrics of span retractions, beside SGLang's own at `/metrics` (`--enable-metrics`)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
"""Seconds."""


class SpanMetrics:
    """Counts operations; create it once a process, after SGLang has set up its metrics."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        self._operations = Counter(
            "kv_retract:operations", "Operations on the cache, by what came of them.", ("operation", "outcome")
        )
        self._tokens = Counter("kv_retract:tokens_erased", "Tokens whose KV was erased.")
        self._freed = Counter("kv_retract:slots_freed", "Slots that edits gave back.")
        self._missed = Counter("kv_retract:replicas_missed", "Replicas that did not confirm an operation at once.")
        self._seconds = Histogram(
            "kv_retract:operation_seconds",
            "Time of an operation, waiting for its thread included.",
            ("operation",),
            buckets=_BUCKETS,
        )

    def started(self, operation: str) -> Callable[[bool, str], None]:
        """Note the time; call what is returned with whether the operation went well, and the JSON of its answer."""
        began = time.perf_counter()

        def done(ok: bool, body: str) -> None:
            answer = json.loads(body)
            self._operations.labels(operation, "ok" if ok else answer["error"]).inc()
            self._seconds.labels(operation).observe(time.perf_counter() - began)
            edit = answer.get("edit", answer) if ok else {}
            self._tokens.inc(edit.get("tokens_erased", 0))
            self._freed.inc(edit.get("slots_freed", 0))
            self._missed.inc(len(answer.get("replicas", {}).get("missed", ())))

        return done
