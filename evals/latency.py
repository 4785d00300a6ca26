"""How the cost of an edit grows with the thread: `bench edit` over lengths and depths, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .arms import REFERENCE
from .bench import EditBench, bench_edit, check_positions
from .progress import Progress, silent
from .specs import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyBench:
    """What to time."""

    contexts: tuple[int, ...] = (1024, 4096, 16_384)
    depths: tuple[float, ...] = (0.1, 0.5)
    span: int = 128
    arms: tuple[Spec, ...] = (
        Spec(REFERENCE), Spec("shift"), Spec("repair"),
        *(Spec("kveraser", {"variant": variant}) for variant in ("blind", "suffix_aware", "kv_map")),
    )  # fmt: skip
    model: str = "reference"
    repeats: int = 20
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


def bench_latency(settings: LatencyBench, *, progress: Progress = silent) -> dict[str, Any]:
    """Time edits at every length and depth; return one JSON-able document.

    `rows`: context, depth, arm, `edit_ms` (median), `speedup` over `recompute` there. `growth`: by arm and depth, the
    cost at the longest context over that at the shortest.

    Raises:
        BenchSettingError: a span does not fit into a thread, or a thread into the model.
        UnknownNameError: the model or an eraser has no such name.
        EraserMismatchError: a learned eraser belongs to another model.
    """
    from kv_retract.engine.models import load_model

    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.seed)
    check_positions(loaded, max(settings.contexts))
    rows: list[dict[str, Any]] = []
    places = [(context, depth) for context in settings.contexts for depth in settings.depths]
    found: dict[str, Any] = {}
    for done, (context, depth) in enumerate(places):
        found = bench_edit(
            EditBench(
                context=context, span=settings.span, depth=depth, arms=settings.arms, model=settings.model,
                repeats=settings.repeats, seed=settings.seed, device=settings.device, dtype=settings.dtype,
            ),
            loaded=loaded,
        )  # fmt: skip
        for arm, row in found["arms"].items():
            speedup = found["arms"][REFERENCE]["edit_ms_median"] / row["edit_ms_median"]
            rows.append(
                {"context": context, "depth": depth, "arm": arm, "edit_ms": row["edit_ms_median"], "speedup": speedup}
            )
        progress(done + 1, len(places))
    return {
        "rows": rows,
        "growth": growth(rows),
        "span": settings.span,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: found[name] for name in ("model", "num_parameters", "dtype", "repeats", "machine", "versions")},
    }


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return by arm and depth how many times an edit costs at the longest context what it costs at the shortest."""
    cost = {(row["arm"], row["depth"], row["context"]): row["edit_ms"] for row in rows}
    shortest, longest = (pick(row["context"] for row in rows) for pick in (min, max))
    return [
        {"arm": arm, "depth": depth, "growth": cost[arm, depth, longest] / cost[arm, depth, shortest]}
        for arm, depth in dict.fromkeys((row["arm"], row["depth"]) for row in rows)
    ]
