"""One bad document under many threads: what the edit costs the first thread, and what it costs each that follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.erasers import ERASERS

from .arms import REFERENCE, clock
from .bench import check_positions
from .machine import describe_machine, versions
from .progress import Progress, silent
from .specs import Spec, arm_label
from .stats import median


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBench:
    """What to time."""

    threads: int = 64
    prefix: int = 512
    """Tokens before the document, shared by all threads."""
    span: int = 128
    """Tokens of the document."""
    suffix: int = 128
    """Tokens of each thread's own, behind the document."""
    arms: tuple[Spec, ...] = (
        *(Spec("kveraser", {"variant": variant}) for variant in ("blind", "kv_map", "suffix_aware")), Spec(REFERENCE),
    )  # fmt: skip
    model: str = "reference"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


def bench_shared(settings: SharedBench, *, progress: Progress = silent) -> dict[str, Any]:
    """Time the edits, thread after thread, of random token ids; return one JSON-able document.

    Raises:
        BenchSettingError: a thread does not fit into the model.
        UnknownNameError: the model or an eraser has no such name.
        EraserMismatchError: a learned eraser belongs to another model.
    """
    from kv_retract.engine.hf import HFEngine
    from kv_retract.engine.models import load_model

    made = [(spec, spec.create(ERASERS)) for spec in settings.arms]
    length = settings.prefix + settings.span
    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.seed)
    check_positions(loaded, length + settings.suffix)
    rng = np.random.default_rng(settings.seed)
    vocab = loaded.model.config.vocab_size
    common = rng.integers(0, vocab, length)
    threads = [np.concatenate([common, rng.integers(0, vocab, settings.suffix)]) for _ in range(settings.threads)]
    arms: dict[str, Any] = {}
    for number, (spec, eraser) in enumerate(made):
        engine = HFEngine(loaded.model, max_tokens=4 * (length + settings.threads * settings.suffix), name=loaded.name)
        edits = [
            KeyEdit(
                start=settings.prefix, end=length, exact=eraser.exact, eraser_id=eraser.eraser_id,
                retraction_id=f"thread {i}", closes_gap=eraser.closes_gap, shared=eraser.suffix_free,
            )
            for i in range(settings.threads)
        ]  # fmt: skip
        for ids in threads:
            engine.extend(build_key(ids, ()))
        times, tokens = [], []
        for i, (ids, edit) in enumerate(zip(threads, edits, strict=True)):
            started = clock(engine.spec.device)
            result = engine.erase(build_key(ids, ()), [(edit.start, edit.end)], eraser, build_key(ids, [edit]))
            times.append((clock(engine.spec.device) - started) * 1e3)
            tokens.append(result.tokens_recomputed + result.tokens_moved)
            progress(number * settings.threads + i + 1, len(settings.arms) * settings.threads)
        engine.check_integrity()
        arms[arm_label(spec, eraser)] = {
            "first_ms": times[0],
            "next_ms_median": median(times[1:]),
            "all_ms": sum(times),
            "tokens_written_first": tokens[0],
            "tokens_written_all": sum(tokens),
            "tokens_in_use": engine.tokens_in_use(),
        }
    settings_ = {name: value for name, value in asdict(settings).items() if name != "arms"}
    return {
        **settings_, "arms": arms, "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device), "versions": versions(),
    }  # fmt: skip
