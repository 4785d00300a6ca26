"""Policies under supervision: what they would take back is reported, or waits for an approval."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import PolicyError
from ..types import Retraction
from .base import PolicyContext, RetractionPolicy, register_policy
from .overlaps import proposal_id
from .wrapping import PolicyWrapper, WrapperOfOne

log = logging.getLogger(__name__)


@register_policy("dry_run")
@dataclass(kw_only=True)
class DryRun(WrapperOfOne):
    """Propose nothing, but report what the inner policy would have proposed.

    Every proposal is logged (thread, id, policy and place, never text), and given to `on_proposal`. A policy is asked
    before every step and again on retries, and it keeps no state: so the same proposal is reported again and again,
    with the same id. The callback is the one side effect in the policies, so it must bear repetition: let it add to a
    set, or insert where the id is new. What it raises fails the step, as any failure of a policy does.
    """

    name: ClassVar[str] = "dry_run"

    on_proposal: Callable[[str, str, Retraction], object] | None = None
    """Called with thread id, `proposal_id` and proposal."""

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return nothing."""
        for policy in self.inner():
            for retraction in policy.proposals(ctx):
                id = proposal_id(retraction, ctx.messages)
                log.info(
                    "dry run: thread %r, proposal %s of policy %r at %r",
                    ctx.thread_id, id, retraction.policy, retraction.span,
                )  # fmt: skip
                if self.on_proposal is not None:
                    self.on_proposal(ctx.thread_id, id, retraction)
        return []


@register_policy("require_approval")
@dataclass(kw_only=True)
class RequireApproval(WrapperOfOne):
    """Propose only what was approved; `waiting` says what is not yet.

    Approvals are ids (`proposal_id`), small and JSON-able, so that they can live in an agent's state, or a predicate.
    An id does not name the position of the message: it holds after older messages are pruned, and for every message
    equal to the approved one. False positives: the approver's.
    """

    name: ClassVar[str] = "require_approval"

    approved: Collection[str] | Callable[[str, Retraction], bool] = ()
    """Ids of the approved proposals, or a predicate on thread id and proposal. A predicate is asked before every step
    and must answer the same until somebody decides."""

    def __post_init__(self) -> None:
        """Check the approvals."""
        super().__post_init__()
        if isinstance(self.approved, str):
            raise PolicyError(f"expected a list of ids or a predicate as approved, got {self.approved!r}")

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the approved proposals."""
        return [retraction for _, retraction, approved in self._asked(ctx) if approved]

    def waiting(self, ctx: PolicyContext) -> dict[str, Retraction]:
        """Return what is not approved, by id, for whoever asks people: the first of equal proposals."""
        found: dict[str, Retraction] = {}
        for id, retraction, approved in self._asked(ctx):
            if not approved:
                found.setdefault(id, retraction)
        return found

    def _asked(self, ctx: PolicyContext) -> Iterator[tuple[str, Retraction, bool]]:
        ids = None if callable(self.approved) else frozenset(self.approved)
        for policy in self.inner():
            for retraction in self.widened(policy.proposals(ctx)):
                id = proposal_id(retraction, ctx.messages)
                if ids is not None:
                    yield id, retraction, id in ids
                elif callable(self.approved):
                    yield id, retraction, bool(self.approved(ctx.thread_id, retraction))


def approvals_in(policies: Iterable[RetractionPolicy]) -> Iterator[RequireApproval]:
    """Return the policies that wait for approval, also inside of wrappers."""
    for policy in policies:
        if isinstance(policy, RequireApproval):
            yield policy
        elif isinstance(policy, PolicyWrapper):
            yield from approvals_in(policy.inner())
