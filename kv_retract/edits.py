"""From proposals to a plan, and from a plan to edits of the engine's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .attention import attention_of
from .engine.base import Engine
from .erasers import EditShape, Eraser, RecomputeEraser
from .errors import PoolExhaustedError
from .ledger.lineage import Lineage
from .planner import EraserFacts, Planner
from .thread import ThreadView, with_notice
from .types import EraseResult, Guarantee, Retraction, RetractionPlan, RetractionRecord


def facts_of(eraser: Eraser) -> EraserFacts:
    """Return what the planner must know of an eraser."""
    return EraserFacts(
        eraser_id=eraser.eraser_id,
        closes_gap=eraser.closes_gap,
        suffix_free=eraser.suffix_free,
        exact=eraser.exact,
        recomputed=lambda p, s, x: eraser.cost(EditShape(prefix=p, span=s, suffix=x)).recomputed,
    )


def plan_for(
    view: ThreadView,
    proposals: Sequence[Retraction],
    known: Sequence[RetractionRecord],
    *,
    thread_id: str,
    engine: Engine,
    eraser: Eraser,
    planner: Planner,
    lineage: Lineage,
    notify: bool,
) -> RetractionPlan:
    """Add what cascades bring, and notices, and plan; changes nothing.

    Args:
        view: the thread.
        proposals: of the policies or the caller.
        known: records that stand in its messages, revoked ones too.
        thread_id: its label.
        engine: holds the thread.
        eraser: of steered spans.
        planner: decides.
        lineage: finds what was derived.
        notify: say what is withdrawn, also where the eraser does not need it.

    Raises:
        SpanError: a proposal of the policy `explicit` names a place that is not there.
    """
    messages = view.rendering.messages
    derived = lineage.expand(proposals, messages, known, attention=attention_of(engine, view))
    notify = notify or eraser.needs_notice
    return planner.plan(
        [with_notice(p, messages) if notify and not p.derived_from else p for p in derived.proposals],
        thread_id=thread_id,
        messages=messages,
        rendering=view.rendering,
        records=known,
        num_cached=view.token(view.cached),
        eraser=facts_of(eraser),
        hops=derived.hops,
    )


def apply_plan(
    engine: Engine, eraser: Eraser, view: ThreadView, plan: RetractionPlan, known: Sequence[RetractionRecord] = ()
) -> EraseResult:
    """Edit the cached part of a thread.

    The planner makes everything behind an exact span exact, so steered spans come first. With both kinds, what lies
    behind the first exact span is forgotten and left to the next prefill, which then runs on the steered part. Where
    the pool has no room for what an edit copies or recomputes, the path is forgotten from the first span on.

    Args:
        engine: holds the thread.
        eraser: of the steered spans.
        view: the thread before the edit.
        plan: at least one span of it.
        known: records that stand in its messages: what was undone may still be cached as it was steered.

    Returns:
        What was done; `exact` although spans were to be steered where there was no room: the next prefill leaves
        them out.
    """
    try:
        result = _edit(engine, eraser, view, plan)
    except PoolExhaustedError:
        freed = engine.drop(view.key, view.entry(plan.spans[0].start))
        result = EraseResult(eraser_id=RecomputeEraser().eraser_id, slots_freed=freed, exact=True)
    guaranteed = [s.start for s in plan.spans if s.record.guarantee is Guarantee.EXACT]
    if guaranteed:
        # A decoded answer, a fork, a heal that is half done, a state before an undo: a secret must not stay in any.
        freed = sum(engine.purge(v.key, v.entry(min(guaranteed))) for v in (view, *view.other_states(known)))
        result = replace(result, slots_freed=result.slots_freed + freed)
    return result


def _edit(engine: Engine, eraser: Eraser, view: ThreadView, plan: RetractionPlan) -> EraseResult:
    exact, steered = [s for s in plan.spans if s.exact], [s for s in plan.spans if not s.exact]
    if not steered:
        new_key = view.key_after(exact, exact_from=exact[0].start)
        return engine.erase(view.key, view.entries(exact), RecomputeEraser(), new_key)
    end = len(view.key)
    if exact:
        end = view.entry(exact[0].start)
        engine.drop(view.key, end)
    # Where others share what is behind `end` it is still cached; it is no part of this thread any more.
    old, new = view.key.cut(end), view.key_after(steered).cut(end)
    return engine.erase(old, view.entries(steered), eraser, new)
