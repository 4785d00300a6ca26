"""What clients and the server say to each other: bodies of `POST /kv_retract/...`, refusals, answers.

Two levels. *Edits* (`match`, `edit`, `drop`) are an engine's: the client keeps the ledger, names keys with tombstones
in them, and never sends a retracted text again (`SGLangEngine`). *Span retractions* (`retract`, `undo`, `heal`,
`status`) are a server's: it keeps the ledger, and clients may go on sending the original text. One namespace
(`extra_key`) uses one of the two. Replicas tell each other what changed in their ledgers (`changes`). All token counts
are entries of the request's prompt; intervals are half-open.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Reason = Literal[
    "not_cached",
    "busy",
    "unsupported",
    "overlaps",
    "unknown_retraction",
    "eraser_mismatch",
    "no_room",
    "bad_request",
    "failed",
]
"""Why something was refused. `busy`: a request of the namespace runs or waits, try again. `no_room`: the pool is full
of running requests. `failed`: an error of the server's own; the path is as it was, or forgotten."""
Eraser = Literal["kveraser", "recompute", "none"]
"""`kveraser`: the learned eraser that the server was started with. `recompute`: what follows is prefilled again without
the span, by the next request. `none`: the span's KV stays as it is under another key (a control)."""
State = Literal["steered", "exact", "revoked"]

TAIL = 8
"""Last tokens of a prompt that must be ordinary ones: SGLang's detokenizer reads five of them as text."""
COLD = "kv_retract: cold tombstones"
"""In the message that refuses a prompt with tombstones that are not cached."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Refusal(_Body):
    """Body of every answer but 200."""

    error: Reason
    message: str


class Interval(_Body):
    """Tokens `[start, end)`."""

    start: int = Field(ge=0)
    end: int

    @model_validator(mode="after")
    def _check(self) -> Interval:
        if self.end <= self.start:
            raise ValueError(f"expected an end past the start {self.start}, got {self.end}")
        return self


class MatchRequest(_Body):
    """How much of a key is cached?"""

    token_ids: list[int]
    extra_key: str | None = None


class MatchAnswer(_Body):
    """See `MatchRequest`."""

    num_cached: int


class EditRequest(_Body):
    """Edit the cached part of a key and commit it under another one; several spans are one atomic edit."""

    token_ids: list[int]
    new_token_ids: list[int]
    """As long as `token_ids`, tombstones (negative ids) in place of the spans, and nothing else changed."""
    spans: list[Interval] = Field(min_length=1)
    """In order, apart from each other; those that are not cached are ignored."""
    eraser: Eraser = "kveraser"
    extra_key: str | None = None
    wait_s: float = Field(default=5.0, ge=0)
    """How long to wait for requests of the namespace to end."""


class EditAnswer(_Body):
    """What an edit did to the cache."""

    tokens_erased: int = 0
    tokens_recomputed: int = 0
    tokens_moved: int = 0
    """Tokens whose KV was rewritten without the model."""
    slots_copied: int = 0
    slots_freed: int = 0
    edit_ms: float = 0.0


class DropRequest(_Body):
    """Forget the cached entries of a key from `start` on."""

    token_ids: list[int]
    start: int = Field(ge=0)
    branches: bool = False
    """Also what other keys cached that go through entry `start`."""
    extra_key: str | None = None
    wait_s: float = Field(default=5.0, ge=0)


class DropAnswer(_Body):
    """See `DropRequest`."""

    slots_freed: int


class Replicas(_Body):
    """Which other replicas did the same."""

    confirmed: list[str] = []
    missed: dict[str, str] = {}
    """URL to what went wrong. Such a replica takes the retraction over as soon as it reaches this one."""


class MessageSpan(_Body):
    """Characters of a message's content."""

    message: int = Field(ge=0)
    start: int = Field(default=0, ge=0)
    end: int | None = None
    """None: the end of the content."""


class RetractRequest(_Body):
    """Take spans of a thread back; the server remembers it.

    The thread is named as its clients send it, in the original text: token ids, or messages as the server renders
    them.
    """

    extra_key: str = Field(min_length=1)
    """The thread. In the default namespace a retraction would reach every client, so it must be named."""
    token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    spans: list[Interval | MessageSpan] = Field(min_length=1)
    """Intervals with `token_ids`, characters with `messages`."""
    eraser: Eraser = "kveraser"
    guarantee: Literal["steered", "exact"] = "steered"
    """`exact`: what follows is prefilled again without the span before anything else is decoded, and every cached path
    of the namespace that has read it is forgotten, whatever `eraser` says."""
    policy: str = ""
    reason: str = ""
    wait_s: float = Field(default=5.0, ge=0)
    spread: bool = True
    """Send it on to the other replicas."""

    @model_validator(mode="after")
    def _check(self) -> RetractRequest:
        if (self.token_ids is None) == (self.messages is None):
            raise ValueError("expected either token_ids or messages")
        kind = Interval if self.messages is None else MessageSpan
        if not all(isinstance(span, kind) for span in self.spans):
            raise ValueError("expected spans {start, end} with token_ids, {message, start, end} with messages")
        return self


class Retraction(_Body):
    """One span that was taken back."""

    retraction_id: str
    start: int
    end: int
    """In tokens of the original text."""
    state: State
    eraser: str
    policy: str = ""
    reason: str = ""
    created_at: str = ""


class RetractAnswer(_Body):
    """What was done."""

    retractions: list[Retraction]
    edit: EditAnswer
    num_cached: int
    """Tokens of the thread that were cached before. 0: this server has not seen it; do clients send this text?"""
    replicas: Replicas = Replicas()


class ChangeRequest(_Body):
    """Undo or heal retractions of a thread."""

    extra_key: str = Field(min_length=1)
    retraction_ids: list[str] | None = None
    """None: all of the thread."""
    wait_s: float = Field(default=5.0, ge=0)
    spread: bool = True
    """Send it on to the other replicas."""


class StatusRequest(_Body):
    """What does the server hold?"""

    extra_key: str | None = None
    """List the retractions of this thread."""


class StatusAnswer(_Body):
    """The server's model, its erasers, and what was retracted."""

    model: str
    vocab_size: int
    max_positions: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    device: str
    eraser_id: str
    """Of `kveraser`; empty where the server was started without one."""
    suffix_free: bool
    threads: int
    """Namespaces with retractions."""
    retractions: list[Retraction] = []
    replicas: Replicas = Replicas()


class ChangesRequest(_Body):
    """What changed in the ledger since it was last asked?"""

    ledger_id: str = ""
    """Of the last answer; the ledger of another one is told from its beginning."""
    after: int = 0
    """`sequence` of the last answer."""


class ChangesAnswer(_Body):
    """Records that are new or have changed, of all threads; digests, no text."""

    ledger_id: str
    sequence: int
    records: list[dict[str, Any]]
    """Of `records.SpanRecord`."""
