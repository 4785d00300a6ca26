"""Values that cross a stage: frozen, JSON-able, without torch.

Intervals are half-open `[start, end)` everywhere. A *message* is named by its index in the list the caller passed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeAlias

Interval: TypeAlias = tuple[int, int]
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Part: TypeAlias = Literal["content", "tool_call"]


class Guarantee(StrEnum):
    """What a retraction promises (DESIGN D4)."""

    STEERED = "steered"
    """Fast, measured, approximate. Never to be described as deletion."""
    EXACT = "exact"
    """The suffix is recomputed before the next token: for secrets, personal data, legal deletion."""

    def stronger(self, other: Guarantee) -> Guarantee:
        """Return the stronger of the two."""
        return Guarantee.EXACT if Guarantee.EXACT in (self, other) else Guarantee.STEERED


class Scope(StrEnum):
    """Where a retraction applies when a thread is forked or rewound (DESIGN D3)."""

    BRANCH = "branch"
    """Only where everything from the span's message up to the newest message of that moment still stands: a fork
    from before the retraction sees what it saw then."""
    THREAD = "thread"
    """Wherever a message equal to the span's stands in this thread, also in forks from before."""


class Cascade(StrEnum):
    """What else goes when a span is taken back (DESIGN D8)."""

    NONE = "none"
    """The span only."""
    QUOTED = "quoted"
    """Also what repeats its rare values or its words: in later assistant messages and in the calls made with them."""
    LINEAGE = "lineage"
    """Also the results of those calls, and whatever was derived from these in turn."""

    def wider(self, other: Cascade) -> Cascade:
        """Return the wider of the two."""
        order = list(Cascade)
        return max(self, other, key=order.index)


class Status(StrEnum):
    """State of one retraction in one thread."""

    STEERED = "steered"
    """The cache holds (or held) an edited path; tombstones stand in the key."""
    EXACT = "exact"
    """The span is left out of the key: recomputed, healed, or rebuilt after a loss."""
    REVOKED = "revoked"
    """Undone: the span is read again."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call in an assistant message."""

    id: str
    name: str
    arguments: str
    """JSON text, as in the OpenAI chat format. May be malformed: models write it."""


class _Digested:
    """Room for the digest of what never changes; no field, so that copies and comparisons do not see it."""

    __slots__ = ("_digest",)
    _digest: str


