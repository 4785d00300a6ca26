"""Redaction: what was taken back leaves the messages of an agent's state too, by messages with the same ids."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from kv_retract.errors import SpanError
from kv_retract.ledger.ledger import standing
from kv_retract.ledger.windows import record_for
from kv_retract.spans import check_span, part_of, union
from kv_retract.types import Interval, Message, Retraction, RetractionRecord, Scope, SpanRef, Status

from .messages import CALL_BLOCKS, REASONING_BLOCKS, to_messages

PLACEHOLDER = "[withdrawn]"
"""What stands in a message where characters of it were taken back."""


@dataclass(frozen=True, slots=True)
class Redaction:
    """What to write into the state."""

    messages: tuple[BaseMessage, ...]
    """Changed copies, with the ids of the originals."""
    records: tuple[RetractionRecord, ...]
    """What stood on the original messages, made anew for the changed ones. Exact: there is nothing left to steer."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """One part of a message with ranges of characters replaced, and where its characters are now."""

    text: str
    """As it is after it."""
    ranges: tuple[Interval, ...] = ()
    """What was replaced, in the old text: sorted, apart."""
    whole: bool = False
    """Whether all of the new text stands for each range."""

    def span(self, span: SpanRef, length: int) -> SpanRef:
        """Return where a range of the old text stands in the new one; what was cut stands in its placeholder."""
        if span.start == 0 and span.end is None:
            return span
        if self.whole:
            return replace(span, start=0, end=len(self.text))
        end = length if span.end is None else span.end
        return replace(span, start=self._moved(span.start, 0), end=self._moved(end, len(PLACEHOLDER)))

    def _moved(self, at: int, inside: int) -> int:
        """Return where an edge is now; one that was cut out is so many characters inside of the placeholder."""
        shift = 0
        for start, end in self.ranges:
            if at <= start:
                break
            if at < end:
                return start + shift + inside
            shift += len(PLACEHOLDER) - (end - start)
        return at + shift


def redact(messages: Sequence[BaseMessage], records: Sequence[RetractionRecord], *, thread_id: str) -> Redaction:
    """Replace what was taken back by `PLACEHOLDER`. Changes nothing in place; idempotent.

    Tool calls keep id and name, and arguments that are valid JSON: where a placeholder would break them, they are `{}`.
    Of a changed message, the artifact, raw provider fields and log probabilities go as well, since they may hold the
    same text.

    Args:
        messages: of the state.
        records: of the thread; those that are revoked cut nothing.
        thread_id: its label.

    Raises:
        MessageError: a message holds something that is not text.
        SpanError: the text of a message cannot be replaced: it has no id, or a form of content that is unknown.
    """
    neutral = to_messages(messages)
    placed = standing(records, neutral)
    cuts: dict[int, dict[tuple[str, int], list[SpanRef]]] = defaultdict(lambda: defaultdict(list))
    for record in placed:
        if record.status is not Status.REVOKED:
            cuts[record.span.message][part_of(record.span)[1:]].append(record.span)
    changed: dict[int, BaseMessage] = {}
    parts: dict[tuple[int, str, int], _Cut] = {}
    for index, found in cuts.items():
        made = {part: _cut(part[0], spans, neutral) for part, spans in found.items()}
        new = _rewritten(messages[index], neutral[index], made, index)
        if to_messages([new])[0] != neutral[index]:
            changed[index] = new
            parts.update({(index, *part): cut for part, cut in made.items()})
    after = to_messages([changed.get(i, message) for i, message in enumerate(messages)])
    anew = [
        _anew(record, parts.get(part_of(record.span)), neutral, after, thread_id)
        for record in placed
        if any(record.span.message <= index < record.span.message + record.window_size for index in changed)
    ]
    # Where both stand on one placeholder they are one record, and what holds goes before what was undone.
    anew.sort(key=lambda record: record.status is Status.REVOKED)
    return Redaction(tuple(changed[index] for index in sorted(changed)), tuple(anew))


def _cut(part: str, spans: Sequence[SpanRef], neutral: Sequence[Message]) -> _Cut:
    """Replace ranges of one part, all of them in the same message."""
    first = spans[0]
    message = neutral[first.message]
    length = check_span(first, neutral)
    ranges = tuple(union((s.start, length if s.end is None else s.end) for s in spans))
    if part == "content":
        return _Cut(_replaced(message.content, ranges), ranges)
    arguments = message.tool_calls[first.call].arguments
    text = _replaced(arguments, ranges)
    if any(s.start == 0 and s.end is None for s in spans) or (_is_object(arguments) and not _is_object(text)):
        return _Cut("{}", ranges, whole=True)
    return _Cut(text, ranges)


def _replaced(text: str, ranges: Sequence[Interval]) -> str:
    for start, end in reversed(ranges):
        text = f"{text[:start]}{PLACEHOLDER}{text[end:]}"
    return text


def _is_object(arguments: str) -> bool:
    """Whether it is a JSON object in the form in which arguments are rendered."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return False
    return isinstance(value, dict) and json.dumps(value, ensure_ascii=False) == arguments


