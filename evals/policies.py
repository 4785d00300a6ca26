"""How often policies are right: what they propose on threads of which it is known what there is to find.

Labels come from the corpus, whose samples say what replaced what, and from files of labelled threads (`read_labelled`;
`evals/agentdojo_traces.py` writes one). A policy sees the whole thread at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kv_retract.errors import TraceError
from kv_retract.ledger.messages import message_from_openai
from kv_retract.policies import POLICIES
from kv_retract.policies.base import PolicyContext, RetractionPolicy, ask
from kv_retract.spans import check_span
from kv_retract.training.corpus import samples
from kv_retract.training.samples import CorpusSample
from kv_retract.types import Message, SpanRef

from .machine import versions
from .progress import Progress, silent
from .results import results_folder, write_json, write_jsonl
from .specs import Spec
from .stats import with_errors

CORPUS = {
    "user_revoked": ("preferences", "preference"),
    "superseded": ("updates", ""),
    "tool_error": ("errors", "error"),
    "injection": ("injections", "injection"),
}
"""Policy to the family that shows it, and the kind of span to find there; empty: any that was replaced."""
LENGTHS = (256, 1024)

COLUMNS = {
    "threads": "threads with labels for the policy, also those with nothing to find",
    "labels": "spans to find",
    "proposals": "spans that the policy proposed",
    "recall": "share of labels that a proposal overlaps",
    "precision": "share of proposals that overlap a label",
    "exact": "share of found labels whose characters are those of a proposal, white space at their ends aside",
    "_se": "of a column: standard error, robust to correlation inside of a thread",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledThread:
    """A thread, and what there is to find in it."""

    thread_id: str
    source: str
    messages: tuple[Message, ...]
    labels: Mapping[str, tuple[SpanRef, ...]]
    """Policy to the spans that it ought to propose; a policy that is not named here is not judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEval:
    """What to measure."""

    out: Path
    policies: tuple[Spec, ...] = ()
    """Empty: all that something is known of."""
    labelled: tuple[Path, ...] = ()
    """Files of labelled threads, beside the corpus."""
    lengths: tuple[int, ...] = LENGTHS
    """Tokens of the corpus' threads, about."""
    n: int = 50
    """Threads of the corpus per policy and length."""
    split: str = "test"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One policy on one thread."""

    thread_id: str
    source: str
    policy: str
    found: tuple[bool, ...]
    """Per label: does a proposal overlap it?"""
    exact: tuple[bool, ...]
    """Per label that is found."""
    right: tuple[bool, ...]
    """Per proposal: does it overlap a label?"""


def eval_policies(settings: PolicyEval, *, progress: Progress = silent) -> dict[str, Any]:
    """Measure and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`; return the metrics.

    Raises:
        OutputExistsError: the results folder is there already.
        TraceError: a file of labelled threads cannot be read.
        UnknownNameError, SpecError: a policy cannot be made.
        PolicyError: a policy failed.
    """
    specs = settings.policies or tuple(map(Spec, CORPUS))
    policies = {spec.label: spec.create(POLICIES) for spec in specs}
    threads = [*_corpus_threads(settings, [spec.name for spec in specs])]
    threads += [thread for path in settings.labelled for thread in read_labelled(path)]
    judged: list[Judged] = []
    with results_folder(settings.out) as folder:
        for number, thread in enumerate(threads):
            judged += [
                judge(policy, thread, label) for label, policy in policies.items() if policy.name in thread.labels
            ]
            progress(number + 1, len(threads))
        config = {
            "policies": [spec.label for spec in specs], "labelled": [path.name for path in settings.labelled],
            "lengths": list(settings.lengths), "n": settings.n, "split": settings.split, "seed": settings.seed,
            "columns": COLUMNS, "versions": versions(),
        }  # fmt: skip
        metrics = {"config": config, "rows": policy_rows(judged)}
        write_json(folder / "config.json", config)
        write_jsonl(folder / "samples.jsonl", map(asdict, judged))
        write_json(folder / "metrics.json", metrics)
    return metrics


def judge(policy: RetractionPolicy, thread: LabelledThread, label: str) -> Judged:
    """Compare what a policy proposes on a thread with what there is to find; raises PolicyError."""
    proposed = ask(policy, PolicyContext(thread_id=thread.thread_id, messages=thread.messages))
    places = [_place(retraction.span, thread.messages) for retraction in proposed]
    labels = [_place(span, thread.messages) for span in thread.labels[policy.name]]
    overlapping = [[place for place in places if _overlap(place, wanted)] for wanted in labels]
    return Judged(
        thread_id=thread.thread_id, source=thread.source, policy=label,
        found=tuple(bool(hits) for hits in overlapping),
        exact=tuple(wanted in hits for wanted, hits in zip(labels, overlapping, strict=True) if hits),
        right=tuple(any(_overlap(place, wanted) for wanted in labels) for place in places),
    )  # fmt: skip


def policy_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Return one row per policy and source, in the order of their first thread."""
    groups: dict[tuple[str, str], list[Judged]] = {}
    for one in judged:
        groups.setdefault((one.policy, one.source), []).append(one)
    rows = []
    for (policy, source), some in groups.items():
        row: dict[str, Any] = {"policy": policy, "source": source, "threads": len(some)}
        row |= {"labels": sum(len(one.found) for one in some), "proposals": sum(len(one.right) for one in some)}
        for name, values in (("recall", "found"), ("precision", "right"), ("exact", "exact")):
            scores = [(float(value), one.thread_id) for one in some for value in getattr(one, values)]
            row |= with_errors({name: [value for value, _ in scores]}, [cluster for _, cluster in scores])
        rows.append(row)
    return rows


def read_labelled(path: Path) -> Iterator[LabelledThread]:
    """Read labelled threads, one JSON object a line.

    `{"trace_id": ..., "source": ..., "messages": [OpenAI chat messages], "labels": {POLICY: [{"message": 3, "start": 0,
    "end": 12}, ...]}}`. A policy with an empty list is judged on the thread, and ought to find nothing.

    Raises:
        TraceError: a line has another form, or names a place that is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise TraceError(f"cannot read labelled threads from {str(path)!r}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            thread = LabelledThread(
                thread_id=str(data["trace_id"]),
                source=str(data.get("source", path.stem)),
                messages=tuple(message_from_openai(message) for message in data["messages"]),
                labels={
                    policy: tuple(SpanRef(s["message"], start=s["start"], end=s["end"]) for s in spans)
                    for policy, spans in data["labels"].items()
                },
            )
            for span in (span for spans in thread.labels.values() for span in spans):
                check_span(span, thread.messages)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise TraceError(
                f"line {number} of {str(path)!r} is no labelled thread (trace_id, messages, labels): {error!r}"
            ) from error
        yield thread


def _corpus_threads(settings: PolicyEval, policies: Sequence[str]) -> Iterator[LabelledThread]:
    for policy in dict.fromkeys(policies):
        if policy not in CORPUS:
            continue
        family, kind = CORPUS[policy]
        for length in settings.lengths:
            for sample in samples(family, settings.n, seed=settings.seed, length=length, split=settings.split):
                yield LabelledThread(
                    thread_id=f"{sample.sample_id}/{length}", source=f"corpus, {family}", messages=sample.messages,
                    labels={policy: tuple(_to_find(sample, kind))},
                )  # fmt: skip


def _to_find(sample: CorpusSample, kind: str) -> Iterator[SpanRef]:
    """Yield the spans of a kind that a later one on the same subject has replaced; an injection needs none."""
    last = {span.subject: span.ref.message for span in sample.spans}
    for span in sample.spans:
        replaced = span.ref.message < last[span.subject]
        if span.kind == "injection" == kind or (replaced and kind in ("", span.kind)):
            yield span.ref


def _place(span: SpanRef, messages: Sequence[Message]) -> tuple[int, str, int, int, int]:
    """Return where a span lies, white space at its ends left out: message, part, call, start, end."""
    message = messages[span.message]
    text = message.tool_calls[span.call].arguments if span.part == "tool_call" else message.content
    start, end = span.start, len(text) if span.end is None else span.end
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return span.message, span.part, span.call, start, start + len(piece.strip())


def _overlap(a: tuple[int, str, int, int, int], b: tuple[int, str, int, int, int]) -> bool:
    return a[:3] == b[:3] and a[3] < b[4] and b[3] < a[4]
