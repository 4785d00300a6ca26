"""From a plan to edits of the engine's cache."""

from __future__ import annotations

from dataclasses import replace

from .engine.base import Engine
from .erasers import EditShape, Eraser, RecomputeEraser
from .errors import PoolExhaustedError
from .planner import EraserFacts
from .thread import ThreadView
from .types import EraseResult, Guarantee, RetractionPlan


def facts_of(eraser: Eraser) -> EraserFacts:
    """Return what the planner must know of an eraser."""
    return EraserFacts(
        eraser_id=eraser.eraser_id,
        closes_gap=eraser.closes_gap,
        suffix_free=eraser.suffix_free,
        exact=eraser.exact,
        recomputed=lambda p, s, x: eraser.cost(EditShape(prefix=p, span=s, suffix=x)).recomputed,
    )


def apply_plan(engine: Engine, eraser: Eraser, view: ThreadView, plan: RetractionPlan) -> EraseResult:
    """Edit the cached part of a thread.

    The planner makes everything behind an exact span exact, so steered spans come first. With both kinds, what lies
    behind the first exact span is forgotten and left to the next prefill, which then runs on the steered part. Where
    the pool has no room for what an edit copies or recomputes, the path is forgotten from the first span on.

    Args:
        engine: holds the thread.
        eraser: of the steered spans.
        view: the thread before the edit.
        plan: at least one span of it.

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
        # A decoded answer or a fork may hold the old path; a secret must not stay behind in it.
        freed = engine.purge(view.key, view.entry(min(guaranteed)))
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
