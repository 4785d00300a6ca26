"""A real session on a tiny model that tells every kind of event, over texts that must not leave it."""

from dataclasses import dataclass

import pytest

from kv_retract import KVRetractSession, Message, Planner, Retraction, RetractionPolicy, SamplingParams, SpanRef
from kv_retract.errors import MessageError
from kv_retract.events import Decided, Diverged, Erased, Healed, Observer, PoliciesFailed, StatusChanges, Stepped
from kv_retract.healing import Healing
from kv_retract.types import Guarantee, PlannedSpan, RetractionPlan, RetractionRecord, Scope, Status

KINDS = {Decided, Diverged, Erased, Healed, PoliciesFailed, StatusChanges, Stepped}
MARKER = "marker"
"""Stands in every message, in every reason and in what the failing policy says; in no name and no identifier."""
SHORT = SamplingParams(max_tokens=4)


def thread(n=6):
    """Messages of a user and an assistant, the newest by the user where `n` is even."""
    messages = [Message("system", f"You are a helpful agent. {MARKER}-0")]
    for i in range(1, n):
        role = "user" if i % 2 else "assistant"
        messages.append(Message(role, f"Item {i} costs {i * 37}, as the list shows. {MARKER}-{i}"))
    return messages


def of_message(i, **kw):
    return Retraction(**{"span": SpanRef(i), "policy": "explicit", "reason": f"{MARKER} of a reason", **kw})


@dataclass(kw_only=True)
class Mistaken(RetractionPolicy):
    """Takes the first answer back once there are two."""

    name = "mistaken"

    def propose(self, ctx):
        return [of_message(2, policy=self.name)] if len(ctx.messages) > 5 else []


@dataclass(kw_only=True)
class Broken(RetractionPolicy):
    """Fails and quotes what it read."""

    name = "broken"

    def propose(self, ctx):
        raise ValueError(f"cannot read {ctx.messages[-1].content!r}")


class Notes(Observer):
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)


def open_session(loaded, name, *observers, **kw):
    """A session of its own namespace on the engine of another; every heal of it has diverged too far."""
    kw = {
        "planner": Planner(exact_suffix=0),
        "healing": Healing(background=False, threshold=0.0),
        "on_policy_failure": "skip",
        **kw,
    }
    return KVRetractSession(loaded.engine, loaded.renderer, extra_key=name, observers=observers, **kw)


def tell_everything(session):
    """Make a session tell every kind of event.

    In order: a step; a step in which a policy takes a span back; a heal; the caller undoes it and takes another span
    back; a step that fails; a step whose caller stops listening.
    """
    session.policies = [Mistaken()]
    session.step("t", thread(4), sampling=SHORT)
    session.step("t", thread(6), sampling=SHORT)
    assert session.healer.run() > 0
    (record,) = session.history("t")
    session.undo("t", record.retraction_id)
    session.retract("t", thread(6), proposals=[of_message(4)], actor="alice")
    session.policies = [Broken()]
    with pytest.raises(MessageError):
        session.step("t", [], sampling=SHORT)
    stream = session.stream("t", thread(6), sampling=SHORT)
    next(stream)
    stream.close()


def decided(thread_id="t", *, ids=("r1",), policy="p", exact=False, actor="policy"):
    """A decision made by hand, for what a healthy session does not tell."""
    records = [
        RetractionRecord(
            retraction_id=id, span=SpanRef(2), window_size=1, window_digest="0" * 64, policy=policy, reason="r",
            guarantee=Guarantee.STEERED, scope=Scope.BRANCH, status=Status.STEERED, eraser_id="mask",
        )
        for id in ids
    ]  # fmt: skip
    spans = tuple(PlannedSpan(record=r, start=10 * n, end=10 * n + 5, exact=exact) for n, r in enumerate(records))
    plan = RetractionPlan(thread_id=thread_id, spans=spans, eraser_id="mask", num_tokens=90, num_cached_tokens=80)
    return Decided(thread_id=thread_id, actor=actor, plan=plan, digests={id: "0" * 64 for id in ids})


def stepped(thread_id="t", **kw):
    return Stepped(
        **{"thread_id": thread_id, "model": "m", "retract_ms": 1.0, "first_token_ms": 20.0, "total_ms": 50.0, **kw}
    )
