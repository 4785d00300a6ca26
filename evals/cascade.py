"""What a cascade is worth: spans are retracted after the agent has repeated them, with and without what it derived.

Every trace of the corpus is told one turn further: the user asks a probe that the span affects, and the agent answers
with what the span says. Then the span is taken back, and the same is asked again. Without a cascade the agent's own
answer still stands in the thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kv_retract.types import Cascade, Message

from .arms import REFERENCE
from .asking import AskedThread, chosen_span
from .erasers import labelled_arms
from .jobs import CorpusEval, check_lengths, engine_of, evaluate, families_of, traces
from .progress import Progress, silent
from .specs import Spec
from .stats import mean, with_errors

if TYPE_CHECKING:
    from kv_retract.training.samples import CorpusSample, Probe

ARMS = (Spec("mask"), Spec(REFERENCE), Spec("kveraser"))
TASKS = ("facts", "updates", "needles")
LENGTHS = (512,)
MOST_PROBES = 4

COLUMNS = {
    "n": "traces",
    "affected_accuracy": "share of affected answers that are right, as if the span had never been there",
    "leak": "share of affected answers that are the retracted one",
    "unaffected_accuracy": "share of the other answers that are right",
    "derived": "spans that the cascade brought, mean",
    "quote_found": "share of traces in which the repeated answer was among them; null without a cascade",
    "_se": "of a column: standard error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeEval(CorpusEval):
    """What to measure."""

    tasks: tuple[str, ...] = TASKS
    """Task families; each has spans whose value an answer repeats."""
    lengths: tuple[int, ...] = LENGTHS
    n: int = 12
    """Traces per task and length."""
    arms: tuple[Spec, ...] = ARMS


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeSample:
    """What one arm did on one trace under one cascade."""

    sample_id: str
    task: str
    arm: str
    cascade: str
    affected: bool
    leaked: bool
    unaffected: float | None
    derived: int
    quote_found: bool


def eval_cascade(settings: CascadeEval, *, progress: Progress = silent) -> dict[str, Any]:
    """Measure and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`; return the metrics.

    Raises:
        OutputExistsError: the results folder is there already.
        UnknownNameError: the model, a task or an eraser has no such name.
    """
    tasks = families_of(settings.tasks, settings.split)
    arms = labelled_arms(settings.arms)
    check_lengths(settings.model, settings.device, settings.dtype, settings.lengths)
    return evaluate(
        settings,
        _samples_of,
        [(task, length) for task in tasks for length in settings.lengths],
        about={
            "tasks": list(tasks), "lengths": list(settings.lengths), "arms": [label for label, _ in arms],
            "columns": COLUMNS,
        },
        summarise=lambda samples: {"rows": cascade_rows(samples)},
        record=asdict,
        progress=progress,
    )  # fmt: skip


def cascade_rows(samples: list[CascadeSample]) -> list[dict[str, Any]]:
    """Summarise by arm and cascade."""
    groups: dict[tuple[str, str], list[CascadeSample]] = {}
    for sample in samples:
        groups.setdefault((sample.arm, sample.cascade), []).append(sample)
    rows = []
    for (arm, cascade), group in groups.items():
        columns: dict[str, list[float | None]] = {
            "affected_accuracy": [float(s.affected) for s in group],
            "leak": [float(s.leaked) for s in group],
            "unaffected_accuracy": [s.unaffected for s in group],
            "derived": [float(s.derived) for s in group],
            "quote_found": [None if cascade == Cascade.NONE else float(s.quote_found) for s in group],
        }
        rows.append({"arm": arm, "cascade": cascade, "n": len(group), **with_errors(columns)})
    return rows


def _samples_of(settings: CascadeEval, task: str, length: int) -> Iterator[list[CascadeSample]]:
    engine, renderer = engine_of(settings, 4 * (length + 2048))
    for number, plain in traces(settings, task, length=length):
        span, hit, others = chosen_span(plain, number, MOST_PROBES)
        sample = told(plain, hit[0])
        quote = len(plain.messages) + 1
        found = []
        for label, eraser in labelled_arms(settings.arms):
            for cascade in Cascade:
                thread = AskedThread(sample, eraser, engine, renderer, f"{label} {cascade}")
                thread.prefill()
                plan, _ = thread.retract([span.span_id], cascade=cascade)
                asked, right = hit[0].question, hit[0].answer_without(span.span_id)
                found.append(
                    CascadeSample(
                        sample_id=sample.sample_id, task=task, arm=label, cascade=cascade.value,
                        affected=thread.says(asked, right)[0], leaked=thread.says(asked, hit[0].answer)[0],
                        unaffected=mean(float(thread.says(p.question, p.answer)[0]) for p in others),
                        derived=sum(bool(s.record.derived_from) for s in plan.spans),
                        quote_found=any(s.record.span.message == quote for s in plan.spans),
                    )
                )  # fmt: skip
                thread.close()
        yield found


def told(sample: CorpusSample, probe: Probe) -> CorpusSample:
    """Return a trace in which a probe was asked and answered already, and the talk went on."""
    turns = (
        Message("user", probe.question),
        Message("assistant", probe.answer),
        Message("user", "Thank you."),
        Message("assistant", "All right."),
    )
    return replace(sample, messages=(*sample.messages, *turns))
