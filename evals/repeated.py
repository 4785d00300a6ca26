"""Repeated use of an eraser: many retractions in one thread, one after the other and at once, and long answers after.

A thread of the family `facts` states more facts than are taken back. After so many edits, those taken back must be
unknown and the others still be told.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from kv_retract.types import Guarantee, SamplingParams

from .arms import REFERENCE
from .asking import AskedThread, divergence
from .erasers import labelled_arms
from .jobs import CorpusEval, engine_of, evaluate, traces
from .plots import repeated_plot
from .progress import Progress, silent
from .specs import Spec
from .stats import with_errors

if TYPE_CHECKING:
    from kv_retract.engine.hf import HFEngine

FAMILY = "facts"
Mode = Literal["in turn", "at once", "after healing"]
MODES: tuple[Mode, ...] = get_args(Mode)
SURVIVORS = 8
"""Facts that are never taken back, beside those that are."""
MOST_ASKED = 8
"""Probes of either kind after the edits."""
EDITS = (1, 4, 16, 64)
AHEAD = 512
"""Tokens of continued decoding after the edits."""
ARMS = (
    Spec("mask"), Spec(REFERENCE),
    *(Spec("kveraser", {"variant": variant}) for variant in ("blind", "suffix_aware", "kv_map")),
)  # fmt: skip
COLUMNS = {
    "edits": "retractions in the thread",
    "mode": "in turn: one edit each; at once: one for all; after healing: in turn, once another fact is gone exactly",
    "n": "threads",
    "affected_accuracy": "share of retracted facts, up to 8 of them asked, that are told to be unknown",
    "leak": "share of those that are still told",
    "unaffected_accuracy": "share of 8 other facts that are told rightly",
    "kl": "KL(recompute || arm) of the next token, mean over the next 512 tokens, nats",
    "top1": "share of those where both find the same token most likely",
    "edit_ms": "milliseconds of all edits together, mean",
    "_se": "of a column: standard error over threads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedEval(CorpusEval):
    """What to measure."""

    edits: tuple[int, ...] = EDITS
    n: int = 4
    """Threads per number of edits."""
    arms: tuple[Spec, ...] = ARMS


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedSample:
    """What one arm did in one thread."""

    sample_id: str
    arm: str
    mode: Mode
    edits: int
    affected_accuracy: float
    leak: float
    unaffected_accuracy: float
    kl: float
    top1: float
    edit_ms: float


def eval_repeated(settings: RepeatedEval, *, progress: Progress = silent) -> dict[str, Any]:
    """Measure and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`, `repeated.svg`.

    Raises:
        OutputExistsError: the results folder is there already.
        UnknownNameError: the model or an eraser has no such name.
        EraserMismatchError: a learned eraser belongs to another model.
    """
    arms = labelled_arms(settings.arms)
    return evaluate(
        settings,
        _samples_of,
        [(FAMILY, edits) for edits in settings.edits],
        about={"arms": [label for label, _ in arms], "edits": list(settings.edits), "columns": COLUMNS},
        summarise=lambda samples: {"rows": repeated_rows(samples)},
        record=asdict,
        files=lambda metrics: {"repeated.svg": repeated_plot(metrics["rows"])},
        progress=progress,
    )


def repeated_rows(samples: list[RepeatedSample]) -> list[dict[str, Any]]:
    """Summarise by arm, mode and number of edits."""
    groups: dict[tuple[str, str, int], list[RepeatedSample]] = {}
    for sample in samples:
        groups.setdefault((sample.arm, sample.mode, sample.edits), []).append(sample)
    rows = []
    for (arm, mode, edits), group in groups.items():
        names = ("affected_accuracy", "leak", "unaffected_accuracy", "kl", "top1", "edit_ms")
        columns = {name: [getattr(sample, name) for sample in group] for name in names}
        rows.append({"arm": arm, "mode": mode, "edits": edits, "n": len(group), **with_errors(columns)})
    return rows


def _samples_of(settings: RepeatedEval, family: str, edits: int) -> Iterator[list[RepeatedSample]]:
    """Yield what the arms do in each thread with so many edits."""
    engine, renderer = engine_of(settings, 256 * (edits + SURVIVORS) + 8192)
    arms = labelled_arms(settings.arms)
    for number, sample in traces(settings, family, length=256, size=edits + SURVIVORS + 1):
        healed, *chosen = random.Random(number).sample([span.span_id for span in sample.spans], edits + 1)
        found: list[RepeatedSample] = []
        expected: dict[Mode, tuple[str, Any, Any]] = {}
        for label, eraser in arms:
            for mode in MODES:
                thread = AskedThread(sample, eraser, engine, renderer, f"{label} {mode}")
                thread.prefill()
                if mode == "after healing":
                    thread.retract([healed], Guarantee.EXACT)
                    thread.prefill()
                parts = [chosen] if mode == "at once" else [[span_id] for span_id in chosen]
                edit_ms = sum(thread.retract(part)[1].edit_ms for part in parts)
                if mode not in expected:
                    expected[mode] = _expected(thread, engine, chosen)
                gone = {healed} if mode == "after healing" else set()
                found.append(_measured(thread, label, mode, chosen, gone, edit_ms, expected[mode]))
                thread.close()
        yield found


def _expected(thread: AskedThread, engine: HFEngine, chosen: list[str]) -> tuple[str, Any, Any]:
    """Return a question, what recompute goes on with behind it, and its log-probabilities there."""
    probe = next(p for p in thread.sample.probes if chosen[0] in p.without)
    tokens = engine.generate(thread.asked(probe.question), SamplingParams(max_tokens=AHEAD))
    ids = np.array([token.id for token in tokens])
    return probe.question, ids, thread.log_probabilities(thread.asked(probe.question), ids)


def _measured(
    thread: AskedThread, arm: str, mode: Mode, chosen: list[str], healed: set[str], edit_ms: float,
    expected: tuple[str, Any, Any],
) -> RepeatedSample:  # fmt: skip
    sample, taken = thread.sample, set(chosen)
    gone = [(p, next(iter(set(p.without) & taken))) for p in sample.probes if set(p.without) & taken]
    left = [p for p in sample.probes if p.without and not set(p.without) & (taken | healed)]
    gone, left = gone[:MOST_ASKED], left[:MOST_ASKED]
    question, ids, logs = expected
    kl, top1 = divergence(logs, thread.log_probabilities(thread.asked(question), ids))
    right = [thread.says(p.question, p.answer_without(span_id))[0] for p, span_id in gone]
    leaked = [thread.says(p.question, p.answer)[0] for p, _ in gone]
    others = [thread.says(p.question, p.answer)[0] for p in left]
    return RepeatedSample(
        sample_id=sample.sample_id, arm=arm, mode=mode, edits=len(chosen),
        affected_accuracy=sum(right) / len(right), leak=sum(leaked) / len(leaked),
        unaffected_accuracy=sum(others) / len(others), kl=kl, top1=top1, edit_ms=edit_ms,
    )  # fmt: skip
