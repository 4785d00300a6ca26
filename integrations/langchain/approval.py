"""Approval by people: what waits is asked with LangGraph's `interrupt`, and the answer becomes decisions.

A policy under `require_approval` proposes nothing by itself. Whoever asks does so in a graph node of its own, before
the node of the model: an interrupt runs its whole node again, and resume values belong to a node by their order, so no
other interrupt can ever be taken for an approval. Decisions go into the state, and nobody is asked twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeAlias

from langchain_core.messages import BaseMessage
from langgraph.config import get_config
from langgraph.runtime import get_runtime
from langgraph.types import interrupt
from pydantic import AfterValidator, WithJsonSchema

from kv_retract.ledger.ledger import standing
from kv_retract.session import KVRetractSession
from kv_retract.spans import overlap, text_of
from kv_retract.thread import Tools
from kv_retract.types import Hop, Message, Retraction, RetractionRecord, SpanRef, Status, Waiting

from .messages import to_messages

Decisions: TypeAlias = dict[str, dict[str, Any]]
"""Id of a proposal to `{"approved": bool, "actor": name}`: plain data for a state."""

KIND = "kv_retract_approval"
"""`kind` of the question, by which an application tells it from its other interrupts."""
ANSWER = (
    'True or False for all of them, {id: True or False, ...}, or {"approved": [ids], "denied": [ids], "actor": "name"}'
)
MOST_SHOWN = 400
"""Characters of a span that a question shows, where it shows text at all."""
_ACTOR = "approval"
_IDS = {"type": "array", "items": {"type": "string"}}
_SCHEMA = {
    "anyOf": [
        {"type": "boolean"},
        {"type": "object", "additionalProperties": {"type": "boolean"}},
        {"type": "object", "properties": {"approved": _IDS, "denied": _IDS, "actor": {"type": "string"}}},
    ]
}
"""`ANSWER` for clients that render a form."""


def ask(
    session: KVRetractSession,
    thread_id: str,
    messages: Sequence[BaseMessage],
    decisions: Decisions,
    *,
    before: Sequence[BaseMessage] = (),
    tools: Tools | None = None,
    show_text: bool = False,
) -> Decisions:
    """Ask people about what waits and is not decided; return what they decided. Changes nothing in the session.

    Args:
        session: whose policies propose.
        thread_id: label of the thread.
        messages: of the state; places in the question count in these.
        decisions: made earlier.
        before: what the model reads before the messages: the system prompt.
        tools: what the model reads of them.
        show_text: show the beginning of what would be taken back. The question is checkpointed and streamed.

    Returns:
        New decisions only. What was asked and not answered is not among them.

    Raises:
        GraphInterrupt: there is something to ask; LangGraph handles it.
        ValueError: the answer is not in a form that is understood. The interrupt can be resumed again.
    """
    neutral = to_messages([*before, *messages])
    waiting = [w for w in session.waiting(thread_id, neutral, tools=tools) if w.id not in decisions]
    if not waiting:
        return {}
    # By now a policy may have found more than people were asked about: a plain yes is not meant for that.
    asked = _asked_by_this_task() or [w.id for w in waiting]
    proposals = [_proposal(w, neutral, messages, show_text) for w in waiting]
    question = {"kind": KIND, "thread_id": thread_id, "proposals": proposals, "answer_with": ANSWER}
    # LangGraph keeps an answer as soon as it is given, unless its schema refuses it.
    schema: Any = Annotated[Any, AfterValidator(partial(read_answer, asked=asked)), WithJsonSchema(_SCHEMA)]
    decisions: Decisions = interrupt(question, response_schema=schema)
    return decisions


def read_answer(answer: Any, asked: Sequence[str]) -> Decisions:
    """Turn the value that an interrupt was resumed with into decisions.

    Args:
        answer: see `ANSWER`.
        asked: ids of the proposals in the question.

    Raises:
        ValueError: it is something else, or names what was not asked.
    """
    if isinstance(answer, bool):
        return _decided(dict.fromkeys(asked, answer))
    if isinstance(answer, Mapping) and {"approved", "denied"} & answer.keys() and answer.keys() <= _LISTS:
        approved, denied = answer.get("approved", []), answer.get("denied", [])
        actor = answer.get("actor", _ACTOR)
        if not (_are_ids(approved) and _are_ids(denied) and isinstance(actor, str) and actor):
            raise _wrong(answer, asked, "approved and denied are lists of ids, actor is a name")
        if both := set(approved) & set(denied):
            raise _wrong(answer, asked, f"both approved and denied: {', '.join(sorted(both))}")
        _check_asked({*approved, *denied}, answer, asked)
        return _decided({**dict.fromkeys(approved, True), **dict.fromkeys(denied, False)}, actor)
    if isinstance(answer, Mapping) and all(isinstance(value, bool) for value in answer.values()):
        _check_asked(answer, answer, asked)
        return _decided(answer)
    raise _wrong(answer, asked, f"got {type(answer).__name__}")


def merge_decisions(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Join decisions; of one proposal the newest stays. A LangGraph reducer."""
    return {**old, **new}


