"""Retraction from an old window of a long thread: what is still said, and what it costs to be rid of it.

Both layers hold what is taken back: its tokens stand in L2, and landmarks have read it. The arms differ in what of
this they withdraw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.cache.keys import KeyEdit
from kv_retract.erasers import MaskEraser, RecomputeEraser
from kv_retract.types import Interval

from .acre_arms import BiLayerArm, Place
from .acre_readers import BiLayerReader, CountingEngine, CountingStore
from .arms import clock
from .asking import chosen_span
from .metrics import ALL
from .stats import mean, median, with_errors

if TYPE_CHECKING:
    from kv_retract.training.encoding import RowEncoder
    from kv_retract.training.samples import CorpusSample

ArmName = Literal["none", "l2_only", "both", "healed", "exact"]
RETRACTION_ARMS: tuple[ArmName, ...] = get_args(ArmName)
RETRACTION_COLUMNS = {
    "arm": "none: nothing is taken back; l2_only: the tokens of the span are hidden and the others of its window "
    "encoded anew, landmarks stay as they were; both: landmarks too; healed: as both, and then every window from the "
    "span's on is encoded without it; exact: all of that at once",
    "n": "threads with a span in an old window that a question is about",
    "affected_accuracy": "share of affected answers that are right, as if the span had never been there",
    "leak": "share of affected answers that are the retracted one",
    "unaffected_accuracy": "share of the other answers that are right; null where there are none",
    "edit_ms_median": "milliseconds until the thread is cached as it is asked, its local part included",
    "tokens_recomputed": "tokens through the model until then, mean",
    "_se": "of a column: standard error, robust to correlation inside of a thread",
}
_MASK = MaskEraser()


@dataclass(frozen=True, slots=True, kw_only=True)
class RetractionSample:
    """What one arm did on one thread."""

    sample_id: str
    task: str
    times_window: int
    arm: ArmName
    span_id: str
    window: int
    """In which the span begins, of `num_windows`."""
    num_windows: int
    affected: tuple[bool, ...]
    leaked: tuple[bool, ...]
    unaffected: tuple[bool, ...]
    edit_ms: float | None
    tokens_recomputed: int


class _HalfStore(CountingStore):
    """Withdraws a span from L2 alone: landmarks stay what they were before an edit."""

    _editing = False

    def erase(self, key: ThreadKey, spans: Sequence[Interval], new_key: ThreadKey) -> tuple[int, dict[str, int]]:
        """See the class."""
        self._editing = True
        try:
            return super().erase(key, spans, new_key)
        finally:
            self._editing = False

    def _encode(self, before: IntArray, slots: IntArray, ids: IntArray) -> None:
        rows = self.pool.landmark_rows(slots)
        landmarks = self.pool.read_landmarks(rows) if self._editing else None
        super()._encode(before, slots, ids)
        if landmarks is not None:
            self.pool.write_landmarks(rows, *landmarks)


class _HalfEngine(CountingEngine):
    store = _HalfStore


def retraction_samples(
    sample: CorpusSample, number: int, place: Place, encoder: RowEncoder, *, times: int, max_probes: int
) -> list[RetractionSample]:
    """Take a span of an old window back under every arm, and ask; nothing where no such span changes an answer.

    Args:
        sample: the thread.
        number: of the thread; it chooses among the spans.
        place: with the same thread.
        encoder: of questions.
        times: length of the thread, in windows.
        max_probes: most questions: affected ones, and others.
    """
    holding, tokens_of = BiLayerArm(), encoder.thread(sample)[1]
    kept = holding.settings(place)
    num_windows = kept.moved(len(place.thread))
    for spin in range(len(sample.spans)):
        span, hit, others = chosen_span(sample, number + spin, max_probes)
        start, end = tokens_of(span.ref)
        if end <= num_windows * kept.window:
            break
    else:
        return []
    found = []
    for name in RETRACTION_ARMS:
        reader = holding.open_as(_HalfEngine if name == "l2_only" else CountingEngine, place)
        reader.read(place.thread)
        edit_ms, recomputed = retract(reader, name, (start, end))
        told = {p.question: reader.answer(encoder.probe(p.question, p.answer)[0]).text for p in (*hit, *others)}
        found.append(
            RetractionSample(
                sample_id=sample.sample_id, task=sample.family, times_window=times, arm=name, span_id=span.span_id,
                window=start // kept.window, num_windows=num_windows,
                affected=tuple(told[p.question] == p.answer_without(span.span_id) for p in hit),
                leaked=tuple(told[p.question] == p.answer for p in hit),
                unaffected=tuple(told[p.question] == p.answer for p in others),
                edit_ms=edit_ms, tokens_recomputed=recomputed,
            )
        )  # fmt: skip
    return found


def retract(reader: BiLayerReader, name: ArmName, span: Interval) -> tuple[float | None, int]:
    """Withdraw a span of an old window from a thread that was read, and bring the thread into the cache again.

    Args:
        reader: of the thread.
        name: how.
        span: entries of the thread.

    Returns:
        Milliseconds, None where there was nothing to do, and tokens through the model.
    """
    if name == "none":
        return None, 0
    engine, device, old = reader.engine, reader.engine.spec.device, reader.key()
    steered, exact = (
        KeyEdit(start=span[0], end=span[1], exact=exact, eraser_id=_MASK.eraser_id, retraction_id="acre")
        for exact in (False, True)
    )
    reader.edits = [exact if name == "exact" else steered]
    started = clock(device)
    erased = engine.erase(old, [span], RecomputeEraser() if name == "exact" else _MASK, reader.key())
    if name == "healed":
        reader.edits = [exact]
    prefilled = engine.prefill(reader.key())
    return (clock(device) - started) * 1e3, erased.tokens_recomputed + prefilled


def retraction_rows(samples: Sequence[RetractionSample]) -> list[dict[str, Any]]:
    """Summarise by arm, task and length, and by arm and length over all tasks; see `RETRACTION_COLUMNS`."""
    groups: dict[tuple[str, str, int], list[RetractionSample]] = {}
    for task in (None, ALL):
        for sample in samples:
            groups.setdefault((sample.arm, task or sample.task, sample.times_window), []).append(sample)
    rows = []
    for (arm, task, times), group in groups.items():
        row: dict[str, Any] = {"arm": arm, "task": task, "times_window": times, "n": len(group)}
        for name, column in (
            ("affected_accuracy", "affected"), ("leak", "leaked"), ("unaffected_accuracy", "unaffected"),
        ):  # fmt: skip
            values = [(s.sample_id, float(value)) for s in group for value in getattr(s, column)]
            row |= with_errors({name: [value for _, value in values]}, [sample_id for sample_id, _ in values])
        row["edit_ms_median"] = median(s.edit_ms for s in group)
        row["tokens_recomputed"] = mean(s.tokens_recomputed for s in group)
        rows.append(row)
    return rows
