"""Steer now, heal later, timed: the next token and its divergence, and what a session costs an ordinary step."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kv_retract.cache.keys import build_key
from kv_retract.erasers import ERASERS, Eraser
from kv_retract.events import Event, Healed, Observer
from kv_retract.healing import Healing
from kv_retract.ledger.render import Renderer
from kv_retract.planner import Planner
from kv_retract.policies.base import PolicyContext, RetractionPolicy
from kv_retract.session import KVRetractSession
from kv_retract.types import Divergence, Message, Retraction, SamplingParams

from .bench import check_positions
from .machine import describe_machine, versions
from .overhead import measure_overhead
from .progress import Progress, silent
from .stats import median

if TYPE_CHECKING:
    from kv_retract.engine.hf import HFEngine
    from kv_retract.training.samples import CorpusSample

ARMS = ("off", "on", "busy")
"""No healing; healing of the thread itself; and with other threads that are being healed when the step comes."""
OTHERS = 3
"""Threads that are being healed in the arm `busy`."""
_THREAD = "t"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealBench:
    """What to time."""

    contexts: tuple[int, ...] = (1024, 4096)
    """Tokens of the thread, about."""
    overhead_context: int = 4096
    model: str = "reference"
    eraser: str = "kveraser"
    repeats: int = 15
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(kw_only=True)
class _Finds(RetractionPolicy):
    """Finds one span once the thread has grown past it."""

    name = "finds"

    retraction: Retraction
    grown: int

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the span, from a number of messages on."""
        return [self.retraction] if len(ctx.messages) > self.grown else []


class _Heals(Observer):
    """Keeps what the healer did."""

    def __init__(self) -> None:
        self.healed: list[Healed] = []

    def on_event(self, event: Event) -> None:
        """Keep it."""
        if isinstance(event, Healed):
            self.healed.append(event)


def bench_heal(settings: HealBench, *, progress: Progress = silent) -> dict[str, Any]:
    """Time healing; return one JSON-able document.

    For each length `rows`: the time from the beginning of the step in which a policy finds the span to the next token
    (`first_token_ms`, medians, by arm; the arms turn with every repetition), and as `ratio` over that without healing,
    pair by pair; how long until a thread was exact (`healed_ms`) and the tokens that took; divergence of the steered
    and of the healed cache from a fresh prefill without the span. `overhead`: a step with one new message and nothing
    to retract, through a session with every built-in detector, a ledger file, an audit log and healing, and without
    one (rendering and engine only).

    Raises:
        BenchSettingError: a thread does not fit into the model.
        UnknownNameError: the model or the eraser has no such name.
    """
    from kv_retract.engine.hf import HFEngine
    from kv_retract.engine.models import load_model

    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.seed)
    eraser = ERASERS.create(settings.eraser)
    longest = max((*settings.contexts, settings.overhead_context))
    check_positions(loaded, longest)
    engine = HFEngine(loaded.model, max_tokens=(2 * OTHERS + 6) * (longest + 512), name=loaded.name)
    total = len(settings.contexts) * (settings.repeats + 1) + 1
    rows: list[dict[str, Any]] = []
    for number, context in enumerate(settings.contexts):
        done = number * (settings.repeats + 1)
        rows.append(
            _row(settings, eraser, engine, loaded.tokenizer, context, lambda n, at=done: progress(at + n, total))
        )
    overhead = measure_overhead(
        engine, loaded.tokenizer, _sample(settings.seed, settings.overhead_context), 2 * settings.repeats, eraser=eraser
    )
    progress(total, total)
    return {
        **asdict(settings), "rows": rows, "overhead": overhead,
        "num_parameters": loaded.model.num_parameters(), "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device), "versions": versions(),
    }  # fmt: skip


