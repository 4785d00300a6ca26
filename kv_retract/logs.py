"""Events as log lines: the standard library's logging, with fields that a machine can read."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TypeAlias

from .events import Decided, Diverged, Erased, Event, Healed, Observer, PoliciesFailed, StatusChanges, Stepped
from .types import Divergence, RetractionPlan

Field: TypeAlias = str | int | float | bool | list[str]

_LINES: dict[type[Event], tuple[int, str, str]] = {
    Decided: (logging.INFO, "decided", "thread %(thread_id)r: %(spans)d spans are taken back, %(exact_spans)d exactly"),
    Erased: (logging.INFO, "erased", "thread %(thread_id)r: %(tokens_erased)d tokens erased in %(edit_ms).1f ms"),
    StatusChanges: (logging.INFO, "status_changes", "thread %(thread_id)r: a retraction changes, %(why)s: %(after)s"),
    Healed: (logging.INFO, "healed", "thread %(thread_id)r is exact after %(waited_s).1f s"),
    Diverged: (logging.WARNING, "diverged", "thread %(thread_id)r was steered too far from exact: KL %(kl).3g nats"),
    PoliciesFailed: (logging.WARNING, "policies_failed", "thread %(thread_id)r: policies gave nothing: %(policies)s"),
    Stepped: (logging.DEBUG, "stepped", "thread %(thread_id)r: %(finish_reason)s after %(total_ms).1f ms"),
}
"""Level, name and message of each kind of event."""


def fields_of(event: Event) -> dict[str, Field]:
    """Return what of an event may go to logs and traces: names, identifiers, counts and durations.

    Left out are reasons and messages of failures, which others write and which may quote a thread by mistake, and
    digests, from which a short secret can be guessed.

    Returns:
        A flat dictionary without the thread and the time; what is not known is not in it. Empty for events of other
        classes than those of `kv_retract.events`.
    """
    fields: dict[str, Field | None] = {}
    match event:
        case Decided(actor=actor, plan=plan):
            fields = {"actor": actor, **_planned(plan)}
        case Erased(retraction_ids=ids, result=result):
            fields = {
                "retraction_ids": list(ids),
                "eraser": result.eraser_id,
                "exact": result.exact,
                "tokens_erased": result.tokens_erased,
                "tokens_recomputed": result.tokens_recomputed,
                "tokens_moved": result.tokens_moved,
                "slots_copied": result.slots_copied,
                "slots_freed": result.slots_freed,
                "edit_ms": result.edit_ms,
            }
        case StatusChanges():
            fields = {
                "actor": event.actor,
                "retraction_id": event.retraction_id,
                "before": event.before.value,
                "after": event.after.value,
                "why": event.why,
                **_measured(event.divergence),
            }
        case Healed(retraction_ids=ids):
            fields = {
                "retraction_ids": list(ids),
                "tokens": event.tokens,
                "waited_s": event.waited_s,
                **_measured(event.divergence),
            }
        case Diverged(retraction_ids=ids):
            fields = {"retraction_ids": list(ids), "threshold": event.threshold, **_measured(event.divergence)}
        case PoliciesFailed(failures=failures):
            fields = {"policies": [f.policy for f in failures], "kinds": [f.kind for f in failures]}
        case Stepped():
            fields = {
                "model": event.model,
                "finish_reason": event.finish_reason,
                "error": event.error or None,
                "prompt_tokens": event.num_prompt_tokens,
                "cached_tokens": event.num_cached_tokens,
                "completion_tokens": event.num_completion_tokens,
                "retract_ms": event.retract_ms,
                "first_token_ms": event.first_token_ms,
                "total_ms": event.total_ms,
            }
    return {name: value for name, value in fields.items() if value is not None}


def _planned(plan: RetractionPlan) -> dict[str, Field]:
    exact = sum(span.exact for span in plan.spans)
    return {
        "retraction_ids": [span.record.retraction_id for span in plan.spans],
        "policies": sorted({name for span in plan.spans for name in span.record.policy.split("+")}),
        "spans": len(plan.spans),
        "exact_spans": exact,
        "steered_spans": len(plan.spans) - exact,
        "derived_spans": sum(bool(span.record.derived_from) for span in plan.spans),
        "dropped": len(plan.dropped),
        "span_tokens": sum(span.end - span.start for span in plan.spans),
        "thread_tokens": plan.num_tokens,
        "cached_tokens": plan.num_cached_tokens,
        "eraser": plan.eraser_id,
    }


def _measured(divergence: Divergence | None) -> dict[str, Field]:
    if divergence is None:
        return {}
    return {"kl": divergence.kl, "top1": divergence.top1, "positions": divergence.positions}


class LoggingObserver(Observer):
    """Writes one line per event; its fields (`fields_of`) are attributes of the log record, as `extra` makes them.

    Besides them every record has `event` (name of the event), `thread_id` and `at`. Steps are logged at DEBUG, those
    that failed and what an operator should look at at WARNING, all else at INFO.

    Args:
        logger: name of the logger; whoever configures logging chooses its handlers and its level.
    """

    def __init__(self, logger: str = "kv_retract") -> None:
        self._log = logging.getLogger(logger)

    def on_event(self, event: Event) -> None:
        """See the base class. Events of other classes are not logged."""
        if (line := _LINES.get(type(event))) is None:
            return
        level, name, message = line
        if isinstance(event, Stepped) and event.error:
            level = logging.WARNING
        if self._log.isEnabledFor(level):
            fields = {"event": name, "thread_id": event.thread_id, "at": event.at, **fields_of(event)}
            self._log.log(level, message, fields, extra=fields)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON in ASCII: time, level, logger, message, then whatever `extra` had."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        standard = vars(logging.makeLogRecord({})).keys() | line.keys()
        line |= {name: value for name, value in vars(record).items() if name not in standard}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
