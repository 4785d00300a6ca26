"""What a session costs an ordinary step: the same next step with a session and without one, in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kv_retract.audit import AuditLog
from kv_retract.cache.keys import build_key
from kv_retract.erasers import Eraser
from kv_retract.healing import Healing
from kv_retract.ledger.render import Renderer
from kv_retract.policies.base import POLICIES
from kv_retract.session import KVRetractSession
from kv_retract.types import Message, SamplingParams

from .stats import median

if TYPE_CHECKING:
    from kv_retract.engine.hf import HFEngine
    from kv_retract.training.samples import CorpusSample

WATCHED = (
    "superseded",
    "tool_error",
    "contradicted",
    "repeated_error",
    "oversized",
    "user_revoked",
    "injection",
    "secret",
)
"""Policies of the session that is measured: all built-in detectors that need no parameters."""
_THREAD = "t"


def measure_overhead(
    engine: HFEngine,
    tokenizer: Any,
    sample: CorpusSample,
    repeats: int,
    *,
    eraser: str | Eraser = "mask",
    policies: Sequence[str] = WATCHED,
) -> dict[str, Any]:
    """Time a step of one token with one new message and nothing to retract; return medians in milliseconds.

    The session has a ledger file, an audit log and healing. Bare is rendering and engine only. The arms take turns;
    `overhead_ms` is the median of the differences, pair by pair.

    Args:
        engine: the model; both arms have a namespace of their own in it.
        tokenizer: of the model.
        sample: the thread before the step.
        repeats: pairs that count.
        eraser: of the session; nothing is erased.
        policies: names of the detectors.
    """
    messages, tools = list(sample.messages), sample.tools
    bare_renderer, one = Renderer(tokenizer), SamplingParams(max_tokens=1)
    times: dict[str, list[float]] = {"bare": [], "session": []}
    num_tokens = 0
    name = f"overhead {len(policies)}"  # a namespace of its own: neither arm finds what an earlier call has cached
    with watched_session(engine, tokenizer, extra_key=name, eraser=eraser, policies=policies) as session:

        def bare(asked: Sequence[Message]) -> None:
            rendering = bare_renderer.render(asked, tools=tools)
            tokens = engine.generate(build_key(rendering.ids, (), extra_key=f"{name} bare"), one)
            with closing(cast(Any, tokens)):
                next(tokens)

        for repeat in range(repeats + 1):
            asked = [*messages, Message("user", f"And number {repeat}, please?")]
            for arm in ("bare", "session") if repeat % 2 else ("session", "bare"):
                started = time.perf_counter()
                if arm == "session":
                    num_tokens = session.step(_THREAD, asked, tools=tools, sampling=one).num_prompt_tokens
                else:
                    bare(asked)
                if repeat:  # the first one prefills the thread
                    times[arm].append((time.perf_counter() - started) * 1e3)
        assert not session.history(_THREAD), "there was nothing to retract"
    pairs = [with_ - without for with_, without in zip(times["session"], times["bare"], strict=True)]
    return {
        "tokens": num_tokens, "messages": len(messages), "policies": list(policies), "n": len(pairs),
        "bare_ms": median(times["bare"]), "session_ms": median(times["session"]), "overhead_ms": median(pairs),
    }  # fmt: skip


@contextmanager
def watched_session(
    engine: HFEngine,
    tokenizer: Any,
    *,
    extra_key: str,
    eraser: str | Eraser = "mask",
    policies: Sequence[str] = WATCHED,
) -> Iterator[KVRetractSession]:
    """Open a session as an application would: detectors, a ledger file, an audit log and healing."""
    with tempfile.TemporaryDirectory() as folder:
        session = KVRetractSession(
            engine, Renderer(tokenizer), eraser=eraser, extra_key=extra_key, healing=Healing(),
            policies=[POLICIES.create(name) for name in policies],
            ledger=Path(folder) / "ledger.sqlite", observers=[AuditLog(Path(folder) / "audit.jsonl")],
        )  # fmt: skip
        with session:
            yield session
