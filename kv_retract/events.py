"""What a session tells those who watch it: frozen events, and the contract of an observer.

Events carry no text of a thread: digests, counts, names and the reasons that policies give for people.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar, Literal, TypeAlias

from .policies.asking import PolicyFailure
from .types import Divergence, EraseResult, RetractionPlan, Status

log = logging.getLogger(__name__)

Why: TypeAlias = Literal["undone", "redone", "healed", "cold", "no room"]
"""Why a status changes: revoked by a caller; made again after that; the healer made it exact; the edited cache was
lost, and the span is left out now; the edit had no room, and the span is left out."""


def now() -> str:
    """Return the time as ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to a thread."""

    thread_id: str
    at: str = field(default_factory=now)
    """ISO 8601, UTC, by the clock of this process; clocks may step, so the order of events is that of the calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided(Event):
    """Spans are about to be taken back. Told before anything changes: an observer that raises stops it."""

    actor: str
    """Who: `policy`, or what the caller of `retract` said."""
    plan: RetractionPlan
    """With at least one span."""
    digests: Mapping[str, str]
    """SHA-256 of the text of each span, by `retraction_id`. A short secret can be guessed from its digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased(Event):
    """The cache was edited as decided."""

    retraction_ids: tuple[str, ...]
    result: EraseResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusChanges(Event):
    """A retraction is about to change its status. Told before the ledger is written: who raises stops it."""

    actor: str
    """Who: as in `Decided`, or `session` and `healer` for what they do by themselves."""
    retraction_id: str
    before: Status
    after: Status
    why: Why
    divergence: Divergence | None = None
    """Of steered from exact, where it was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed(Event):
    """A thread is exact: its steered path was replaced."""

    retraction_ids: tuple[str, ...]
    tokens: int
    """Tokens that were prefilled for it."""
    waited_s: float
    """From the edit to the swap."""
    divergence: Divergence | None
    """None where the engine does not show distributions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverged(Event):
    """A steered edit was further from exact than the session's threshold; the thread is exact now."""

    retraction_ids: tuple[str, ...]
    divergence: Divergence
    threshold: float
    """KL, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoliciesFailed(Event):
    """Policies gave nothing before a step."""

    failures: tuple[PolicyFailure, ...]
    """Without their messages, which may quote what the policies read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped(Event):
    """An answer is finished, or was given up."""

    model: str
    retract_ms: float
    """Policies, planning and edits."""
    first_token_ms: float | None
    """From the beginning of the step; None where no token came."""
    total_ms: float
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    finish_reason: str = ""
    """As in `StepResult`; `closed` where the caller stopped listening, `error` where the step failed."""
    error: str = ""
    """Name of the exception's type; never its message, which may quote the thread."""


class Observer(ABC):
    """Watches the threads of a session: audit logs, traces, metrics.

    Events of one thread come in order; observers are called from the threads of callers and of the healer, so they
    must be safe to share, and quick: a step waits for them.
    """

    required: ClassVar[bool] = False
    """Whether what it raises goes to the caller of the session. Else it is logged, and nothing else happens."""

    @abstractmethod
    def on_event(self, event: Event) -> None:
        """Take note of an event."""

    def close(self) -> None:
        """Let go of files; the session calls it when it is closed. Closing twice is harmless."""
        return None


class Observers:
    """All observers of a session; those that are required first, so that what they stop is seen by nobody else."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = sorted(observers, key=lambda o: not o.required)

    def tell(self, event: Event) -> None:
        """Tell all of them.

        Raises:
            Exception: whatever a required observer raises; those behind it are not told.
        """
        for observer in self._observers:
            try:
                observer.on_event(event)
            except Exception as error:
                if observer.required:
                    raise
                # The message may quote anything: only its type is safe to log.
                log.warning("observer %s failed on %s: %s", type(observer).__name__, type(event).__name__,
                            type(error).__name__)  # fmt: skip

    def close(self) -> None:
        """Close all of them, also where one raises; then raises what the first one did."""
        with ExitStack() as stack:
            for observer in reversed(self._observers):
                stack.callback(observer.close)
