"""Prometheus: what is counted, under which labels, and that no label holds a thread or its text."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kv_retract import KVRetractSession
from kv_retract.errors import DuplicateNameError
from kv_retract.events import Erased, Healed, Stepped
from kv_retract.integrations.prometheus import PrometheusObserver

from ..observed import KINDS, MARKER, Notes, decided, open_session, stepped, tell_everything

LABELS = {"policy", "guarantee", "exact", "why", "kind", "model", "finish_reason", "le"}


@pytest.fixture
def registry():
    return CollectorRegistry()


def test_a_real_session_is_counted_without_its_texts(registry):
    notes = Notes()
    loaded = KVRetractSession.from_pretrained("random", max_tokens=2048)
    with open_session(loaded, "counted", notes, PrometheusObserver(registry)) as session:
        tell_everything(session)
    assert {type(event) for event in notes.events} == KINDS

    def value(name, **labels):
        return registry.get_sample_value(f"kv_retract_{name}", labels)

    def of(kind):
        return [event for event in notes.events if isinstance(event, kind)]

    steered = {"policy": "mistaken", "guarantee": "steered", "exact": "false"}
    assert value("retractions_total", **steered) == 1
    assert value("retractions_total", **{**steered, "policy": "explicit", "exact": "true"}) == 1
    results = [event.result for event in of(Erased)]
    assert value("erased_tokens_total") == sum(r.tokens_erased for r in results) > 0
    assert value("recomputed_tokens_total") == sum(r.tokens_recomputed for r in results)
    assert value("edit_seconds_count") == 2
    assert value("edit_seconds_sum") == pytest.approx(sum(r.edit_ms for r in results) / 1e3)
    assert value("status_changes_total", why="healed") == value("status_changes_total", why="undone") == 1
    (healed,) = of(Healed)
    assert value("heal_wait_seconds_count") == 1 and value("heal_wait_seconds_sum") == healed.waited_s
    assert value("heal_tokens_total") == healed.tokens > 0
    assert value("divergence_nats_count") == 1 and value("divergence_nats_sum") == healed.divergence.kl > 0
    assert value("diverged_total") == 1
    assert value("policy_failures_total", policy="broken", kind="failed") == 1
    steps = of(Stepped)
    assert [value("step_seconds_count", model="random", finish_reason=r) for r in ("length", "error", "closed")] == [
        2,
        1,
        1,
    ]
    finished = value("step_seconds_sum", model="random", finish_reason="length")
    assert finished == pytest.approx(sum(s.total_ms for s in steps if s.finish_reason == "length") / 1e3)
    first = [s.first_token_ms for s in steps if s.first_token_ms is not None]
    assert value("time_to_first_token_seconds_count", model="random") == len(first) == 3
    assert value("time_to_first_token_seconds_sum", model="random") == pytest.approx(sum(first) / 1e3)
    for name in ("prompt", "cached", "completion"):
        total = sum(getattr(step, f"num_{name}_tokens") for step in steps)
        assert value(f"{name}_tokens_total", model="random") == total > 0

    assert MARKER not in generate_latest(registry).decode()
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    assert set().union(*(sample.labels for sample in samples)) == LABELS
    assert not {"t", "alice"} & {label for sample in samples for label in sample.labels.values()}


def test_a_span_that_several_policies_found_counts_for_each(registry):
    PrometheusObserver(registry).on_event(decided(ids=("a", "b"), policy="one+two+one"))
    counts = {
        s.labels["policy"]: s.value for m in registry.collect() for s in m.samples if s.name.endswith("actions_total")
    }
    assert counts == {"one": 2, "two": 2}


def test_names_of_policies_are_bounded(registry):
    observer = PrometheusObserver(registry)
    for number in range(300):
        observer.on_event(decided(policy=f"p{number}"))
    observer.on_event(decided(policy="p0"))
    counts = {
        s.labels["policy"]: s.value for m in registry.collect() for s in m.samples if s.name.endswith("actions_total")
    }
    assert len(counts) == 101 and counts["other"] == 200 and counts["p0"] == 2


def test_one_observer_serves_several_sessions_and_survives_their_end(registry):
    observer = PrometheusObserver(registry)
    observer.on_event(stepped())
    observer.close()
    observer.on_event(stepped("other"))
    assert registry.get_sample_value("kv_retract_step_seconds_count", {"model": "m", "finish_reason": ""}) == 2


def test_a_second_observer_on_a_registry_is_refused(registry):
    PrometheusObserver(registry)
    with pytest.raises(DuplicateNameError, match="share one PrometheusObserver"):
        PrometheusObserver(registry)
    PrometheusObserver(CollectorRegistry())
