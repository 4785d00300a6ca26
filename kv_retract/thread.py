"""A thread as the next step sees it: rendered messages, the retractions that apply, and the key they lead to.

Three indices meet here. A *token* counts in the rendering, retracted spans included. An *entry* counts in the key,
where spans that were removed exactly are missing. `ThreadView` converts between them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from .cache.base import ThreadKey
from .cache.keys import KeyEdit, build_key
from .engine.base import Engine
from .errors import SpanError
from .ledger.ledger import applicable
from .ledger.render import Renderer, Rendering
from .policies.base import PolicyContext
from .spans import free_parts
from .types import Interval, Message, PlannedSpan, Retraction, RetractionRecord, Status

Tools = Sequence[Mapping[str, Any]]
"""OpenAI function tools: `{"type": "function", "function": {"name": ..., "parameters": ...}}`."""


@dataclass(frozen=True, eq=False)
class ThreadView:
    """See the module. Valid until the thread's records or its messages change."""

    rendering: Rendering
    records: tuple[RetractionRecord, ...]
    """Retractions that apply to the messages, with the status that holds in this view."""
    edits: tuple[KeyEdit, ...]
    """The same in token order, as intervals of the rendering."""
    key: ThreadKey
    cached: int
    """Leading entries of the key that are cached."""

    def entry(self, token: int) -> int:
        """Return the entry of a token."""
        return token - sum(min(e.end, token) - e.start for e in self.edits if e.exact and e.start < token)

    def entries(self, spans: Sequence[PlannedSpan]) -> list[Interval]:
        """Return the entries of planned spans."""
        return [(self.entry(s.start), self.entry(s.end)) for s in spans]

    def token(self, entry: int) -> int:
        """Return the token of an entry; inverts `entry`."""
        for e in self.edits:
            if e.exact and e.start <= entry:
                entry += e.end - e.start
        return entry

    def other_states(self, known: Sequence[RetractionRecord]) -> Iterator[ThreadView]:
        """Yield the thread as it may be cached besides: healed, and with what was undone steered once more.

        Args:
            known: records that stand in the messages; of those that are revoked, each alone and all together.
        """
        yield self._with_edits([replace(edit, exact=True) for edit in self.edits])
        undone = []
        for record in known:
            if record.status is not Status.REVOKED:
                continue
            try:
                interval = self.rendering.interval(record.span)
            except SpanError:
                continue  # the template shows nothing of it, or nothing that could have been steered
            parts = free_parts(interval, [(e.start, e.end) for e in self.edits])
            undone += [_edit(replace(record, status=Status.STEERED), *part) for part in parts]
        for edit in undone:
            yield self._with_edits([*self.edits, edit])
        apart = [e for n, e in enumerate(undone) if all(e.start >= o.end or e.end <= o.start for o in undone[:n])]
        if len(apart) > 1:
            yield self._with_edits([*self.edits, *apart])

    def _with_edits(self, edits: Sequence[KeyEdit]) -> ThreadView:
        ordered = tuple(sorted(edits, key=lambda e: e.start))
        key = build_key(self.rendering.ids, ordered, extra_key=self.key.extra_key)
        return replace(self, edits=ordered, key=key, cached=0)

    def key_after(self, planned: Sequence[PlannedSpan], *, exact_from: int | None = None) -> ThreadKey:
        """Return the key once the planned spans are erased.

        Args:
            planned: spans to erase, apart from those erased before.
            exact_from: earlier retractions at or after this token leave the key, since what follows is recomputed.
        """
        kept = [replace(e, exact=True) if exact_from is not None and e.start >= exact_from else e for e in self.edits]
        edits = sorted([*kept, *(_edit(s.record, s.start, s.end) for s in planned)], key=lambda e: e.start)
        return build_key(self.rendering.ids, edits, extra_key=self.key.extra_key)


def view_thread(
    engine: Engine,
    renderer: Renderer,
    records: Sequence[RetractionRecord],
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    extra_key: str = "",
) -> ThreadView:
    """Render a thread with its retractions applied: the only way from messages to a key.

    A steered span keeps its tombstones while they are cached. Cold ones must never reach the model: the span is then
    left out, and the thread is exact there. So is a span that ends the thread, since the next token follows from the
    last entry, which therefore has to be an ordinary token. A span that the template shows nothing of any more (the
    reasoning of earlier turns) leaves nothing to edit.

    Raises:
        MessageError: a message cannot be rendered.
        SpanError: a retracted text is somewhere in the rendering but cannot be located.
    """
    applied = applicable(records, messages)
    rendering = renderer.render(
        messages, tools=tools, notices=_notices(applied), add_generation_prompt=add_generation_prompt
    )
    # A token that two spans claim belongs to the one that was retracted first, as the planner has it.
    age = {r.retraction_id: n for n, r in enumerate(records)}
    while True:
        edits = _edits(sorted(applied, key=lambda r: age[r.retraction_id]), rendering)
        key = build_key(rendering.ids, edits, extra_key=extra_key)
        view = ThreadView(rendering, applied, edits, key, engine.cached(key))
        usable = min(view.cached, len(key) - 1)
        cold = {e.retraction_id for e in edits if not e.exact and view.entry(e.end) > usable}
        if not cold:
            return view
        applied = tuple(replace(r, status=Status.EXACT) if r.retraction_id in cold else r for r in applied)


def context_of(thread_id: str, messages: Sequence[Message], view: ThreadView) -> PolicyContext:
    """Return what policies may look at, before a step that begins now."""
    return PolicyContext(thread_id=thread_id, messages=messages, records=view.records, now=datetime.now(UTC))


def with_notice(proposal: Retraction, messages: Sequence[Message]) -> Retraction:
    """Let a proposal say what was withdrawn and why, without repeating it (DESIGN D9), unless it says so already."""
    if proposal.notice is not None:
        return proposal
    at = proposal.span.message
    role = messages[at].role if 0 <= at < len(messages) else "earlier"
    what = f"the result of {messages[at].name or 'a tool'}" if role == "tool" else f"an earlier {role} message"
    notice = f"[Notice: {what} has been withdrawn and must not be used any more. Reason: {proposal.reason}]"
    return replace(proposal, notice=notice)


def _edit(record: RetractionRecord, start: int, end: int) -> KeyEdit:
    return KeyEdit(
        start=start,
        end=end,
        exact=record.status is Status.EXACT,
        eraser_id=record.eraser_id,
        retraction_id=record.retraction_id,
        closes_gap=record.closes_gap,
        shared=record.shared,
    )


def _edits(records: Sequence[RetractionRecord], rendering: Rendering) -> tuple[KeyEdit, ...]:
    """Place retractions in the rendering; a token that two of them claim belongs to the earlier of `records`.

    Returns:
        The edits in token order, apart from each other.
    """
    edits: list[KeyEdit] = []
    taken: list[Interval] = []
    for record in records:
        if rendering.leaves_out(record.span):
            continue
        for start, end in free_parts(rendering.interval(record.span), taken):
            edits.append(_edit(record, start, end))
            insort(taken, (start, end))
    return tuple(sorted(edits, key=lambda e: e.start))


def _notices(records: Sequence[RetractionRecord]) -> dict[int, str]:
    """Return the texts to append to messages, by message index."""
    notices: dict[int, str] = {}
    for r in records:
        if r.notice:
            at = r.span.message + r.window_size - 1
            notices[at] = f"{notices[at]}\n\n{r.notice}" if at in notices else r.notice
    return notices
