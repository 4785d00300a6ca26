"""How the cost of an edit grows with the thread: `bench edit` over lengths and depths, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import REFERENCE
from .bench import EditBench, bench_edit, check_positions
from .floor import measure_limits
from .progress import Progress, silent
from .specs import Spec

if TYPE_CHECKING:
    from kv_retract.engine.models import LoadedModel


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

    `rows`: context, depth, arm, `edit_ms` (median), its quartiles, `speedup` over `recompute` there, `floor_ms` and
    `of_floor` (`evals.floor`). `growth`: by arm and depth, the cost at the longest context over that at the shortest.
    On a model of random weights, learned erasers of the bundled one are replaced by fresh ones: they cost the same.

    Raises:
        BenchSettingError: a span does not fit into a thread, or a thread into the model.
        UnknownNameError: the model or an eraser has no such name.
        EraserMismatchError: a learned eraser belongs to another model.
    """
    from kv_retract.engine.models import load_model

    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.seed)
    check_positions(loaded, max(settings.contexts))
    limits = measure_limits(settings.device, loaded.model.dtype)
    rows: list[dict[str, Any]] = []
    places = [(context, depth) for context in settings.contexts for depth in settings.depths]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        arms = fresh_erasers(settings.arms, loaded, Path(folder)) if loaded.is_random else settings.arms
        for done, (context, depth) in enumerate(places):
            found = bench_edit(
                EditBench(
                    context=context, span=settings.span, depth=depth, arms=arms, model=settings.model,
                    repeats=settings.repeats, seed=settings.seed, device=settings.device, dtype=settings.dtype,
                ),
                loaded=loaded, limits=limits,
            )  # fmt: skip
            rows += [_row(context, depth, arm, found["arms"]) for arm in found["arms"]]
            progress(done + 1, len(places))
    return {
        "rows": rows,
        "growth": growth(rows),
        "span": settings.span,
        "limits": asdict(limits),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: found[name] for name in ("model", "num_parameters", "dtype", "repeats", "machine", "versions")},
    }


def _row(context: int, depth: float, arm: str, arms: dict[str, Any]) -> dict[str, Any]:
    row = arms[arm]
    return {
        "context": context, "depth": depth, "arm": arm, "edit_ms": row["edit_ms_median"],
        "edit_ms_low": row["edit_ms"]["low"], "edit_ms_high": row["edit_ms"]["high"],
        "speedup": arms[REFERENCE]["edit_ms_median"] / row["edit_ms_median"],
        "floor_ms": row["floor_ms"], "of_floor": row["of_floor"],
    }  # fmt: skip


def fresh_erasers(arms: Sequence[Spec], loaded: LoadedModel, folder: Path) -> tuple[Spec, ...]:
    """Return arms with learned erasers of the bundled model replaced by untrained ones for another model.

    Args:
        arms: erasers; those with a `path` stay as they are.
        loaded: the model.
        folder: where the untrained ones are kept.
    """
    from kv_retract.engine.working import fingerprint_of
    from kv_retract.erasers.kveraser import KVEraserConfig
    from kv_retract.erasers.kveraser.model import new_net

    made = []
    for spec in arms:
        if spec.name == "kveraser" and not spec.parameters.get("path"):
            variant = spec.parameters.get("variant", "kv_map")
            config = KVEraserConfig(variant=variant, fingerprint=fingerprint_of(loaded.model), base=loaded.name)
            new_net(loaded.model, config).save(folder / variant)
            made.append(Spec(spec.name, {"path": str(folder / variant)}))
        else:
            made.append(spec)
    return tuple(made)


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return by arm and depth how many times an edit costs at the longest context what it costs at the shortest."""
    cost = {(row["arm"], row["depth"], row["context"]): row["edit_ms"] for row in rows}
    shortest, longest = (pick(row["context"] for row in rows) for pick in (min, max))
    return [
        {"arm": arm, "depth": depth, "growth": cost[arm, depth, longest] / cost[arm, depth, shortest]}
        for arm, depth in dict.fromkeys((row["arm"], row["depth"]) for row in rows)
    ]
