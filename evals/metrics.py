"""From samples to the rows of the tables: one row per arm and policy, and per arm over all policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .stats import mean, median, standard_error
from .walk import Sample

ALL = "all"
"""Stands for all policies together."""

COLUMNS = {
    "n": "retraction steps at which the arm's own eraser made the edit; the other numbers are over these",
    "n_not_own": "further steps, not counted: the planner had the span recomputed, or it was not cached yet",
    "kl_mean": "KL(recompute || arm) of the next-token distributions on the trace's own next message, nats per token",
    "kl_se": "standard error of kl_mean, robust to correlation inside of a trace; null with fewer than two traces",
    "top1": "share of tokens for which both arms put the same token first",
    "tokens_erased": "mean tokens in the spans of a step",
    "tokens_recomputed": "mean tokens that the edit sent through the model",
    "edit_ms_median": "median time of the edit, milliseconds",
    "next_step_ms_median": "median time from the edited cache to the next token, milliseconds",
    "cached_tokens": "mean tokens served from the cache in that step",
}
"""What the numbers of a row are."""


def metric_rows(samples: Sequence[Sample], arms: Sequence[str], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Summarise samples; arms and policies in the order given, arms without a sample included with n = 0.

    A step at which several policies retracted counts for each of them.
    """
    rows = []
    for policy in (ALL, *policies):
        for arm in arms:
            chosen = [s for s in samples if s.arm == arm and (policy == ALL or policy in s.policies)]
            rows.append({"arm": arm, "policy": policy, **_summary(chosen)})
    return rows


def _summary(chosen: Iterable[Sample]) -> dict[str, Any]:
    chosen = list(chosen)
    samples = [s for s in chosen if s.own_edit]
    # A source names one trace; two traces may carry one id.
    clusters = [s.source for s in samples]
    kl = [s.kl for s in samples]
    return {
        "n": len(samples),
        "n_not_own": len(chosen) - len(samples),
        "kl_mean": mean(kl),
        "kl_se": standard_error(kl, clusters),
        "top1": mean(s.top1 for s in samples),
        "tokens_erased": mean(s.tokens_erased for s in samples),
        "tokens_recomputed": mean(s.tokens_recomputed for s in samples),
        "edit_ms_median": median(s.edit_ms for s in samples),
        "next_step_ms_median": median(s.next_step_ms for s in samples),
        "cached_tokens": mean(s.cached_tokens for s in samples),
    }
