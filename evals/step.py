"""A whole agent step of the embedded engine, by stages: how much of it is not the model, and what a session adds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from kv_retract import session, streaming
from kv_retract.bookkeeping import Bookkeeper
from kv_retract.cache.manager import CacheManager
from kv_retract.cache.pool import PagedKVPool
from kv_retract.engine.sampling import Sampler
from kv_retract.engine.working import ModelRunner, WorkingSet
from kv_retract.events import Observers
from kv_retract.ledger.render import Renderer
from kv_retract.ledger.segments import Encoder
from kv_retract.policies.asking import Asker
from kv_retract.session import KVRetractSession
from kv_retract.threads import ThreadTable
from kv_retract.types import Message, SamplingParams, ToolCall

from .arms import clock
from .bench import check_positions
from .machine import describe_machine, versions
from .overhead import WATCHED, measure_overhead, watched_session
from .progress import Progress, silent
from .stages import REST, Stages
from .stats import median

if TYPE_CHECKING:
    import torch

    from kv_retract.engine.hf import HFEngine
    from kv_retract.training.samples import CorpusSample

ROOM = 512
"""Tokens kept free behind the longest thread, for the new messages and the answer."""
MODEL = "model"
"""The stage of the model's own forward passes."""
STAGES: Mapping[str, Sequence[tuple[Any, str]]] = {
    "template": [(Renderer, "_apply")],
    "tokenisation": [(Encoder, "encode")],
    "rendering": [(Renderer, "render")],
    "thread view": [(session, "view_thread"), (session, "standing"), (session, "context_of")],
    "policies": [(Asker, "ask")],
    "planner": [(session, "plan_for")],
    "bookkeeping": [
        (Observers, "tell"), (Bookkeeper, "set_status"), (ThreadTable, "remember"), (KVRetractSession, "_offer"),
    ],
    "match": [(CacheManager, "match"), (CacheManager, "lease")],
    "gather": [(WorkingSet, "__init__")],
    "call of the model": [(ModelRunner, "forward")],
    "cache writes": [
        (PagedKVPool, "write"), (CacheManager, "append"), (CacheManager, "publish"), (CacheManager, "release"),
    ],
    "sampling": [(Sampler, "__init__"), (Sampler, "sample")],
    "text": [(streaming.TextStream, "push"), (streaming.TextStream, "finish"), (Renderer, "decode")],
}  # fmt: skip
"""Stage to the functions that make it up; what one calls in another stage counts there. `rest` is what is left."""
_THREAD = "t"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBench:
    """What to time."""

    contexts: tuple[int, ...] = (1024, 8192, 32_000)
    """Tokens of the thread before the step, about."""
    overhead_context: int = 4096
    new_characters: int = 300
    """Length of the tool result that the step reads: about 100 tokens."""
    answer: int = 32
    """Tokens that every step decodes."""
    model: str = "reference"
    repeats: int = 15
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


def bench_step(settings: StepBench, *, progress: Progress = silent) -> dict[str, Any]:
    """Time ordinary steps; return one JSON-able document.

    Every repetition is the next step of one long thread whose beginning is cached: a tool result that is new, an
    answer of a fixed length, nothing to retract; through a session with every built-in detector, a ledger file, an
    audit log and healing. For each length `rows`: medians of the step (`step_ms`) and of its stages (`stages_ms`,
    `shares`), each stage without what it calls in others, and `not_model_share`, 1 - model / step. `growth`: of what
    is not the model, from the shortest thread to the longest. `overhead`: a step of one token with a session against
    rendering and engine alone, with all detectors and with none; within the bound of 2 ms + 1 % or not.

    Raises:
        BenchSettingError: a thread does not fit into the model.
        UnsupportedModelError: the model has no such name, or cannot be edited.
    """
    from kv_retract.engine.hf import HFEngine
    from kv_retract.engine.models import load_model

    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.seed)
    longest = max((*settings.contexts, settings.overhead_context))
    check_positions(loaded, longest + ROOM)
    engine = HFEngine(loaded.model, max_tokens=2 * longest + (settings.repeats + 4) * ROOM, name=loaded.name)
    total = len(settings.contexts) * (settings.repeats + 1) + 2
    rows = []
    for number, context in enumerate(settings.contexts):
        done = number * (settings.repeats + 1)
        tick = partial(_tick, progress, done, total)
        rows.append(_row(settings, engine, loaded.model, loaded.tokenizer, context, tick))
    overhead = {}
    sample = thread_of(loaded.tokenizer, settings.overhead_context, settings.seed)
    for number, (name, policies) in enumerate({"all detectors": WATCHED, "no detectors": ()}.items()):
        cost = measure_overhead(engine, loaded.tokenizer, sample, 2 * settings.repeats, policies=policies)
        bound = 2 + cost["bare_ms"] / 100
        overhead[name] = {**cost, "bound_ms": bound, "within": cost["overhead_ms"] < bound}
        progress(total - 1 + number, total)
    return {
        **asdict(settings), "rows": rows, "growth": _growth(rows), "overhead": overhead,
        "num_parameters": loaded.model.num_parameters(), "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device), "versions": versions(),
    }  # fmt: skip


