"""OpenTelemetry: which spans there are, how they hang together, and that they hold no text of a thread."""

from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from kv_retract import KVRetractSession
from kv_retract.events import Erased, PoliciesFailed, StatusChanges
from kv_retract.integrations.opentelemetry import TracingObserver
from kv_retract.integrations.opentelemetry.tracing import _MOST_HELD
from kv_retract.types import EraseResult, Status

from ..observed import (
    KINDS,
    MARKER,
    SHORT,
    Mistaken,
    Notes,
    decided,
    of_message,
    open_session,
    stepped,
    tell_everything,
    thread,
)


class Traces:
    """A provider and what was sent through it."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("application")

    def spans(self, name=None):
        return [span for span in self.exporter.get_finished_spans() if name in (None, span.name)]

    def names(self):
        return [span.name for span in self.spans()]


@pytest.fixture
def traces():
    return Traces()


@pytest.fixture
def observer(traces):
    return TracingObserver(traces.provider)


@pytest.fixture(scope="module")
def loaded():
    return KVRetractSession.from_pretrained("random", max_tokens=4096)


def is_child(span, parent):
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def erased(*ids, thread_id="t", **kw):
    return Erased(thread_id=thread_id, retraction_ids=ids or ("r1",), result=EraseResult(eraser_id="mask", **kw))


def test_a_real_session_is_traced_without_its_texts(traces, observer, loaded):
    notes = Notes()
    with open_session(loaded, "traced", notes, observer) as session:
        tell_everything(session)
    assert {type(event) for event in notes.events} == KINDS
    assert traces.names() == [
        "chat random",
        "chat random",
        "kv_retract.retract",
        "kv_retract.heal",
        "kv_retract.diverged",
        "kv_retract.status_change",
        "kv_retract.retract",
        "chat random",
        "chat random",
        "kv_retract.policies_failed",
    ]
    first, step, retracted, heal, diverged, undone, by_caller, failed, closed, policies = traces.spans()
    texts = [span.to_json() for span in traces.spans()]
    assert not any(MARKER in text for text in texts)
    digests = [digest for event in notes.events for digest in getattr(event, "digests", {}).values()]
    assert len(digests) == 2 and not any(digest in text for digest in digests for text in texts)
    assert all(span.attributes["gen_ai.conversation.id"] == "t" for span in traces.spans())

    event = next(e for e in notes.events if e.__class__.__name__ == "Stepped")
    assert dict(first.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "kv_retract",
        "gen_ai.request.model": "random",
        "gen_ai.conversation.id": "t",
        "gen_ai.response.finish_reasons": (event.finish_reason,),
        "gen_ai.response.time_to_first_chunk": event.first_token_ms / 1e3,
        "gen_ai.usage.input_tokens": event.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": event.num_completion_tokens,
        "kv_retract.retract_ms": event.retract_ms,
    }
    assert first.kind is SpanKind.CLIENT and first.status.status_code is StatusCode.UNSET
    assert first.end_time - first.start_time == pytest.approx(event.total_ms * 1e6, abs=1)
    assert step.attributes["gen_ai.usage.cache_read.input_tokens"] > 0

    assert is_child(retracted, step) and step.parent is None
    assert step.start_time < retracted.start_time < retracted.end_time < step.end_time
    assert retracted.attributes["kv_retract.policies"] == ("mistaken",)
    assert retracted.attributes["kv_retract.steered_spans"] == 1
    assert retracted.attributes["kv_retract.tokens_erased"] == retracted.attributes["kv_retract.span_tokens"] > 0

    ids = retracted.attributes["kv_retract.retraction_ids"]
    assert heal.attributes["kv_retract.retraction_ids"] == ids and heal.parent is None
    assert (heal.end_time - heal.start_time) / 1e9 == pytest.approx(heal.attributes["kv_retract.waited_s"], abs=1e-6)
    assert heal.status.status_code is StatusCode.UNSET and diverged.status.status_code is StatusCode.ERROR
    assert diverged.attributes["error.type"] == "diverged"
    assert diverged.attributes["kv_retract.kl"] == heal.attributes["kv_retract.kl"] > 0

    assert (undone.attributes["kv_retract.why"], undone.attributes["kv_retract.retraction_id"]) == ("undone", ids[0])
    assert by_caller.attributes["kv_retract.actor"] == "alice" and by_caller.parent is None
    assert failed.status.status_code is StatusCode.ERROR and failed.status.description is None
    assert failed.attributes["error.type"] == "MessageError" and "gen_ai.usage.input_tokens" not in failed.attributes
    assert closed.attributes["gen_ai.response.finish_reasons"] == ("closed",)
    assert closed.status.status_code is StatusCode.UNSET
    assert is_child(policies, closed) and policies.attributes["kv_retract.policies"] == ("broken",)


def test_names_are_those_of_the_semantic_conventions(traces, observer):
    observer.on_event(stepped(num_prompt_tokens=3))
    (step,) = traces.spans()
    known = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    assert {name for name in step.attributes if name.startswith("gen_ai.")} <= known


def test_everything_hangs_under_the_span_of_the_caller(traces, observer, loaded):
    with open_session(loaded, "callers", observer, policies=[Mistaken()]) as session:
        with traces.tracer.start_as_current_span("agent"):
            session.step("t", thread(4), sampling=SHORT)
            session.step("t", thread(6), sampling=SHORT)
            session.retract("t", thread(6), proposals=[of_message(4)])
    _, step, retracted, by_caller, agent = traces.spans()
    assert agent.name == "agent" and is_child(step, agent) and is_child(retracted, step) and is_child(by_caller, agent)
    assert len({span.context.trace_id for span in traces.spans()}) == 1


def test_what_policies_took_back_before_the_step_is_no_part_of_it(traces, observer, loaded):
    with open_session(loaded, "before", observer, policies=[Mistaken()]) as session:
        session.step("t", thread(4), sampling=SHORT)
        with traces.tracer.start_as_current_span("node"):
            session.retract("t", thread(6))
        assert traces.names() == ["chat random", "node"], "it is held until the next step"
        session.step("t", thread(6), sampling=SHORT)
    _, node, step, retracted = traces.spans()
    assert is_child(retracted, node) and step.parent is None and retracted.end_time < step.start_time


def test_what_a_caller_takes_back_is_sent_when_it_is_done(traces, observer):
    observer.on_event(decided(actor="alice"))
    assert not traces.spans()
    observer.on_event(erased(edit_ms=3.0))
    (retracted,) = traces.spans()
    assert retracted.attributes["kv_retract.edit_ms"] == 3.0
    observer.on_event(stepped())
    assert traces.names() == ["kv_retract.retract", "chat m"]


def test_an_edit_that_failed_is_an_error_of_its_step(traces, observer):
    observer.on_event(decided())
    observer.on_event(stepped(total_ms=1e4, first_token_ms=None, finish_reason="error", error="PoolExhaustedError"))
    step, retracted = traces.spans()
    assert is_child(retracted, step) and retracted.attributes["error.type"] == "not_erased"
    assert retracted.status.status_code is StatusCode.ERROR
    observer.close()
    assert len(traces.spans()) == 2, "nothing is sent twice"


def test_an_edit_of_a_caller_that_failed_is_sent_with_the_next_step(traces, observer):
    observer.on_event(decided(actor="alice"))
    observer.on_event(stepped(total_ms=0.0))
    step, retracted = traces.spans()
    assert not is_child(retracted, step) and retracted.attributes["error.type"] == "not_erased"


def test_an_edit_under_way_is_not_taken_for_a_failed_one(traces, observer):
    """Two Python threads step one thread: the first ends while the second erases."""
    observer.on_event(decided())
    observer.on_event(stepped(total_ms=1e4))
    assert traces.names() == ["chat m"]
    observer.on_event(erased())
    observer.on_event(stepped(total_ms=1e4))
    _, step, retracted = traces.spans()
    assert is_child(retracted, step) and "error.type" not in retracted.attributes


def test_threads_are_not_mixed_up(traces, observer):
    for name in ("a", "b"):
        observer.on_event(decided(name, ids=("same",)))
    for name in ("b", "a"):
        observer.on_event(erased("same", thread_id=name, edit_ms={"a": 1.0, "b": 2.0}[name]))
    observer.on_event(stepped("a", total_ms=1e4))
    step, retracted = traces.spans()
    assert retracted.attributes["kv_retract.edit_ms"] == 1.0 and is_child(retracted, step)
    observer.close()
    assert [span.attributes["gen_ai.conversation.id"] for span in traces.spans()] == ["a", "a", "b"]


def test_changes_that_the_session_makes_belong_to_the_step(traces, observer):
    change = {"thread_id": "t", "retraction_id": "r1", "before": Status.STEERED, "after": Status.EXACT}
    observer.on_event(StatusChanges(actor="session", why="cold", **change))
    observer.on_event(StatusChanges(actor="healer", why="healed", **change))
    observer.on_event(stepped(total_ms=1e4))
    step, cold = traces.spans()
    assert is_child(cold, step) and cold.attributes["kv_retract.why"] == "cold"


def test_what_waits_is_bounded_and_never_lost(traces, observer):
    for number in range(_MOST_HELD + 2):
        observer.on_event(PoliciesFailed(thread_id=str(number), failures=()))
    assert [span.attributes["gen_ai.conversation.id"] for span in traces.spans()] == ["0", "1"]
    observer.close()
    observer.close()
    sent = [int(span.attributes["gen_ai.conversation.id"]) for span in traces.spans()]
    assert len(sent) == _MOST_HELD + 2 and all(a < b for a, b in pairwise(sent))


def test_steps_of_a_model_in_this_process_may_be_internal(traces):
    TracingObserver(traces.provider, in_process=True).on_event(stepped())
    assert [span.kind for span in traces.spans()] == [SpanKind.INTERNAL]
