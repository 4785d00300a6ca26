"""Spans of steps, retractions and heals, named as the GenAI semantic conventions of OpenTelemetry have it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from opentelemetry import context, trace
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider

from kv_retract.events import Decided, Diverged, Erased, Event, Healed, Observer, PoliciesFailed, StatusChanges, Stepped
from kv_retract.logs import Field, fields_of

_MOST_HELD = 1024
"""Spans that may wait for the end of their step; of more, the oldest are sent as they are."""
_NOT_ERASED = "not_erased"
"""`error.type` of a retraction that was decided and never reported as done."""


@dataclass(slots=True, eq=False)
class _Told:
    """What is to become a span; times in nanoseconds since the epoch."""

    thread_id: str
    name: str
    start: int
    end: int | None
    """None from the decision until the cache is edited."""
    attributes: dict[str, Field]
    parent: context.Context
    error: str = ""
    """`error.type`; empty where all is well."""


class TracingObserver(Observer):
    """Sends a span per step, with a child for what was taken back in it.

    A step is told when it is over, so what policies and the session do is held until then. What a caller does by
    himself, and what the healer does, becomes a span at once, under the span that is current there. No text of a
    thread, no reason and no digest is in any span.

    Args:
        tracer_provider: where spans go; by default OpenTelemetry's global one. It is not shut down here.
        in_process: whether the model runs in this process: steps are spans of kind INTERNAL then, else CLIENT.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None, *, in_process: bool = False) -> None:
        self._tracer = trace.get_tracer("kv_retract", tracer_provider=tracer_provider)
        self._kind = SpanKind.INTERNAL if in_process else SpanKind.CLIENT
        self._held: list[_Told] = []
        self._lock = threading.Lock()

    def on_event(self, event: Event) -> None:
        """See the base class."""
        now = time.time_ns()
        match event:
            case Stepped():
                self._step(event, now)
            case Decided():
                self._hold(_told("kv_retract.retract", event, now, None))
            case Erased():
                self._erased(event, now)
            case PoliciesFailed():
                self._hold(_told("kv_retract.policies_failed", event, now, now))
            case StatusChanges(why="healed"):
                pass  # the heal's span says it
            case StatusChanges(actor="policy" | "session"):
                self._hold(_told("kv_retract.status_change", event, now, now))
            case StatusChanges():
                self._send(_told("kv_retract.status_change", event, now, now))
            case Healed():
                self._send(_told("kv_retract.heal", event, now - round(event.waited_s * 1e9), now))
            case Diverged():
                self._send(_told("kv_retract.diverged", event, now, now, error="diverged"))

    def close(self) -> None:
        """Send what is still held."""
        with self._lock:
            held, self._held = self._held, []
        for told in held:
            self._send(told)

    def _hold(self, told: _Told) -> None:
        with self._lock:
            self._held.append(told)
            oldest = self._held.pop(0) if len(self._held) > _MOST_HELD else None
        if oldest is not None:
            self._send(oldest)

    def _erased(self, event: Erased, now: int) -> None:
        ids = list(event.retraction_ids)
        with self._lock:
            waiting = (t for t in self._held if t.thread_id == event.thread_id and t.end is None)
            told = next((t for t in waiting if t.attributes["kv_retract.retraction_ids"] == ids), None)
            if told is None:
                return  # too many were held: it was sent without its end
            told.end = now
            told.attributes |= _attributes(event)
            at_once = told.attributes["kv_retract.actor"] != "policy"
            if at_once:
                self._held.remove(told)
        if at_once:
            self._send(told)

    def _step(self, event: Stepped, now: int) -> None:
        start = now - round(event.total_ms * 1e6)
        step = _Told(
            event.thread_id, f"chat {event.model}", start, now, _of_step(event), context.get_current(), event.error
        )
        with self._lock:
            # An edit that began in the step and has no end, though the step went well, is another Python thread's.
            mine = [
                told
                for told in self._held
                if told.thread_id == event.thread_id and (told.end is not None or event.error or told.start < start)
            ]
            self._held = [told for told in self._held if told not in mine]
        inside = trace.set_span_in_context(self._send(step, self._kind))
        for told in mine:
            if (told.end or told.start) >= start:
                told.parent = inside
            self._send(told)

    def _send(self, told: _Told, kind: SpanKind = SpanKind.INTERNAL) -> Span:
        error = told.error or ("" if told.end is not None else _NOT_ERASED)
        span = self._tracer.start_span(
            told.name,
            told.parent,
            kind,
            {**told.attributes, "error.type": error} if error else told.attributes,
            start_time=told.start,
        )
        if error:
            span.set_status(StatusCode.ERROR)
        span.end(told.start if told.end is None else told.end)
        return span


def _told(name: str, event: Event, start: int, end: int | None, *, error: str = "") -> _Told:
    return _Told(event.thread_id, name, start, end, _attributes(event), context.get_current(), error)


def _attributes(event: Event) -> dict[str, Field]:
    fields = {f"kv_retract.{name}": value for name, value in fields_of(event).items()}
    return {"gen_ai.conversation.id": event.thread_id, **fields}


def _of_step(event: Stepped) -> dict[str, Field]:
    attributes: dict[str, Field] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "kv_retract",
        "gen_ai.request.model": event.model,
        "gen_ai.conversation.id": event.thread_id,
        "gen_ai.response.finish_reasons": [event.finish_reason],
        "kv_retract.retract_ms": event.retract_ms,
    }
    if event.first_token_ms is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = event.first_token_ms / 1e3
    if event.num_prompt_tokens:  # only known of an answer that was finished
        attributes["gen_ai.usage.input_tokens"] = event.num_prompt_tokens
        attributes["gen_ai.usage.cache_read.input_tokens"] = event.num_cached_tokens
        attributes["gen_ai.usage.output_tokens"] = event.num_completion_tokens
    return attributes
