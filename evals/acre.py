"""Threads of several times the window: what is answered rightly, from how much memory, and how soon.

Every arm (`acre_arms`) reads the same threads of the corpus and answers the same questions, each on the bare thread.
`acre_retraction` takes something back from an old window of them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kv_retract.errors import KVRetractError
from kv_retract.ledger.render import Renderer
from kv_retract.training.rendered import encoder_for

from .acre_arms import LONG_ARMS, BiLayerArm, LongArm, Place
from .acre_questions import OVERVIEW, Question, family_of, long_thread, questions_of
from .acre_readers import MAX_ANSWER, Answer, BiLayerReader, LongThread
from .acre_refill import refill_cost
from .acre_retraction import RETRACTION_COLUMNS, RetractionSample, retraction_rows, retraction_samples
from .jobs import CorpusEval, evaluate, families_of, loaded_model, traces
from .metrics import ALL
from .progress import Progress, silent
from .specs import Spec, SpecError
from .stats import mean, median, scored, with_errors

if TYPE_CHECKING:
    from kv_retract.cache.base import IntArray
    from kv_retract.engine.models import LoadedModel

TASKS = ("facts", "relations", "updates", "preferences", "documents", OVERVIEW)
TIMES = (2, 4, 8)
ARMS = (
    Spec("full"), Spec("truncate"), Spec("sinks"), Spec("bm25"), Spec("l1_only"), Spec("pooled"),
    *(Spec("acre", {"ratio": ratio, "refill": 512}) for ratio in (8, 16, 32, 64)),
    *(Spec("acre", {"ratio": ratio, "refill": refill}) for ratio, refill in ((16, 256), (16, 1024), (8, 1024))),
)  # fmt: skip
RETRACTION = "retraction, refill_cost"
"""What the configuration calls the arm by which these are measured: a bi-layer cache of default sizes."""
MIB = 2**20
COLUMNS = {
    "times_window": "length of the thread, over that of a window",
    "ratio": "tokens that a landmark stands for; null where there are none",
    "budget": "most tokens that are brought back for an answer; null where there is no such",
    "n": "threads; 0, and no figures, where the model has not so many positions, or there was no memory",
    "accuracy": "share of answers that are exactly right; in the task overview: that name what is asked for",
    "leak": "share of answers that are right without one of the thread's spans only: the value that a later message "
    "replaced, or half of an answer over two hops; null where there is no such",
    "peak_device_mb": "MiB on the device as questions were answered, most of all threads. On a CPU: keys and values in "
    "the pools, in landmarks and in the working cache, as far as they are in use; with CUDA: all that torch allocated "
    "beside the weights, the reading of the thread included",
    "peak_host_mb": "MiB of keys and values in L2, as far as it is in use, most of all threads",
    "ttft_ms_median": "milliseconds from the question, with the thread cached, to the first token of the answer",
    "tokens_refilled": "tokens that were brought back for an answer, mean; bm25: that were read again",
    "_se": "of a column: standard error, robust to correlation inside of a thread",
    "task": f"{ALL!r}: all but {OVERVIEW}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AcreEval(CorpusEval):
    """What to measure."""

    tasks: tuple[str, ...] = ()
    """Task families, and `overview`. Empty: those of `TASKS` that the split has."""
    times: tuple[int, ...] = TIMES
    """Lengths of threads, in windows."""
    n: int = 8
    """Threads per task and length."""
    arms: tuple[Spec, ...] = ARMS
    window: int = 1024
    """Tokens of a window: of what is encoded together, and of what arms see of the end of a thread."""
    landmarks: str = ""
    """For the arms that do not name some: as in `engine.bilayer.BiLayer`."""
    max_probes: int = 4
    """Questions to a thread, at most."""
    retract: bool = False
    """Whether to take a span of an old window back, too."""
    bench: bool = False
    """Whether to time refilling against encoding anew, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question with what an arm said."""

    question: str
    expected: str
    given: str
    right: bool
    outdated: bool | None
    ttft_ms: float
    tokens_refilled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LongSample:
    """What one arm did on one thread."""

    sample_id: str
    task: str
    times_window: int
    tokens: int
    """Of the thread."""
    arm: str
    ratio: int | None
    budget: int | None
    answers: tuple[Answered, ...]
    """Empty: the arm could not hold the thread, or there was nothing to ask."""
    device_mb: float | None
    host_mb: float | None


def eval_acre(settings: AcreEval, *, progress: Progress = silent) -> dict[str, Any]:
    """Measure and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`; return the metrics.

    `rows`: by arm, task and length, see `COLUMNS`. `retraction`: those of `acre_retraction`, where they are asked for.
    `refill_cost`: as `acre_refill` measures it, where it is asked for.

    Raises:
        OutputExistsError: the results folder is there already.
        UnknownNameError: the model, a task or an arm has no such name.
        SpecError: an arm does not take its parameters, or does not fit to the window or to the model.
        LandmarkMismatchError: landmarks are missing, or belong to another model.
        CorpusError: the split does not exist, or the threads would be shorter than those of the corpus.
    """
    tasks, arms = tasks_of(settings), labelled_arms(settings)
    if settings.retract or settings.bench:
        arms.append(_checked(settings, RETRACTION, BiLayerArm()))
    return evaluate(
        settings,
        _samples_of,
        [(task, times) for task in tasks for times in settings.times],
        about={
            "tasks": list(tasks), "times": list(settings.times), "window": settings.window,
            "arms": [arm.label for arm in arms if arm.label != RETRACTION],
            "landmarks": {arm.label: arm.landmarks for arm in arms if arm.landmarks},
            "max_probes": settings.max_probes, "columns": COLUMNS, "retraction_columns": RETRACTION_COLUMNS,
        },
        summarise=lambda samples: {
            "rows": acre_rows([s for s in samples if isinstance(s, LongSample)]),
            "retraction": retraction_rows([s for s in samples if isinstance(s, RetractionSample)]),
            "refill_cost": _refill_cost(settings) if settings.bench else None,
        },
        record=lambda sample: {"part": "long" if isinstance(sample, LongSample) else "retraction", **asdict(sample)},
        progress=progress,
    )  # fmt: skip


class LabelledArm(NamedTuple):
    """An arm as results show it."""

    label: str
    arm: LongArm
    landmarks: str
    """What made its landmarks; empty where it has none."""


def labelled_arms(settings: AcreEval) -> list[LabelledArm]:
    """Return the arms; labels name the folder of landmarks without the way to it.

    Raises as `eval_acre`: whatever does not fit is told before anything is measured.
    """
    made: dict[str, LabelledArm] = {}
    for spec in settings.arms:
        folder = spec.parameters.get("landmarks")
        label = Spec(spec.name, {**spec.parameters, "landmarks": Path(folder).name}).label if folder else spec.label
        if label in made:
            raise SpecError(f"two arms would be called {label!r}; give the folders of landmarks different names")
        made[label] = _checked(settings, label, spec.create(LONG_ARMS))
    return list(made.values())


def _checked(settings: AcreEval, label: str, arm: LongArm) -> LabelledArm:
    """Open an arm for a thread of one window, to see that it can be."""
    renderer, thread = Renderer(_loaded(settings).tokenizer), LongThread.of(np.zeros(settings.window, np.int64), (), ())
    try:
        reader = arm.open(_place(settings, renderer, thread, MAX_ANSWER))
    except KVRetractError:
        raise
    except ValueError as error:
        raise SpecError(f"arm {label!r} does not fit: {error}") from error
    return LabelledArm(label, arm, reader.engine.landmarks.identity if isinstance(reader, BiLayerReader) else "")


def tasks_of(settings: AcreEval) -> tuple[str, ...]:
    """Return the tasks to do, without those of other splits where none are named.

    Raises:
        UnknownNameError: a task has no such name.
    """
    families = families_of([task for task in settings.tasks if task != OVERVIEW], settings.split)
    return settings.tasks or tuple(task for task in TASKS if task == OVERVIEW or task in families)


def acre_rows(samples: Sequence[LongSample]) -> list[dict[str, Any]]:
    """Summarise by arm, task and length, and by arm and length over all tasks but `overview`; see `COLUMNS`."""
    groups: dict[tuple[str, str, int], list[LongSample]] = {}
    for task in (None, ALL):
        for s in samples:
            if task is None or s.task != OVERVIEW:
                groups.setdefault((s.arm, task or s.task, s.times_window), []).append(s)
    return [
        {"arm": arm, "task": task, "times_window": times, **_row(group)} for (arm, task, times), group in groups.items()
    ]


def _row(group: Sequence[LongSample]) -> dict[str, Any]:
    answers = [(s.sample_id, a) for s in group for a in s.answers]
    columns: dict[str, list[float | None]] = {
        "accuracy": [float(a.right) for _, a in answers],
        "leak": [_float(a.outdated) for _, a in answers],
    }
    return {
        "ratio": group[0].ratio, "budget": group[0].budget, "n": sum(bool(s.answers) for s in group),
        **with_errors(columns, [sample_id for sample_id, _ in answers]),
        "peak_device_mb": max(scored(s.device_mb for s in group), default=None),
        "peak_host_mb": max(scored(s.host_mb for s in group), default=None),
        "ttft_ms_median": median(a.ttft_ms for _, a in answers),
        "tokens_refilled": mean(a.tokens_refilled for _, a in answers),
    }  # fmt: skip


def _float(value: bool | None) -> float | None:
    return None if value is None else float(value)


# -- measuring ------------------------------------------------------------------------------------------------------


def _samples_of(settings: AcreEval, task: str, times: int) -> Iterator[list[LongSample | RetractionSample]]:
    """Yield what the arms do on each thread of a task."""
    loaded, arms = _loaded(settings), labelled_arms(settings)
    renderer, encoder = Renderer(loaded.tokenizer), encoder_for(loaded.tokenizer)
    for number, sample in traces(settings, family_of(task), length=times * settings.window):
        thread, questions = long_thread(sample, encoder, renderer), questions_of(task, sample, settings.max_probes)
        asked = [encoder.probe(question.text, question.right)[0] for question in questions]
        place = _place(settings, renderer, thread, max(map(len, asked), default=0) + MAX_ANSWER)
        found: list[LongSample | RetractionSample] = []
        for label, arm, _ in arms:
            ratio, budget = arm.sizes
            answers, device_mb, host_mb = _measured(arm, place, questions, asked)
            found.append(
                LongSample(
                    sample_id=sample.sample_id, task=task, times_window=times, tokens=len(thread), arm=label,
                    ratio=ratio, budget=budget, answers=answers, device_mb=device_mb, host_mb=host_mb,
                )
            )  # fmt: skip
        if settings.retract and task != OVERVIEW:
            found += retraction_samples(sample, number, place, encoder, times=times, max_probes=settings.max_probes)
        yield found


def _measured(
    arm: LongArm, place: Place, questions: Sequence[Question], asked: Sequence[IntArray]
) -> tuple[tuple[Answered, ...], float | None, float | None]:
    """Return what an arm answers, and MiB on the device and on the host; nothing where it cannot hold the thread."""
    device = place.loaded.model.device
    before = _allocated(device)
    try:
        reader = arm.open(place)
        if reader is None:
            return (), None, None
        reader.read(place.thread)
        answers = [_answered(question, reader.answer(ids)) for question, ids in zip(questions, asked, strict=True)]
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        return (), None, None
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device) - before
    else:
        used = reader.device_bytes
    return tuple(answers), used / MIB, reader.host_bytes / MIB


def _answered(question: Question, answer: Answer) -> Answered:
    return Answered(
        question=question.text, expected=question.right, given=answer.text, right=question.is_right(answer.text),
        outdated=question.is_outdated(answer.text), ttft_ms=answer.ttft_ms, tokens_refilled=answer.tokens_refilled,
    )  # fmt: skip


def _allocated(device: torch.device) -> int:
    """Return the bytes that torch has allocated on a device, and let its peak begin there; 0 but with CUDA."""
    if device.type != "cuda":
        return 0
    gc.collect()  # what an earlier arm held must not go during this one
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _refill_cost(settings: AcreEval) -> dict[str, Any]:
    """Time refilling on the first one of the longest threads, with the landmarks of the settings."""
    renderer, encoder = Renderer(_loaded(settings).tokenizer), encoder_for(_loaded(settings).tokenizer)
    length = max(settings.times) * settings.window
    _, sample = next(traces(settings, family_of(OVERVIEW), length=length))
    return refill_cost(_place(settings, renderer, long_thread(sample, encoder, renderer), MAX_ANSWER))


def _loaded(settings: AcreEval) -> LoadedModel:
    return loaded_model(settings.model, settings.device, settings.dtype)


def _place(settings: AcreEval, renderer: Renderer, thread: LongThread, tail: int) -> Place:
    return Place(
        loaded=_loaded(settings), renderer=renderer, window=settings.window, landmarks=settings.landmarks,
        thread=thread, tail=tail,
    )  # fmt: skip
