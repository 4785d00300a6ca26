"""Walk one recorded thread with all arms: retract where the policies say, then compare what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.errors import KVRetractError
from kv_retract.ledger.render import Renderer
from kv_retract.policies.base import RetractionPolicy
from kv_retract.trace import Trace
from kv_retract.types import EraseResult, Retraction, RetractionPlan

from .arms import REFERENCE, Arm
from .excerpts import Excerpt, excerpt
from .proposals import Step, continuation_text, steps
from .scoring import divergence

_FINAL = "already retracted"
"""A proposal that was dropped for another reason may be taken at a later step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One retraction step of one trace under one arm. Times in milliseconds, lengths in tokens."""

    trace_id: str
    source: str
    step: int
    """Index of the assistant message that comes next."""
    arm: str
    policies: tuple[str, ...]
    own_edit: bool
    """Whether the arm's eraser made the edit. False: the planner had it recomputed, or the span was not cached yet."""
    tokens_scored: int
    kl: float | None
    """KL(recompute || arm) of the next-token distributions, in nats, mean over the scored tokens; None: not scored."""
    top1: float | None
    """How often both put the same token first."""
    context_tokens: int
    suffix_tokens: int
    """Cached tokens after the end of the first span."""
    tokens_erased: int
    """In the spans of this step."""
    tokens_recomputed: int
    """Sent through the model by the edit."""
    tokens_moved: int
    edit_ms: float | None
    """None: nothing of the spans was cached, so there was nothing to edit."""
    next_step_ms: float
    """From the edited cache to the next token: the prefill of what is new."""
    cached_tokens: int
    """Served from the cache in that step."""
    prefilled_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retracted:
    """One span that was taken back, for the report."""

    trace_id: str
    step: int
    policy: str
    reason: str
    tokens: int
    excerpt: Excerpt


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one trace."""

    samples: list[Sample] = field(default_factory=list)
    retracted: list[Retracted] = field(default_factory=list)
    num_steps: int = 0
    problem: str = ""
    """Why the walk ended early; what was measured before stays."""
    too_long: bool = False
    """It ended because the context outgrew the model, the pool or the caller's limit."""