def thread_of(tokenizer: Any, tokens: int, seed: int) -> CorpusSample:
    """Return a thread of the corpus that is about so many tokens long for this tokenizer."""
    from kv_retract.training.corpus import generate

    renderer, length = Renderer(tokenizer), tokens
    for _ in range(8):
        sample = generate("facts", seed=seed, length=length, split="test")
        found = len(renderer.render(sample.messages, tools=sample.tools).ids)
        if 0.97 * tokens <= found <= tokens:
            break
        length = max(64, int(length * 0.985 * tokens / found))
    return sample


def _row(
    settings: StepBench, engine: HFEngine, model: torch.nn.Module, tokenizer: Any, context: int, tick: Progress
) -> dict[str, Any]:
    sample = thread_of(tokenizer, context, settings.seed)
    never = _without(engine.spec.vocab_size, Renderer(tokenizer).stop_token_ids, settings.device)
    sampling = SamplingParams(max_tokens=settings.answer)
    # Other devices are waited for at both ends of a stage.
    stages = Stages(time.perf_counter if settings.device == "cpu" else partial(clock, settings.device))
    seen: list[dict[str, float]] = []
    with watched_session(engine, tokenizer, extra_key=f"step {context}") as asked:
        engine.extend(asked.key(_THREAD, sample.messages, tools=sample.tools, add_generation_prompt=False))
        for repeat in range(settings.repeats + 1):
            messages = [*sample.messages, *_next(repeat, settings.new_characters)]
            with stages.watching(STAGES, model, MODEL), stages.measuring() as found:
                result = asked.step(_THREAD, messages, tools=sample.tools, sampling=sampling, logits_processor=never)
            assert result.num_completion_tokens == settings.answer, "nothing ends the answer"
            assert result.num_cached_tokens > context // 2, "the thread is cached"
            if repeat:  # the first one warms up
                seen.append({stage: 1e3 * seconds for stage, seconds in found.items()})
            tick(repeat + 1, None)
        assert not asked.history(_THREAD), "there was nothing to retract"
        engine.purge(asked.key(_THREAD, sample.messages, tools=sample.tools), 0)
    return {"context": context, "tokens": result.num_prompt_tokens, "messages": len(messages), **_summary(seen)}


def _next(number: int, characters: int) -> list[Message]:
    """Return a call and its result, the same in length and different in content every time."""
    call = ToolCall(id=f"call-{number}", name="look_up", arguments=f'{{"record": "R-{number:04d}"}}')
    lines = (f"Line {line}: part {number:04d}-{line:03d}, two pieces, shelf {line % 9}." for line in range(characters))
    text = "\n".join(line for line, _ in zip(lines, range(characters // 48 + 1), strict=False))[:characters]
    return [
        Message("user", f"Please look up record R-{number:04d}."),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", text, tool_call_id=call.id, name=call.name),
    ]


def _without(vocab_size: int, ids: Sequence[int], device: str) -> Any:
    """Return a processor of logits that lets none of `ids` be drawn, so that every answer has the same length."""
    import torch

    forbidden = torch.zeros(vocab_size, device=device)
    forbidden[list(ids)] = -torch.inf
    return lambda _, logits: logits.add_(forbidden)


def _summary(seen: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    steps = [sum(stages.values()) for stages in seen]
    names = (MODEL, *STAGES, REST)
    step_ms = median(steps)
    shares = {
        name: median(stages.get(name, 0.0) / step for stages, step in zip(seen, steps, strict=True)) for name in names
    }
    other = [step - stages[MODEL] for stages, step in zip(seen, steps, strict=True)]
    return {
        "n": len(seen),
        "step_ms": step_ms,
        "not_model_ms": median(other),
        "not_model_share": median(part / step for part, step in zip(other, steps, strict=True)),
        "stages_ms": {name: median(stages.get(name, 0.0) for stages in seen) for name in names},
        "shares": shares,
    }


def _growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how many times as long the longest thread is, and how many times as much what is not the model takes."""
    first, last = min(rows, key=lambda row: row["tokens"]), max(rows, key=lambda row: row["tokens"])
    return {name: last[name] / first[name] for name in ("tokens", "not_model_ms", "step_ms")}


def _tick(progress: Progress, before: int, total: int, done: int, _: int | None) -> None:
    progress(before + done, total)
