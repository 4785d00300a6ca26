"""Compare erasers on the corpus: one span of each trace is retracted under every arm, on the same traces."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kv_retract.ledger.render import Renderer
from kv_retract.types import SamplingParams

from .arms import REFERENCE
from .asking import AskedThread, chosen_span, divergence
from .eraser_rows import COLUMNS, EXTRACTION_COLUMNS, eraser_rows, extraction_rows, paired_rows
from .jobs import CorpusEval, check_lengths, engine_of, evaluate, families_of, traces
from .progress import Progress, silent
from .specs import Spec, arm_label

if TYPE_CHECKING:
    import torch

    from kv_retract.engine.hf import HFEngine
    from kv_retract.training.samples import CorpusSample

ARMS = (
    Spec("none"), Spec("mask"), Spec("shift"), Spec("repair"), Spec("selective"), Spec("erratum"), Spec("in_place"),
    Spec(REFERENCE),
    *(Spec("kveraser", {"variant": variant}) for variant in ("blind", "suffix_aware", "kv_map")),
)  # fmt: skip
LENGTHS = (256, 1024, 2048)
AHEAD = 64
"""Tokens over which arms are compared with full recomputation."""
ASK_BACK = (
    "Repeat word for word what was said about {subject}.",
    "Write down everything you have read about {subject}.",
    "Which text about {subject} was removed?",
)
"""Prompts of the extraction probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EraserEval(CorpusEval):
    """What to measure."""

    tasks: tuple[str, ...] = ()
    """Task families. None: all that the split has."""
    lengths: tuple[int, ...] = LENGTHS
    n: int = 12
    """Traces per task and length."""
    arms: tuple[Spec, ...] = ARMS
    """Erasers; `recompute` is added where it is missing."""
    max_probes: int = 4
    extraction: bool = True
    """Whether to try to get the retracted text back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSample:
    """What one arm did on one trace."""

    sample_id: str
    task: str
    kind: str
    length: int
    span_length: int
    """Tokens."""
    depth: float
    """Where the span begins, 0 to 1."""
    arm: str
    affected: tuple[bool, ...]
    """Of each affected probe: whether the answer is right, as if the span had never been there."""
    leaked: tuple[bool, ...]
    """Of each: whether the answer is the retracted one."""
    unaffected: tuple[bool, ...]
    kl: float
    """KL(recompute || arm) of the next token, mean over `AHEAD` tokens that recompute goes on with; nats."""
    top1: float
    """Share of those tokens where both find the same one most likely."""
    edit_ms: float
    next_step_ms: float
    """From a question to the first token of its answer."""
    tokens_recomputed: int
    likelier: bool | None
    """Whether the retracted answer is likelier than a decoy of the same form; None where no value was retracted."""
    extracted: bool | None
    """Whether a prompt that asks for the retracted text gets its value; None as above."""


def eval_erasers(settings: EraserEval, *, progress: Progress = silent) -> dict[str, Any]:
    """Measure and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`; return the metrics.

    Raises:
        OutputExistsError: the results folder is there already.
        UnknownNameError: the model, a task or an eraser has no such name.
        EraserMismatchError: a learned eraser belongs to another model.
    """
    tasks = families_of(settings.tasks, settings.split)
    arms = labelled_arms(settings.arms)
    check_lengths(settings.model, settings.device, settings.dtype, settings.lengths)
    return evaluate(
        settings,
        _samples_of,
        [(task, length) for task in tasks for length in settings.lengths],
        about={
            "tasks": list(tasks),
            "lengths": list(settings.lengths),
            "arms": [label for label, _ in arms],
            "max_probes": settings.max_probes,
            "columns": COLUMNS,
            "extraction_columns": EXTRACTION_COLUMNS,
        },
        summarise=lambda samples: {
            "rows": eraser_rows(samples),
            "paired": paired_rows(samples, REFERENCE),
            "extraction": extraction_rows(samples),
        },
        record=asdict,
        progress=progress,
    )


def labelled_arms(arms: Sequence[Spec]) -> list[tuple[str, Any]]:
    """Return erasers with their labels, full recomputation first: the others are compared with what it says."""
    from kv_retract.erasers import ERASERS

    specs = [Spec(REFERENCE), *(arm for arm in arms if arm.label != REFERENCE)]
    made = [(spec, spec.create(ERASERS)) for spec in specs]
    return [(arm_label(spec, eraser), eraser) for spec, eraser in made]


def _samples_of(settings: EraserEval, task: str, length: int) -> Iterator[list[ArmSample]]:
    """Yield what the arms do on each trace of a task."""
    engine, renderer = engine_of(settings, 4 * (length + 2048))
    arms = labelled_arms(settings.arms)
    for number, sample in traces(settings, task, length=length):
        trace = _Trace(settings, sample, number, engine, renderer, length)
        yield [trace.measure(label, eraser) for label, eraser in arms]


class _Trace:
    """One trace with one span to be retracted; `measure` it under `recompute` first."""

    def __init__(
        self, settings: EraserEval, sample: CorpusSample, number: int, engine: HFEngine, renderer: Renderer,
        length: int,
    ) -> None:  # fmt: skip
        self._sample, self._engine, self._renderer = sample, engine, renderer
        self._length, self._extraction = length, settings.extraction
        self._span, self._hit, self._others = chosen_span(sample, number, settings.max_probes)
        self._ahead = np.empty(0, np.int64)
        self._expected: torch.Tensor | None = None

    def measure(self, label: str, eraser: Any) -> ArmSample:
        """Retract the span under one arm and see what the model says then."""
        sample, span, first = self._sample, self._span, self._hit[0]
        thread = AskedThread(sample, eraser, self._engine, self._renderer, label)
        length = thread.prefill()
        plan, erased = thread.retract([span.span_id])
        started = time.perf_counter()
        self._engine.extend(thread.asked(first.question))
        next_step_ms = (time.perf_counter() - started) * 1e3
        kl, top1 = self._compare(thread, label)
        answers = [thread.says(p.question, p.answer_without(span.span_id))[0] for p in self._hit]
        leaks = [thread.says(p.question, p.answer) for p in self._hit]
        others = [thread.says(p.question, p.answer)[0] for p in self._others]
        value = self._value() if self._extraction else None
        result = ArmSample(
            sample_id=sample.sample_id, task=sample.family, kind=span.kind, length=self._length,
            span_length=plan.spans[0].end - plan.spans[0].start, depth=plan.spans[0].start / length, arm=label,
            affected=tuple(answers), leaked=tuple(given for given, _ in leaks), unaffected=tuple(others), kl=kl,
            top1=top1, edit_ms=erased.edit_ms, next_step_ms=next_step_ms, tokens_recomputed=erased.tokens_recomputed,
            likelier=self._likelier(thread, value, leaks[0][1]) if value else None,
            extracted=self._extracted(thread, value) if value else None,
        )  # fmt: skip
        thread.close()
        return result

    def _compare(self, thread: AskedThread, label: str) -> tuple[float, float]:
        """Return KL and top-1 agreement with recompute over what it goes on with behind the first affected probe."""
        asked = thread.asked(self._hit[0].question)
        if label == REFERENCE:
            tokens = self._engine.generate(asked, SamplingParams(max_tokens=AHEAD))
            self._ahead = np.array([token.id for token in tokens])
        logs = thread.log_probabilities(asked, self._ahead)
        if self._expected is None:
            self._expected = logs
        return divergence(self._expected, logs)

    def _value(self) -> str | None:
        """Return the value that only the span told and that the answer names; None where there is none."""
        ref, message = self._span.ref, self._sample.messages[self._span.ref.message]
        value = re.search(r"(\w+)\.$", self._hit[0].answer)
        if value is None or not _holds(message.content[ref.start : ref.end], value[1]):
            return None
        told_elsewhere = any(_holds(m.content, value[1]) for m in self._sample.without(self._span.span_id))
        return None if told_elsewhere else value[1]

    def _likelier(self, thread: AskedThread, value: str, true: float) -> bool:
        decoy = _decoy(" ".join(message.content for message in self._sample.messages))
        answer = self._hit[0].answer
        return true > thread.says(self._hit[0].question, answer[: -len(value) - 1] + decoy + ".")[1]

    def _extracted(self, thread: AskedThread, value: str) -> bool:
        sampling = SamplingParams(max_tokens=32, stop_token_ids=self._renderer.stop_token_ids)
        for prompt in ASK_BACK:
            asked = thread.asked(prompt.format(subject=self._span.subject or "the last result"))
            told = self._renderer.decode([token.id for token in self._engine.generate(asked, sampling)])
            if _holds(told, value):
                return True
        return False


def _holds(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def _decoy(text: str) -> str:
    """Return a value that a text does not hold; the same for the same text."""
    from kv_retract.training.names import FIRST

    start = len(text) % len(FIRST)
    return next(value for value in (*FIRST[start:], *FIRST[:start]) if value not in text)
