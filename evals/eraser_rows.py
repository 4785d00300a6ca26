"""Rows of `eval erasers`: means over traces with their errors, and differences to full recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .stats import mean, median, paired_interval, with_errors

if TYPE_CHECKING:
    from .erasers import ArmSample

ALL = "all"
COLUMNS = {
    "n": "traces",
    "affected_accuracy": "share of affected answers that are right, as if the span had never been there",
    "leak": "share of affected answers that are the retracted one",
    "unaffected_accuracy": "share of the other answers that are right; null where a task has none",
    "kl": "KL(recompute || arm) of the next token, mean over the next 64 tokens, nats",
    "top1": "share of those where both find the same token most likely",
    "edit_ms_median": "milliseconds of the edit",
    "next_step_ms_median": "milliseconds from the next question to the first token of its answer",
    "tokens_recomputed": "tokens through the model during the edit, mean",
    "_se": "of a column: standard error, robust to correlation inside of a trace",
    "span_length, depth": f"{ALL!r}, or a range: tokens of the span, and where it begins from 0 to 1",
}
EXTRACTION_COLUMNS = {
    "likelier": "share of traces in which the retracted answer is likelier than a decoy of its form; chance is 0.5",
    "extracted": "share of traces in which a prompt that asks for the retracted text gets its value",
}
SPAN_LENGTHS = (0, 16, 32, 64, 256, 65_536)
DEPTHS = (0.0, 1 / 3, 2 / 3, 1.0)


def eraser_rows(samples: Sequence[ArmSample]) -> list[dict[str, Any]]:
    """Summarise: by task, kind and length; over all tasks by length; over everything, by span length, by depth."""
    views: tuple[Callable[[ArmSample], Mapping[str, Any]], ...] = (
        lambda s: {"task": s.task, "kind": s.kind, "length": s.length},
        lambda s: {"length": s.length},
        lambda s: {},
        lambda s: {"span_length": _range(s.span_length, SPAN_LENGTHS)},
        lambda s: {"depth": _range(s.depth, DEPTHS)},
    )
    rows = []
    for view in views:
        groups: dict[tuple[Any, ...], list[ArmSample]] = {}
        names = ("task", "kind", "length", "span_length", "depth")
        for sample in samples:
            chosen = view(sample)
            groups.setdefault((sample.arm, *(chosen.get(name, ALL) for name in names)), []).append(sample)
        rows += [{**dict(zip(("arm", *names), key, strict=True)), **_row(group)} for key, group in groups.items()]
    return rows


def paired_rows(samples: Sequence[ArmSample], baseline: str) -> list[dict[str, Any]]:
    """Return differences to an arm on the same traces, by length and over all, with bootstrap intervals of 95 %."""
    by_trace: dict[tuple[str, str], ArmSample] = {(s.arm, s.sample_id): s for s in samples}
    rows = []
    for length in (ALL, *sorted({s.length for s in samples})):
        for arm in dict.fromkeys(s.arm for s in samples):
            chosen = [s for s in samples if s.arm == arm and length in (ALL, s.length)]
            row: dict[str, Any] = {"arm": arm, "length": length, "n": len(chosen)}
            for name, values in (("affected", "affected"), ("leak", "leaked"), ("unaffected", "unaffected")):
                pairs = [
                    (float(a), float(b))
                    for s in chosen
                    for a, b in zip(getattr(s, values), getattr(by_trace[baseline, s.sample_id], values), strict=True)
                ]
                traces = [s.sample_id for s in chosen for _ in getattr(s, values)]
                row[name] = mean([a - b for a, b in pairs])
                row[f"{name}_ci"] = paired_interval([a - b for a, b in pairs], traces)
            rows.append(row)
    return rows


def extraction_rows(samples: Sequence[ArmSample]) -> list[dict[str, Any]]:
    """Return by arm whether the retracted text can be got back."""
    rows = []
    for arm in dict.fromkeys(s.arm for s in samples):
        chosen = [s for s in samples if s.arm == arm and s.likelier is not None]
        row: dict[str, Any] = {"arm": arm, "n": len(chosen)}
        for name in EXTRACTION_COLUMNS:
            values = [float(getattr(s, name)) for s in chosen]
            row |= with_errors({name: values})
        rows.append(row)
    return rows


def _row(group: Sequence[ArmSample]) -> dict[str, Any]:
    row: dict[str, Any] = {"n": len(group)}
    for name, column in (("affected_accuracy", "affected"), ("leak", "leaked"), ("unaffected_accuracy", "unaffected")):
        row |= _mean(name, ((s.sample_id, float(value)) for s in group for value in getattr(s, column)))
    for name in ("kl", "top1"):
        row |= _mean(name, ((s.sample_id, getattr(s, name)) for s in group))
    row["edit_ms_median"] = median([s.edit_ms for s in group])
    row["next_step_ms_median"] = median([s.next_step_ms for s in group])
    return row | _mean("tokens_recomputed", ((s.sample_id, float(s.tokens_recomputed)) for s in group))


def _mean(name: str, values: Iterable[tuple[str, float]]) -> dict[str, Any]:
    pairs = list(values)
    numbers = [value for _, value in pairs]
    return with_errors({name: numbers}, [trace for trace, _ in pairs])


def _range(value: float, edges: Sequence[float]) -> str:
    for low, high in zip(edges, edges[1:], strict=False):
        if low <= value < high or (value == high == edges[-1]):
            return f"{low} to {high}" if isinstance(low, int) else f"{low:.3g} to {high:.3g}"
    raise ValueError(f"expected a value between {edges[0]} and {edges[-1]}, got {value}")
