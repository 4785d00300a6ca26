"""Metrics of steps, retractions and heals. Labels have few values: never a thread, never a reason."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from kv_retract.errors import DuplicateNameError
from kv_retract.events import Decided, Diverged, Erased, Event, Healed, Observer, PoliciesFailed, StatusChanges, Stepped

_EDIT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
_STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WAIT_SECONDS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_KL_NATS = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_MOST_POLICIES = 100
"""Names of policies that become labels; callers may make up names, and all further ones count as `other`."""


class PrometheusObserver(Observer):
    """Counts events; share one among all sessions whose metrics go to one registry.

    Args:
        registry: where the metrics are; by default the global one of `prometheus_client`.

    Raises:
        DuplicateNameError: the registry has these metrics already.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._policies: set[str] = set()
        try:
            self._add_metrics(REGISTRY if registry is None else registry)
        except ValueError as error:
            raise DuplicateNameError(
                f"expected a registry without metrics of kv-retract, got one that has some ({error}); share one "
                "PrometheusObserver among sessions, or pass another CollectorRegistry"
            ) from error

    def _add_metrics(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kv_retract_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"kv_retract_{name}", text, labels, buckets=buckets, registry=registry)

        self._retractions = counter(
            "retractions_total",
            "Spans taken back; one that several policies found counts for each.",
            "policy", "guarantee", "exact",
        )  # fmt: skip
        self._erased = counter("erased_tokens_total", "Tokens of spans that edits took out of the cache.")
        self._recomputed = counter("recomputed_tokens_total", "Tokens that edits sent through the model.")
        self._edit = histogram("edit_seconds", "Time of one edit of the cache.", _EDIT_SECONDS)
        self._changes = counter("status_changes_total", "Retractions that changed their status.", "why")
        self._heal_wait = histogram("heal_wait_seconds", "Time from an edit until its thread is exact.", _WAIT_SECONDS)
        self._healed = counter("heal_tokens_total", "Tokens prefilled to make threads exact.")
        self._kl = histogram("divergence_nats", "KL(exact || steered) as measured at the end of a heal.", _KL_NATS)
        self._diverged = counter("diverged_total", "Heals that measured more than the threshold of the session.")
        self._failures = counter("policy_failures_total", "Policies that gave nothing before a step.", "policy", "kind")
        self._step = histogram(
            "step_seconds", "Time of one step, retractions included.", _STEP_SECONDS, "model", "finish_reason"
        )
        self._first = histogram(
            "time_to_first_token_seconds",
            "Time from the beginning of a step to its first token.",
            _STEP_SECONDS,
            "model",
        )
        self._prompt = counter("prompt_tokens_total", "Tokens that steps attended to, cached ones included.", "model")
        self._cached = counter("cached_tokens_total", "Those of them that came from the cache.", "model")
        self._completion = counter("completion_tokens_total", "Tokens decoded.", "model")

    def on_event(self, event: Event) -> None:
        """See the base class."""
        match event:
            case Decided():
                for span in event.plan.spans:
                    for name in set(span.record.policy.split("+")):
                        exact = "true" if span.exact else "false"
                        self._retractions.labels(self._known(name), span.record.guarantee.value, exact).inc()
            case Erased(result=result):
                self._erased.inc(result.tokens_erased)
                self._recomputed.inc(result.tokens_recomputed)
                self._edit.observe(result.edit_ms / 1e3)
            case StatusChanges():
                self._changes.labels(event.why).inc()
            case Healed():
                self._heal_wait.observe(event.waited_s)
                self._healed.inc(event.tokens)
                if event.divergence is not None:
                    self._kl.observe(event.divergence.kl)
            case Diverged():
                self._diverged.inc()
            case PoliciesFailed():
                for failure in event.failures:
                    self._failures.labels(self._known(failure.policy), failure.kind).inc()
            case Stepped():
                self._step.labels(event.model, event.finish_reason).observe(event.total_ms / 1e3)
                if event.first_token_ms is not None:
                    self._first.labels(event.model).observe(event.first_token_ms / 1e3)
                self._prompt.labels(event.model).inc(event.num_prompt_tokens)
                self._cached.labels(event.model).inc(event.num_cached_tokens)
                self._completion.labels(event.model).inc(event.num_completion_tokens)

    def _known(self, policy: str) -> str:
        if policy not in self._policies and len(self._policies) >= _MOST_POLICIES:
            return "other"
        self._policies.add(policy)
        return policy
