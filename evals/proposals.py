"""What the policies say of a recorded thread, before each of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kv_retract.errors import SpanError
from kv_retract.policies.base import PolicyContext, RetractionPolicy, ask
from kv_retract.trace import Trace
from kv_retract.types import Message, Retraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The moment just before an assistant message of a trace."""

    index: int
    """Of the assistant message; the messages before it are the context."""
    proposals: tuple[Retraction, ...]
    previous: int
    """Index of the assistant message before it, -1 where there is none."""


def steps(trace: Trace, policies: Sequence[RetractionPolicy]) -> Iterator[Step]:
    """Walk a trace; the proposals come from its own messages, so they are the same for every arm.

    Raises:
        PolicyError: a policy failed.
    """
    previous = -1
    for index, message in enumerate(trace.messages):
        if message.role == "assistant" and index > 0:
            context = PolicyContext(thread_id=trace.trace_id, messages=trace.messages[:index])
            proposals = [retraction for policy in policies for retraction in _propose(policy, context)]
            yield Step(index=index, proposals=tuple(proposals), previous=previous)
        if message.role == "assistant":
            previous = index


def _propose(policy: RetractionPolicy, context: PolicyContext) -> list[Retraction]:
    try:
        return ask(policy, context)
    except SpanError:
        # `explicit` refuses a place that is not in the messages; in a recorded thread it may still come.
        return []


def continuation_text(message: Message) -> str:
    """Return the text of an assistant message, for templates whose turns cannot be cut out of a rendered thread."""
    return message.content or " ".join(f"{call.name} {call.arguments}" for call in message.tool_calls)
