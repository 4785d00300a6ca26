"""Replay recorded agent threads: what each eraser costs, and how far it is from recomputation. Start here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_retract.errors import KVRetractError, TraceError
from kv_retract.policies import POLICIES
from kv_retract.trace import Trace, TraceProblem, read_traces

from .metrics import COLUMNS, metric_rows
from .progress import Progress, expected_traces, silent
from .results import results_folder, write_json, write_jsonl
from .specs import Spec

if TYPE_CHECKING:
    from kv_retract.engine.models import LoadedModel

    from .arms import Arm
    from .walk import Outcome, Retracted, Sample

SCORE_TOKENS = 64
POOL_TOKENS_PER_ARM = 16_384


class NothingReplayedError(KVRetractError, ValueError):
    """No trace could be replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """What to replay and how."""

    paths: tuple[Path, ...]
    """Files or folders of traces."""
    policies: tuple[Spec, ...]
    arms: tuple[Spec, ...]
    """Erasers. The reference, `recompute`, runs in any case."""
    out: Path
    """Results folder; must not exist, or be empty."""
    model: str = "reference"
    limit: int | None = None
    """Most traces to replay, problems not counted."""
    max_context: int | None = None
    """Longest context of a step, in tokens; None: what the model and the pool allow."""
    pool_tokens: int | None = None
    """Size of the KV pool that the arms share; None: `POOL_TOKENS_PER_ARM` for each."""
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    score_tokens: int = SCORE_TOKENS
    """How many tokens of the next message to compare at most."""


@dataclass(slots=True, kw_only=True)
class ReplayResult:
    """Everything that a replay found."""

    config: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    """Lines and traces that could not be read, or not to their end: `{"source", "message"}`."""
    samples: list[Sample] = field(default_factory=list)
    retracted: list[Retracted] = field(default_factory=list)

    def spans_by_policy(self) -> dict[str, int]:
        """Return how many spans each policy had taken back; one that several agree on counts for each."""
        names = [entry["name"] for entry in self.config["policies"]]
        found = Counter(name for span in self.retracted for name in span.policy.split("+"))
        return {name: found[name] for name in dict.fromkeys(names)}

    def metrics(self) -> dict[str, Any]:
        """Return what `metrics.json` holds."""
        return {
            "config": self.config,
            "rows": self.rows,
            "counts": {**self.counts, "spans_by_policy": self.spans_by_policy()},
            "problems": self.problems,
        }