@dataclass(frozen=True, slots=True)
class Message(_Digested):
    """One chat message in the neutral form; text only."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Only on assistant messages."""
    tool_call_id: str | None = None
    """Only on tool messages: the call that this answers."""
    name: str | None = None
    """Name of the tool (tool messages) or of the speaker."""
    reasoning: str = ""
    """Reasoning text, `reasoning_content` in chat templates; templates may drop it from earlier turns."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tool_calls", tuple(self.tool_calls))

    def digest(self) -> str:
        """SHA-256 over everything the model can read of it; framework message ids do not count."""
        try:
            return self._digest
        except AttributeError:
            calls = [(call.id, call.name, call.arguments) for call in self.tool_calls]
            fields = (self.role, self.content, calls, self.tool_call_id, self.name, self.reasoning)
            object.__setattr__(self, "_digest", _sha256(_canonical(fields)))
            return self._digest


@dataclass(frozen=True, slots=True)
class SpanRef:
    """A place in the messages: a message part, or a range of characters inside it."""

    message: int
    """Index in the message list."""
    part: Part = "content"
    call: int = 0
    """Which tool call, where `part` is `tool_call`."""
    start: int = 0
    """First character, in the content or in the arguments JSON of the call."""
    end: int | None = None
    """One past the last character; None for the end of the part. A whole tool call includes its name."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Where a `SpanRef` stands in the rendered token ids."""

    ref: SpanRef
    start: int
    """First token that holds any character of it: a token that straddles the edge belongs to the span."""
    end: int
    """One past the last such token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Why a span counts as derived from another: two places that belong together. Never holds text."""

    kind: Literal["value", "words", "call_id", "attention"]
    """A rare value that both hold, a run of words that both hold, a call and its result, or attention of the model."""
    source: SpanRef
    """Where it stands in the source."""
    target: SpanRef
    """Where it stands in what was derived."""
    weight: float
    """Characters of the value, number of words, 1 for a call's id, or the share of attention (0 to 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One step of a lineage: `target` was derived from `source`."""

    kind: Literal["quote", "call", "result"]
    """An assistant message that repeats it, a tool call made with it, or the result of such a call."""
    source: SpanRef
    target: SpanRef
    """What is taken back with the source."""
    evidence: tuple[Evidence, ...]
    """At least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraction:
    """What a policy proposes: take this span back."""

    span: SpanRef
    policy: str
    """Name of the policy that proposes it."""
    reason: str
    """One line for people. It must not repeat the retracted text."""
    guarantee: Guarantee = Guarantee.STEERED
    scope: Scope | None = None
    """None: `THREAD` where the guarantee is `EXACT`, else `BRANCH`."""
    confidence: float = 1.0
    """0 to 1, for the wrappers that filter on it."""
    notice: str | None = None
    """Text that tells the model what was withdrawn (DESIGN D9); appended to the newest message of that moment, with
    scope `THREAD` to the span's own message."""
    cascade: Cascade = Cascade.NONE
    """What else goes with it."""
    verify: float = 0.0
    """Share of such retractions (0 to 1) whose steered edit is compared with exact recomputation in the background."""
    derived_from: tuple[SpanRef, ...] = ()
    """The retracted spans from which this one was derived, where a cascade brought it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetractionRecord:
    """A retraction as it is kept: durable, small, without the retracted text (DESIGN D1).

    It applies to a list of messages where its window stands in it: `window_size` consecutive messages, the first of
    which holds the span, whose digests hash to `window_digest`. So it survives pruning of older messages, and a
    branch that differs after the span never inherits it by accident.
    """

    retraction_id: str
    span: SpanRef
    """Character range in the first message of the window; `span.message` is the index when it was made."""
    window_size: int
    window_digest: str
    policy: str
    reason: str
    guarantee: Guarantee
    scope: Scope
    status: Status
    eraser_id: str
    """Eraser and its hyper-parameters, as in `Eraser.eraser_id`; part of the tombstones."""
    closes_gap: bool = False
    """Whether the edit moved the positions of what follows (`Eraser.closes_gap`)."""
    shared: bool = False
    """Whether other threads with the same beginning share the edit (`Eraser.suffix_free`)."""
    notice: str | None = None
    """Appended to the last message of the window when the thread is rendered."""
    created_at: str = ""
    """ISO 8601, UTC."""
    span_tokens: int = 0
    """Length of the span when it was planned."""
    derived_from: tuple[str, ...] = ()
    """Ids of the retractions whose cascades brought this one; where all of them are undone, so is this one."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; `from_json` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RetractionRecord:
        """Build a record from `to_json`'s dictionary.

        Raises:
            ValueError: a field is missing, unknown or of the wrong form.
        """
        try:
            values = dict(data)
            values["span"] = SpanRef(**values["span"])
            values["guarantee"] = Guarantee(values["guarantee"])
            values["scope"] = Scope(values["scope"])
            values["status"] = Status(values["status"])
            values["derived_from"] = tuple(values.get("derived_from", ()))
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a retraction record: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSpan:
    """One span of a plan, with the record that will be kept for it."""

    record: RetractionRecord
    start: int
    """Token interval in the thread as rendered at planning time."""
    end: int
    exact: bool
    """Whether the suffix is recomputed; else the session's eraser edits the cache."""
    why_exact: str = ""
    """guarantee | short suffix | follows an exact span | not cached | ''."""
    verify: bool = False
    """Whether the steered edit was drawn to be compared with exact recomputation (`Retraction.verify`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A proposal that the planner did not take, and why."""

    span: SpanRef
    policy: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetractionPlan:
    """What will be done to one thread before its next step; logged as JSON."""

    thread_id: str
    spans: tuple[PlannedSpan, ...] = ()
    """In token order; they do not overlap."""
    dropped: tuple[Dropped, ...] = ()
    hops: tuple[Hop, ...] = ()
    """How the spans that a cascade brought were derived, nearest first; each has its evidence."""
    eraser_id: str = ""
    num_tokens: int = 0
    """Length of the rendered thread."""
    num_cached_tokens: int = 0
    """How much of it was cached at planning time."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A proposal that waits for approval (policy `require_approval`)."""

    id: str
    """Names the proposal by its content: holds after older messages are pruned."""
    proposal: Retraction
    plan: RetractionPlan
    """What would be done if it were approved now, with every hop of its cascade."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EraseResult:
    """What an edit did and cost."""

    eraser_id: str
    tokens_erased: int = 0
    tokens_recomputed: int = 0
    """Tokens that went through the model during the edit."""
    tokens_moved: int = 0
    """Tokens whose cached keys were rotated or rewritten without the model."""
    slots_copied: int = 0
    """Slots copied because another path shares them."""
    slots_freed: int = 0
    edit_ms: float = 0.0
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far the steered cache was from the exact one, on tokens that followed (DESIGN D5)."""

    kl: float
    """Mean KL(exact || steered) of the next-token distributions, in nats."""
    top1: float
    """Share of positions at which both have the same most likely token."""
    positions: int
    """How many positions were compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to decode. The defaults are greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = field(default=())
    logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One finished answer of the model."""

    message: Message
    """The assistant's turn, tool calls parsed."""
    token_ids: tuple[int, ...]
    """What was decoded, end token left out."""
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    num_prompt_tokens: int
    """Entries of the thread's key: what the model attended to, hidden tombstones included."""
    num_cached_tokens: int
    """How many of them were served from the cache."""
    num_completion_tokens: int
    plan: RetractionPlan
    """What this step took back."""
    retraction_ids: tuple[str, ...] = ()
    """Every retraction that applied to this step, oldest message first."""
    logprobs: tuple[float, ...] | None = None
    """Of the decoded tokens, where the caller asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDelta:
    """One piece of a streamed answer."""

    text: str
    """New text. While a character is incomplete or a stop string may have begun there is no piece; the last may be
    empty."""
    token_ids: tuple[int, ...] = ()
    """What was decoded since the piece before: joined, `StepResult.token_ids`."""
    result: StepResult | None = None
    """On the last piece only."""


def window_digest(digests: Sequence[str]) -> str:
    """Hash the digests of consecutive messages (`RetractionRecord.window_digest`)."""
    return _sha256(_canonical(list(digests)))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
