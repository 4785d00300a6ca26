"""Measure a chat model on the corpus: does it read its context, and is a stale cache a problem on it?

Every sample loses one span. Probes that the span affects tell accuracy and leak; the others, and the trace that never
had the span, tell whether the model reads at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kv_retract.erasers import ERASERS
from kv_retract.ledger.render import Renderer
from kv_retract.planner import Planner
from kv_retract.session import KVRetractSession
from kv_retract.types import Message, Retraction, SamplingParams

from .asking import chosen_span
from .jobs import CorpusEval, check_lengths, engine_of, evaluate, families_of, traces
from .progress import Progress, silent
from .stats import mean, standard_error

if TYPE_CHECKING:
    from kv_retract.engine.hf import HFEngine
    from kv_retract.training.samples import CorpusSample, Probe

CLEAN = "clean"
"""The arm, and the kind, of a trace in which the span never was."""
ARMS = (CLEAN, "none", "mask", "recompute")
LENGTHS = (256, 1024, 2048)
MAX_ANSWER = 64
"""Longest answer, in tokens; right ones are shorter."""

COLUMNS = {
    "n": "answers",
    "accuracy": "share of answers that are exactly right, as if the span had never been there",
    "accuracy_se": "its standard error, robust to correlation inside of a trace",
    "leak": "share of answers that are exactly the retracted one; null where it has no meaning",
    "leak_se": "its standard error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceEval(CorpusEval):
    """What to measure."""

    families: tuple[str, ...] = ()
    """None: all that the split has; the held-out one is in `test` only."""
    lengths: tuple[int, ...] = LENGTHS
    n: int = 24
    """Traces per family and length."""
    max_probes: int = 4
    """Probes per trace: at least one that the span affects, then others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of one arm."""

    sample_id: str
    family: str
    length: int
    kind: str
    arm: str
    affected: bool
    question: str
    expected: str
    retracted: str
    """What the model would say with the span in place."""
    given: str

    @property
    def right(self) -> bool:
        """Whether the answer is exactly the expected one."""
        return self.given.strip() == self.expected

    @property
    def leaked(self) -> bool:
        """Whether the answer is exactly the retracted one."""
        return self.affected and self.given.strip() == self.retracted


def eval_reference(settings: ReferenceEval, *, progress: Progress = silent) -> dict[str, Any]:
    """Measure and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`; return the metrics.

    Raises:
        OutputExistsError: the results folder is there already.
        UnknownNameError: the model or a family has no such name.
    """
    families = families_of(settings.families, settings.split)
    check_lengths(settings.model, settings.device, settings.dtype, settings.lengths)
    return evaluate(
        settings,
        _answers_of,
        [(family, length) for family in families for length in settings.lengths],
        about={
            "families": list(families),
            "lengths": list(settings.lengths),
            "max_probes": settings.max_probes,
            "columns": COLUMNS,
        },
        summarise=lambda answers: {"rows": reference_rows(answers)},
        record=lambda answer: {**asdict(answer), "right": answer.right, "leaked": answer.leaked},
        progress=progress,
    )


def _answers_of(settings: ReferenceEval, family: str, length: int) -> Iterator[list[Answer]]:
    """Yield the answers about each trace of a family."""
    engine, renderer = engine_of(settings, 8 * (length + 1024))
    for number, sample in traces(settings, family, length=length):
        yield list(answers_to(sample, number, engine, renderer, length, settings.max_probes))


def answers_to(
    sample: CorpusSample, number: int, engine: HFEngine, renderer: Renderer, length: int, max_probes: int
) -> Iterator[Answer]:
    """Retract one span of a sample under every arm, and ask; `number` chooses the span."""
    span, hit, others = chosen_span(sample, number, max_probes)
    retraction = Retraction(span=span.ref, policy="explicit", reason="of the corpus")
    for arm in ARMS:
        eraser = ERASERS.create("none" if arm == CLEAN else arm)
        session = KVRetractSession(
            engine, renderer, eraser=eraser, planner=Planner(exact_suffix=0, protect_newest_user=False),
            extra_key=f"{arm} {sample.sample_id}",
        )  # fmt: skip
        messages = sample.without(span.span_id) if arm == CLEAN else sample.messages
        if arm != CLEAN:
            engine.extend(session.key("t", messages, tools=sample.tools, add_generation_prompt=False))
            session.retract("t", messages, tools=sample.tools, proposals=[retraction])
        for probe in (*hit, *others):
            yield Answer(
                sample_id=sample.sample_id,
                family=sample.family,
                length=length,
                kind=CLEAN if arm == CLEAN else span.kind,
                arm=arm,
                affected=span.span_id in probe.without,
                question=probe.question,
                expected=probe.answer_without(span.span_id),
                retracted=probe.answer,
                given=_ask(session, messages, sample, probe),
            )
        engine.drop(session.key("t", messages, tools=sample.tools), 0)


def reference_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Summarise answers: one row per family, kind, length and arm; all probes where `clean`, else the affected ones."""
    groups: dict[tuple[str, str, int, str], list[Answer]] = {}
    for answer in answers:
        if answer.arm == CLEAN or answer.affected:
            groups.setdefault((answer.family, answer.kind, answer.length, answer.arm), []).append(answer)
    rows = []
    for (family, kind, length, arm), group in sorted(groups.items(), key=lambda g: (*g[0][:3], ARMS.index(g[0][3]))):
        traces = [a.sample_id for a in group]
        right, leaked = [float(a.right) for a in group], [float(a.leaked) for a in group]
        rows.append(
            {
                "family": family, "kind": kind, "length": length, "arm": arm, "n": len(group),
                "accuracy": mean(right), "accuracy_se": standard_error(right, traces),
                "leak": None if arm == CLEAN else mean(leaked),
                "leak_se": None if arm == CLEAN else standard_error(leaked, traces),
            }
        )  # fmt: skip
    return rows


def _ask(session: KVRetractSession, messages: Sequence[Message], sample: CorpusSample, probe: Probe) -> str:
    asked = [*messages, Message("user", probe.question)]
    sampling = SamplingParams(max_tokens=MAX_ANSWER)
    return session.step("t", asked, tools=sample.tools, sampling=sampling).message.content