def _row(
    settings: HealBench, eraser: Eraser, engine: HFEngine, tokenizer: Any, context: int, tick: Any
) -> dict[str, Any]:
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    heals: list[Healed] = []
    after: list[Divergence] = []
    renderer = Renderer(tokenizer)
    for repeat in range(settings.repeats + 1):  # the first one warms up
        sample = _sample(settings.seed + repeat, context)
        turn = repeat % len(ARMS)
        for arm in ARMS[turn:] + ARMS[:turn]:
            first_ms, healed, left = _step(eraser, engine, renderer, sample, f"{context} {repeat} {arm}", arm)
            if repeat:
                times[arm].append(first_ms)
            if repeat and healed is not None and left is not None:
                heals.append(healed)
                after.append(left)
        tick(repeat + 1)
    before = [healed.divergence for healed in heals if healed.divergence is not None]
    return {
        "context": context,
        "first_token_ms": {arm: median(values) for arm, values in times.items()},
        "ratio": {
            arm: median(v / off for v, off in zip(values, times["off"], strict=True)) for arm, values in times.items()
        },
        "n": settings.repeats,
        "healed_ms": median(healed.waited_s * 1e3 for healed in heals),
        "healed_tokens": median(healed.tokens for healed in heals),
        "kl_steered": median(d.kl for d in before),
        "top1_steered": median(d.top1 for d in before),
        "kl_healed_max": max((d.kl for d in after), default=None),
        "top1_healed_min": min((d.top1 for d in after), default=None),
    }


def _step(
    eraser: Eraser, engine: HFEngine, renderer: Renderer, sample: CorpusSample, name: str, arm: str
) -> tuple[float, Healed | None, Divergence | None]:
    """Return the time to the next token after a detection, and what healing did where the arm heals."""
    span = sample.spans[0]
    proposal = Retraction(span=span.ref, policy="finds", reason="of the corpus")
    messages = [*sample.messages, Message("user", "Thank you."), Message("assistant", "You are welcome.")]
    heals = _Heals()
    session = KVRetractSession(
        engine, renderer, eraser=eraser, extra_key=name, planner=Planner(exact_suffix=0),
        policies=[_Finds(retraction=proposal, grown=len(messages))],
        healing=None if arm == "off" else Healing(), observers=[heals],
    )  # fmt: skip
    with session:
        engine.extend(session.key(_THREAD, messages, tools=sample.tools, add_generation_prompt=False))
        if arm == "busy":
            for other in range(OTHERS):
                _steer_other(session, sample, f"other {other}", proposal)
        asked = [*messages, Message("user", sample.probes[0].question)]
        started = time.perf_counter()
        stream = session.stream(_THREAD, asked, tools=sample.tools, sampling=SamplingParams(max_tokens=8))
        next(stream)
        first_ms = (time.perf_counter() - started) * 1e3
        for _ in stream:
            pass
        if arm != "on":
            session.healer.close()
            healed, left = None, None
        else:
            session.healer.wait(120)
            healed = heals.healed[-1]
            key = session.key(_THREAD, asked, tools=sample.tools)
            fresh = build_key(key.ids, (), extra_key=f"{name} fresh")
            left = engine.divergence(fresh, key, 1)
            engine.purge(fresh, 0)
        for thread_id in (_THREAD, *(f"other {other}" for other in range(OTHERS))):
            engine.purge(session.key(thread_id, messages, tools=sample.tools), 0)
    return first_ms, healed, left


def _steer_other(session: KVRetractSession, sample: CorpusSample, thread_id: str, proposal: Retraction) -> None:
    first = Message("system", f"{sample.messages[0].content} ({thread_id})")
    messages = [first, *sample.messages[1:], Message("user", "Thank you.")]
    session.engine.extend(session.key(thread_id, messages, tools=sample.tools))  # type: ignore[attr-defined]
    session.retract(thread_id, messages, tools=sample.tools, proposals=[proposal])


def _sample(seed: int, context: int) -> CorpusSample:
    from kv_retract.training.corpus import generate

    return generate("facts", seed=seed, length=context, split="test")