def _rewritten(message: BaseMessage, neutral: Message, cuts: Mapping[tuple[str, int], _Cut], index: int) -> BaseMessage:
    """Return a copy with its parts replaced."""
    if message.id is None:
        raise SpanError(f"message {index} ({message.type}) has no id, so that nothing can replace it; give it one")
    expected = neutral
    update: dict[str, Any] = {"additional_kwargs": {}}
    if content := cuts.get(("content", 0)):
        expected = replace(expected, content=content.text)
        update["content"] = _content(message, content)
    if isinstance(message, ToolMessage):
        update["artifact"] = None
    if isinstance(message, AIMessage):
        update["response_metadata"] = {k: v for k, v in message.response_metadata.items() if k != "logprobs"}
        calls = {call: cut.text for (part, call), cut in cuts.items() if part == "tool_call"}
        expected = replace(
            expected,
            tool_calls=tuple(
                replace(call, arguments=calls.get(n, call.arguments)) for n, call in enumerate(expected.tool_calls)
            ),
        )
        update.update(_calls(message, calls, update.get("content", message.content)))
    new = message.model_copy(update=update)
    if to_messages([new])[0] != expected:
        raise SpanError(
            f"message {index} ({message.type}) has content whose text cannot be replaced; use text or text blocks"
        )
    return new


def _calls(message: AIMessage, arguments: Mapping[int, str], content: Any) -> dict[str, Any]:
    """Return the fields of an AI message with the arguments of some calls replaced, blocks that repeat them too."""
    if not arguments:
        return {}
    count = len(message.tool_calls)
    valid = [
        {**call, "args": json.loads(arguments[n])} if n in arguments else call
        for n, call in enumerate(message.tool_calls)
    ]
    # The parser's error may quote what it could not parse.
    malformed = [
        {**call, "args": arguments[n], "error": None} if n in arguments else call
        for n, call in enumerate(message.invalid_tool_calls, start=count)
    ]
    if not isinstance(content, str):
        ids = {call["id"]: arguments[n] for n, call in enumerate([*valid, *malformed]) if n in arguments}
        content = [_call_block(block, ids) for block in content]
    return {"tool_calls": valid, "invalid_tool_calls": malformed, "content": content}


def _call_block(block: Any, arguments: Mapping[str | None, str]) -> Any:
    if not isinstance(block, Mapping) or block.get("type") not in CALL_BLOCKS:
        return block
    id = block.get("call_id", block.get("id"))
    if id not in arguments:
        return block
    kept = {key: block[key] for key in ("type", "id", "call_id", "name", "index") if key in block}
    if block["type"] == "function_call":
        return {**kept, "arguments": arguments[id]}
    if block["type"] in ("tool_call_chunk", "invalid_tool_call"):
        return {**kept, "args": arguments[id]}
    return {**kept, "input" if block["type"] == "tool_use" else "args": json.loads(arguments[id])}


def _content(message: BaseMessage, cut: _Cut) -> Any:
    """Return content with ranges of its joined text replaced; of a range over several blocks, the first shows it."""
    if isinstance(message.content, str):
        return cut.text
    blocks: list[Any] = []
    begin = 0
    for block in message.content:
        text = _text_of_block(message, block)
        if text is None:
            blocks.append(block)
            continue
        end = begin + len(text)
        mine = [(max(a, begin), min(b, end)) for a, b in cut.ranges if a < end and b > begin]
        new = text
        for start, stop in reversed(mine):
            shown = PLACEHOLDER if any(a == start for a, _ in cut.ranges) else ""
            new = f"{new[: start - begin]}{shown}{new[stop - begin :]}"
        blocks.append(_with_text(block, new) if mine else block)
        begin = end
    return blocks


def _text_of_block(message: BaseMessage, block: Any) -> str | None:
    """Return what a block adds to the text of its message; None where it is no text."""
    if isinstance(block, str):
        return block
    if isinstance(message, AIMessage) and block.get("type") in {*CALL_BLOCKS, *REASONING_BLOCKS}:
        return None
    text = block["text"] if isinstance(block.get("text"), str) else block.get("content")
    return text if isinstance(text, str) else None


def _with_text(block: Any, text: str) -> Any:
    """Return a text block with another text; whatever may quote the old one (annotations) is left out."""
    if isinstance(block, str):
        return text
    key = "text" if isinstance(block.get("text"), str) else "content"
    return {**{k: block[k] for k in ("type", "id", "index") if k in block}, key: text}


def _anew(
    record: RetractionRecord,
    cut: _Cut | None,
    before: Sequence[Message],
    after: Sequence[Message],
    thread_id: str,
) -> RetractionRecord:
    """Return the record for the changed messages, so that nobody takes the placeholder back, and an undo holds."""
    span = cut.span(record.span, check_span(record.span, before)) if cut is not None else record.span
    retraction = Retraction(
        span=span,
        policy=record.policy,
        reason=record.reason,
        guarantee=record.guarantee,
        scope=Scope.THREAD,  # later redactions of other messages leave it standing
        notice=record.notice,
    )
    revoked = record.status is Status.REVOKED
    new = record_for(
        retraction,
        after,
        thread_id=thread_id,
        eraser_id=record.eraser_id,
        closes_gap=record.closes_gap,
        shared=record.shared,
        exact=True,
        now=record.created_at,
        span_tokens=record.span_tokens,
    )
    return replace(new, derived_from=(record.retraction_id,), status=Status.REVOKED if revoked else Status.EXACT)
