"""What an entry says of an event: names, reasons, digests, counts and positions. Never text of a thread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..events import Decided, Diverged, Erased, Event, Healed, PoliciesFailed, StatusChanges
from ..types import Divergence, PlannedSpan


def fields_of(event: Event) -> dict[str, Any] | None:
    """Return what the entry of an event holds, JSON-able; None for events that are not audited (`Stepped`)."""
    match event:
        case Decided():
            return _fields(
                event,
                "decided",
                actor=event.actor,
                spans=[_span(span, event.digests) for span in event.plan.spans],
                hops=[asdict(hop) for hop in event.plan.hops],
                num_dropped=len(event.plan.dropped),
            )
        case Erased():
            return _fields(event, "erased", retraction_ids=event.retraction_ids, cost=asdict(event.result))
        case StatusChanges():
            return _fields(
                event,
                "status_changes",
                actor=event.actor,
                retraction_id=event.retraction_id,
                before=event.before,
                after=event.after,
                why=event.why,
                divergence=_divergence(event.divergence),
            )
        case Healed():
            return _fields(
                event,
                "healed",
                retraction_ids=event.retraction_ids,
                tokens=event.tokens,
                waited_s=event.waited_s,
                divergence=_divergence(event.divergence),
            )
        case Diverged():
            return _fields(
                event,
                "diverged",
                retraction_ids=event.retraction_ids,
                divergence=_divergence(event.divergence),
                threshold=_number(event.threshold),
            )
        case PoliciesFailed():
            # The message of a failure may quote what the policy read.
            failures = [{"policy": failure.policy, "kind": failure.kind} for failure in event.failures]
            return _fields(event, "policies_failed", failures=failures)
    return None


def _fields(event: Event, name: str, **said: Any) -> dict[str, Any]:
    return {"event": name, "at": event.at, "thread_id": event.thread_id, **said}


def _span(span: PlannedSpan, digests: Mapping[str, str]) -> dict[str, Any]:
    record = span.record
    return {
        "retraction_id": record.retraction_id,
        "span": asdict(record.span),
        "digest": digests[record.retraction_id],
        "tokens": span.end - span.start,
        "policy": record.policy,
        "reason": record.reason,
        "guarantee": record.guarantee,
        "scope": record.scope,
        "status": record.status,
        "eraser_id": record.eraser_id,
        "why_exact": span.why_exact,
        "verify": span.verify,
        "derived_from": record.derived_from,
    }


def _divergence(divergence: Divergence | None) -> dict[str, Any] | None:
    if divergence is None:
        return None
    return {name: _number(value) for name, value in asdict(divergence).items()}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinities
