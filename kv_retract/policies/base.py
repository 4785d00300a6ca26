"""Contract of a policy: read the messages, propose what to take back. Policies never see tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import ClassVar

from ..errors import KVRetractError, PolicyError
from ..registry import Registry
from ..types import Cascade, Message, Retraction, RetractionRecord
from .tool_results import DEFAULT_ERROR_PATTERN, ToolReader, ToolResult

POLICIES: Registry[RetractionPolicy] = Registry("policy", "kv_retract.policies")
register_policy = POLICIES.register


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """What a policy may look at, before one step of one thread."""

    thread_id: str
    messages: Sequence[Message]
    """All messages of the thread, oldest first; not to be changed."""
    records: Sequence[RetractionRecord] = ()
    """Retractions that apply to these messages already; `span.message` is the index in `messages`."""
    now: datetime | None = None
    """When the step begins, UTC. None where a recorded thread is replayed and nobody knows."""
    reader: ToolReader = field(default_factory=ToolReader, repr=False, compare=False)
    """Reads tool results; whoever asks before every step keeps one."""
    _results: dict[tuple[str, int], tuple[ToolResult, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def tool_results(self, error_pattern: str = DEFAULT_ERROR_PATTERN) -> tuple[ToolResult, ...]:
        """Return the tool results with their calls; see `tool_results`. All policies of a step share one reading."""
        key = error_pattern, len(self.messages)
        if key not in self._results:
            self._results[key] = tuple(self.reader.results(self.messages, error_pattern))
        return self._results[key]

    def is_retracted(self, message: int) -> bool:
        """Whether the whole content of a message is taken back already."""
        return any(
            r.span.message == message and r.span.part == "content" and r.span.start == 0 and r.span.end is None
            for r in self.records
        )


@dataclass(kw_only=True)
class RetractionPolicy(ABC):
    """A detector; the dataclass fields are its parameters.

    `propose` is called before every step, also again for the same messages (retries, interrupts, forks): it must
    depend on its arguments only, have no side effects, and may propose what is retracted already (it is ignored).
    """

    name: ClassVar[str]

    cascade: Cascade = Cascade.NONE
    """What else goes with every span that it finds (DESIGN D8): `none`, `quoted` or `lineage`."""
    verify: float = 0.0
    """Share of its steered edits, from 0 to 1, that are compared with exact recomputation in the background."""

    @abstractmethod
    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the spans to take back; empty where there is nothing."""

    def proposals(self, ctx: PolicyContext) -> list[Retraction]:
        """Return what `propose` does, with `cascade` and `verify` of this policy where they ask for more.

        Raises:
            ValueError: `cascade` or `verify` is none that is known.
        """
        return self.widened(self.propose(ctx))

    def widened(self, found: list[Retraction]) -> list[Retraction]:
        """Return proposals with `cascade` and `verify` of this policy; raises as `proposals`."""
        cascade = Cascade(self.cascade)
        if not 0 <= self.verify <= 1:
            raise ValueError(f"expected verify from 0 to 1, got {self.verify!r}")
        if cascade is Cascade.NONE and not self.verify:
            return found
        return [
            replace(r, cascade=cascade.wider(Cascade(r.cascade)), verify=max(self.verify, r.verify))
            if isinstance(r, Retraction)
            else r
            for r in found
        ]


def ask(policy: RetractionPolicy, ctx: PolicyContext) -> list[Retraction]:
    """Return a policy's proposals.

    Raises:
        PolicyError: the policy failed, or returned something else; the message names it and the thread.
        SpanError: the policy was told by its parameters to look at a place that is not there (`explicit`).
    """
    where = f"policy {policy.name!r} failed on thread {ctx.thread_id!r} ({len(ctx.messages)} messages)"
    try:
        proposals = list(policy.proposals(ctx))
    except KVRetractError:
        raise
    except Exception as error:
        raise PolicyError(f"{where}: {type(error).__name__}: {error}") from error
    for proposal in proposals:
        if not isinstance(proposal, Retraction):
            raise PolicyError(f"{where}: expected a list of Retraction from propose(), got a {type(proposal).__name__}")
    return proposals