def replay(settings: ReplaySettings, *, progress: Progress = silent) -> ReplayResult:
    """Replay traces and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`, `report.html`.

    Each step of a trace, the moment before an assistant message, is asked of the policies. Where they retract, every
    arm edits its own copy of the thread and the arms are compared on the trace's next message. Edits accumulate.

    Raises:
        OutputExistsError: the results folder is there already.
        UnknownNameError: a policy, an eraser or the model has no such name.
        NothingReplayedError: no trace could be read and walked.
    """
    from .report import report_html

    with results_folder(settings.out) as folder:
        started = time.perf_counter()
        result = _Replay(settings).run(progress)
        result.config["seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / "config.json", result.config)
        write_jsonl(folder / "samples.jsonl", (asdict(sample) for sample in result.samples))
        write_json(folder / "metrics.json", result.metrics())
        report = report_html(result)
        (folder / "report.html").write_text(report, encoding="utf-8", errors="backslashreplace")
    return result


class _Replay:
    """One run: model, engine and arms, and what is collected."""

    def __init__(self, settings: ReplaySettings) -> None:
        from kv_retract.engine.hf import HFEngine
        from kv_retract.engine.models import load_model
        from kv_retract.ledger.render import Renderer

        from .arms import REFERENCE, Arm
        from .walk import Walker

        self._settings = settings
        policies = [spec.create(POLICIES) for spec in settings.policies]
        specs = [spec for spec in settings.arms if spec.label != REFERENCE] + [Spec(REFERENCE)]
        self._check_erasers(specs)
        loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.seed)
        pool_tokens = settings.pool_tokens or POOL_TOKENS_PER_ARM * len(specs)
        engine = HFEngine(loaded.model, max_tokens=pool_tokens, name=loaded.name)
        renderer = Renderer(loaded.tokenizer)
        self._arms = [Arm(spec, engine, renderer) for spec in specs]
        # All arms hold the thread at once; eviction of one would make it exact and spoil the comparison.
        room = min(engine.spec.max_positions, pool_tokens // len(specs)) - 2 * settings.score_tokens
        max_context = min(room, settings.max_context or room)
        if max_context < 1:
            raise NothingReplayedError(
                f"a pool of {pool_tokens} tokens is too small for {len(specs)} arms; pass a larger --pool-tokens"
            )
        self._walker = Walker(
            self._arms, renderer, policies, max_context=max_context, score_tokens=settings.score_tokens
        )
        self._result = ReplayResult(
            config=_config(settings, loaded, self._arms, max_context=max_context, pool_tokens=pool_tokens)
        )
        self._engine = engine

    def run(self, progress: Progress) -> ReplayResult:
        """Walk the traces one by one."""
        result, settings = self._result, self._settings
        total = expected_traces(settings.paths, settings.limit)
        counts = dict.fromkeys(("traces", "steps", "retractions", "without_retraction", "too_long", "unreadable"), 0)
        for number, trace in enumerate(islice(self._readable(counts), settings.limit)):
            outcome = self._walker.walk(trace, f"{number}-{trace.trace_id}")
            self._collect(trace, outcome, counts)
            progress(number + 1, total)
        self._engine.check_integrity()
        result.counts = counts
        if not counts["traces"]:
            first = f"; the first problem: {result.problems[0]['message']}" if result.problems else ""
            raise NothingReplayedError(f"none of the traces could be replayed ({len(result.problems)} problems){first}")
        names = list(dict.fromkeys(spec.name for spec in settings.policies))
        result.rows = metric_rows(result.samples, [arm.label for arm in self._arms], names)
        return result

    def _readable(self, counts: dict[str, int]) -> Iterator[Trace]:
        for path in self._settings.paths:
            try:
                for found in read_traces(path):
                    if isinstance(found, TraceProblem):
                        counts["unreadable"] += 1
                        self._result.problems.append(asdict(found))
                    else:
                        yield found
            except TraceError as error:
                counts["unreadable"] += 1
                self._result.problems.append({"source": str(path), "message": str(error)})

    def _collect(self, trace: Trace, outcome: Outcome, counts: dict[str, int]) -> None:
        if outcome.problem:
            self._result.problems.append({"source": trace.source, "message": outcome.problem})
        counts["too_long"] += outcome.too_long
        if outcome.num_steps:
            counts["traces"] += 1
            counts["steps"] += outcome.num_steps
            counts["retractions"] += len(outcome.retracted)
            counts["without_retraction"] += not outcome.retracted
        self._result.samples += outcome.samples
        self._result.retracted += outcome.retracted

    @staticmethod
    def _check_erasers(specs: Sequence[Spec]) -> None:
        from kv_retract.erasers import ERASERS

        for spec in specs:  # before a model is loaded, which may take minutes
            spec.create(ERASERS)


def _config(
    settings: ReplaySettings, loaded: LoadedModel, arms: Sequence[Arm], *, max_context: int, pool_tokens: int
) -> dict[str, Any]:
    from .machine import describe_machine, versions

    return {
        "paths": [path.name for path in settings.paths],
        "policies": [{"name": spec.name, "parameters": spec.parameters} for spec in settings.policies],
        "arms": {arm.label: arm.session.eraser.eraser_id for arm in arms},
        "reference": arms[-1].label,
        "model": loaded.name,
        "num_parameters": loaded.model.num_parameters(),
        "random_weights": loaded.is_random,
        "quality_note": loaded.quality_note,
        "seed": settings.seed,
        "device": settings.device,
        "dtype": settings.dtype,
        "limit": settings.limit,
        "max_context": max_context,
        "pool_tokens": pool_tokens,
        "score_tokens": settings.score_tokens,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device),
        "versions": versions(),
        "columns": COLUMNS,
    }