def approved_in(decisions: Decisions) -> dict[str, str]:
    """Return who approved, by the id of the proposal."""
    return {id: decision["actor"] for id, decision in decisions.items() if decision["approved"]}


def retract_approved(
    session: KVRetractSession,
    thread_id: str,
    messages: Sequence[Message],
    approved: Mapping[str, str],
    *,
    tools: Tools | None = None,
) -> None:
    """Take back what was approved and still waits. Idempotent; what was undone since stays undone.

    Args:
        session: whose policies propose.
        thread_id: label of the thread.
        messages: exactly those that the model reads next.
        approved: who approved, by the id of the proposal.
        tools: as in the step.

    Raises:
        ThreadBusyError: the thread is streaming an answer and there is something to retract.
    """
    if not approved:
        return
    # Of most policies the planner refuses what was revoked, but spans that a caller names are always taken.
    undone = [r for r in standing(session.history(thread_id), messages) if r.status is Status.REVOKED]
    by_actor: dict[str, list[Retraction]] = defaultdict(list)
    for w in session.waiting(thread_id, messages, tools=tools):
        again = any(overlap(r.span, w.proposal.span) and _same_policy(r, w.proposal) for r in undone)
        if w.id in approved and not again:
            by_actor[approved[w.id]].append(w.proposal)
    for actor, proposals in by_actor.items():
        session.retract(thread_id, messages, tools=tools, proposals=proposals, actor=actor)


def _same_policy(record: RetractionRecord, proposal: Retraction) -> bool:
    return not {*record.policy.split("+")}.isdisjoint(proposal.policy.split("+"))


_LISTS = {"approved", "denied", "actor"}


def _decided(answers: Mapping[str, bool], actor: str = _ACTOR) -> Decisions:
    return {id: {"approved": approved, "actor": actor} for id, approved in answers.items()}


def _are_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(id, str) for id in value)


def _check_asked(ids: Iterable[str], answer: Any, asked: Sequence[str]) -> None:
    if unknown := sorted(str(id) for id in set(ids) - set(asked)):
        raise _wrong(answer, asked, f"not asked: {', '.join(unknown)}")


def _wrong(answer: Any, asked: Sequence[str], why: str) -> ValueError:
    return ValueError(
        f"expected {ANSWER} about the proposals {', '.join(asked)}, got {answer!r:.200} ({why}); resume the interrupt "
        "again with one of these"
    )


def _asked_by_this_task() -> list[str]:
    """Return the ids in the question that this run of the node is resumed from; none where it asks for the first time.

    The checkpoint keeps the question beside the answer, so this holds in a new process too.
    """
    configurable, info = get_config()["configurable"], get_runtime().execution_info
    saver = configurable.get("__pregel_checkpointer")
    if saver is None or info is None:
        return []
    # A task's namespace is that of its graph, and the name and id of the task.
    namespace = info.checkpoint_ns.rpartition("|")[0]
    where = {"thread_id": configurable["thread_id"], "checkpoint_ns": namespace, "checkpoint_id": info.checkpoint_id}
    kept = saver.get_tuple({"configurable": where})
    for task_id, channel, value in (kept.pending_writes or ()) if kept is not None else ():
        if task_id == info.task_id and channel == "__interrupt__":
            return [proposal["id"] for question in value for proposal in question.value["proposals"]]
    return []


def _proposal(
    waiting: Waiting, neutral: Sequence[Message], messages: Sequence[BaseMessage], show_text: bool
) -> dict[str, Any]:
    """Return one proposal for the question: what, why, where, how much, and everything that goes with it."""
    proposal, skipped = waiting.proposal, len(neutral) - len(messages)
    message = messages[proposal.span.message - skipped]
    spans = []
    for planned in waiting.plan.spans:
        span = {
            **_place(planned.record.span, skipped),
            "num_tokens": planned.end - planned.start,
            "exact": planned.exact,
            "why_exact": planned.why_exact,
        }
        if show_text:
            span["text"] = text_of(planned.record.span, neutral)[:MOST_SHOWN]
        spans.append(span)
    return {
        "id": waiting.id,
        "policy": proposal.policy,
        "reason": proposal.reason,
        "guarantee": proposal.guarantee.value,
        "confidence": proposal.confidence,
        "place": {
            **_place(proposal.span, skipped),
            "message_id": message.id,
            "role": neutral[proposal.span.message].role,
            "name": message.name,
        },
        "num_tokens": sum(span["num_tokens"] for span in spans),
        "spans": spans,
        "hops": [_hop(hop, skipped) for hop in waiting.plan.hops],
    }


def _hop(hop: Hop, skipped: int) -> dict[str, Any]:
    evidence = [
        {"kind": e.kind, "source": _place(e.source, skipped), "target": _place(e.target, skipped), "weight": e.weight}
        for e in hop.evidence
    ]
    return {
        "kind": hop.kind,
        "source": _place(hop.source, skipped),
        "target": _place(hop.target, skipped),
        "evidence": evidence,
    }


def _place(span: SpanRef, skipped: int) -> dict[str, Any]:
    return {**asdict(span), "message": span.message - skipped}