class Walker:
    """Walks traces, one after the other.

    Args:
        arms: one of them is the reference.
        renderer: that of the arms.
        policies: detectors, asked on the trace's own messages.
        max_context: longest context of a step, in tokens.
        score_tokens: how many tokens of the next assistant message to compare at most.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        renderer: Renderer,
        policies: Sequence[RetractionPolicy],
        *,
        max_context: int,
        score_tokens: int,
    ) -> None:
        if REFERENCE not in [arm.label for arm in arms]:
            raise ValueError(f"expected the arm {REFERENCE!r} among the arms, got {[arm.label for arm in arms]!r}")
        self._arms, self._renderer, self._policies = tuple(arms), renderer, tuple(policies)
        self._max_context, self._score_tokens = max_context, score_tokens

    def walk(self, trace: Trace, thread_id: str) -> Outcome:
        """Walk a trace and drop its threads from the cache. Errors of kv-retract end it early and are told."""
        outcome = Outcome()
        try:
            self._walk(trace, thread_id, outcome)
            if not outcome.num_steps and not outcome.problem:
                outcome.problem = "no assistant message after the first message, so there is no step to replay"
        except KVRetractError as error:
            outcome.problem = f"step {outcome.num_steps + 1}: {error}"
        finally:
            for arm in self._arms:
                arm.forget()
        return outcome

    def _walk(self, trace: Trace, thread_id: str, outcome: Outcome) -> None:
        seen: set[Retraction] = set()
        open_proposals = False
        fits = self._fits(trace)
        for step in steps(trace, self._policies):
            if not fits:
                length = len(self._renderer.render(trace.messages[: step.index], tools=_tools(trace)).ids)
                if length > self._max_context:
                    outcome.too_long = True
                    outcome.problem = (
                        f"cut at message {step.index}: the context has {length} tokens, at most {self._max_context} "
                        "are allowed (see --max-context and --pool-tokens)"
                    )
                    return
            # The steps between retractions leave the same cache in every arm: they are prefilled with the next one.
            if step.proposals and (open_proposals or not seen.issuperset(step.proposals)):
                open_proposals = self._compare(trace, thread_id, step, outcome)
                seen.update(step.proposals)
            outcome.num_steps += 1

    def _fits(self, trace: Trace) -> bool:
        """Whether the whole trace is short enough, so that its steps need not be measured."""
        last = max((i for i, m in enumerate(trace.messages) if m.role == "assistant"), default=0)
        if not last:
            return True
        return len(self._renderer.render(trace.messages[:last], tools=_tools(trace)).ids) <= self._max_context

    def _compare(self, trace: Trace, thread_id: str, step: Step, outcome: Outcome) -> bool:
        """Retract and score one step; return whether some proposal may be taken later."""
        context, tools = trace.messages[: step.index], _tools(trace)
        continuation = self._continuation(trace, step)
        # Every arm comes first at times: the first one meets cold processor caches.
        turn = step.index % len(self._arms)
        ran: dict[str, tuple[Sample, Any]] = {}
        open_proposals = False
        for arm in (*self._arms[turn:], *self._arms[:turn]):
            if step.previous >= 0:
                # What an agent has in its cache by then: everything up to its own newest message.
                before = trace.messages[: step.previous + 1]
                arm.extend(arm.key(thread_id, before, tools, add_generation_prompt=False))
            plan = arm.retract(thread_id, context, tools, step.proposals)
            if arm.label == REFERENCE:
                open_proposals = any(not dropped.why.startswith(_FINAL) for dropped in plan.dropped)
                outcome.retracted += [_retracted(trace, step, plan, i) for i in range(len(plan.spans))]
            if plan.spans:
                ran[arm.label] = self._next_step(arm, trace, thread_id, step, plan, continuation)
        if REFERENCE in ran:
            reference = ran[REFERENCE][1]
            for arm in self._arms:
                if arm.label in ran:
                    sample, logits = ran[arm.label]
                    outcome.samples.append(_with_scores(sample, reference, logits))
        return open_proposals

    def _next_step(
        self,
        arm: Arm,
        trace: Trace,
        thread_id: str,
        step: Step,
        plan: RetractionPlan,
        continuation: IntArray,
    ) -> tuple[Sample, Any]:
        erased = arm.session.last_erase(thread_id) or EraseResult(eraser_id=plan.eraser_id)
        key = arm.key(thread_id, trace.messages[: step.index], _tools(trace))
        result, milliseconds = arm.extend(key)
        logits = None
        if len(continuation):
            logits = arm.extend(_followed_by(key, continuation[:-1]), num_last=len(continuation))[0].logits
        sample = Sample(
            trace_id=trace.trace_id,
            source=trace.source,
            step=step.index,
            arm=arm.label,
            policies=tuple(sorted({name for span in plan.spans for name in span.record.policy.split("+")})),
            # An edit without room for its copies turns exact, whatever the eraser.
            own_edit=any(not span.why_exact for span in plan.spans) and erased.exact == arm.session.eraser.exact,
            tokens_scored=len(continuation),
            kl=None,
            top1=None,
            context_tokens=plan.num_tokens,
            suffix_tokens=max(0, plan.num_cached_tokens - plan.spans[0].end),
            tokens_erased=sum(span.end - span.start for span in plan.spans),
            tokens_recomputed=erased.tokens_recomputed,
            tokens_moved=erased.tokens_moved,
            edit_ms=erased.edit_ms or None,
            next_step_ms=milliseconds,
            cached_tokens=result.num_cached_tokens,
            prefilled_tokens=result.num_prefilled_tokens,
        )
        return sample, logits

    def _continuation(self, trace: Trace, step: Step) -> IntArray:
        """Return the first tokens of the trace's own next message, as they follow the generation prompt."""
        tools = _tools(trace)
        prompt = self._renderer.render(trace.messages[: step.index], tools=tools).ids
        whole = self._renderer.render(trace.messages[: step.index + 1], tools=tools, add_generation_prompt=False).ids
        if len(whole) > len(prompt) and np.array_equal(whole[: len(prompt)], prompt):
            return whole[len(prompt) :][: self._score_tokens]
        text = continuation_text(trace.messages[step.index])
        ids = self._renderer.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return np.array(ids[: self._score_tokens], dtype=np.int64)


def _with_scores(sample: Sample, reference: Any, logits: Any) -> Sample:
    if reference is None or logits is None:
        return sample
    kl, top1 = divergence(reference, logits)
    return replace(sample, kl=kl, top1=top1)


def _followed_by(key: ThreadKey, ids: IntArray) -> ThreadKey:
    positions = key.next_position + np.arange(len(ids), dtype=np.int64)
    return ThreadKey(np.concatenate([key.ids, ids]), np.concatenate([key.positions, positions]), key.extra_key)


def _retracted(trace: Trace, step: Step, plan: RetractionPlan, index: int) -> Retracted:
    span = plan.spans[index]
    return Retracted(
        trace_id=trace.trace_id,
        step=step.index,
        policy=span.record.policy,
        reason=span.record.reason,
        tokens=span.end - span.start,
        excerpt=excerpt(span.record.span, trace.messages[: step.index]),
    )


def _tools(trace: Trace) -> Any:
    return trace.tools or None
