"""What a span retraction is worth in a real SGLang server: the next step after it, and ordinary traffic beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kv_retract.cache.base import IntArray
from kv_retract.integrations.sglang.process import running_server
from kv_retract.integrations.sglang.records import SpanRecord, digests, standing

from .machine import describe_machine, versions
from .progress import Progress, silent
from .stats import median

PLAIN = "plain"
"""Arm: the client leaves the message out, and the server prefills what followed it."""
ARMS = (PLAIN, "recompute", "none", "kveraser")
NEXT_TOKENS = 16
_RETRACTIONS = (1, 100, 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangBench:
    """What to time."""

    venv: Path
    """Environment with SGLang and kv-retract."""
    lengths: tuple[int, ...] = (1024, 4096, 8192)
    """Tokens of the thread."""
    span: int = 64
    depth: float = 0.1
    repeats: int = 7
    traffic_runs: int = 10
    traffic_requests: int = 24
    concurrency: int = 4
    seed: int = 0


def bench_sglang(settings: SGLangBench, folder: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Start two servers with the same flags, with and without the plugin, and return one JSON-able document.

    `ttft_ms`: by length and arm, the median time to the first token of the next step after the withdrawal. `edit_ms`:
    of the request that withdrew, 0 for `plain`. `speedup_vs_plain`: `plain` over the sum of both.
    `ordinary_traffic_ratio`: requests per second with the plugin over those without, by run. `ledger_hook_ms`: what
    arriving costs a request of 8,192 tokens whose thread has so many retractions.

    Args:
        settings: what to time.
        folder: for the servers' logs.
        progress: called with steps done and steps in all.

    Raises:
        ServeError: a server does not start.
    """
    total = len(settings.lengths) * (settings.repeats + 1) + settings.traffic_runs
    with ExitStack() as stack:
        plugin, plain = (
            stack.enter_context(running_server(settings.venv, folder, options)) for options in ((), ("--plain",))
        )
        client = stack.enter_context(httpx.Client(timeout=600))
        steps = _next_steps(client, plugin.url, settings, lambda done: progress(done, total))
        ratios = _traffic(client, plugin.url, plain.url, settings, lambda done: progress(total - done, total))
        model = client.post(f"{plugin.url}/kv_retract/status", json={}).json()["model"]
    ttft = {
        length: {arm: median(first for first, _ in times) for arm, times in arms.items()}
        for length, arms in steps.items()
    }
    edit = {
        length: {arm: median(ms for _, ms in times) for arm, times in arms.items()} for length, arms in steps.items()
    }
    speedup = {
        length: {
            arm: median(a + b for a, b in arms[PLAIN]) / median(a + b for a, b in times) for arm, times in arms.items()
        }
        for length, arms in steps.items()
    }
    return {
        "ttft_ms": ttft,
        "edit_ms": edit,
        "speedup_vs_plain": speedup,
        "ordinary_traffic_ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios), "runs": ratios},
        "ledger_hook_ms": {str(n): ledger_hook_ms(n) for n in _RETRACTIONS},
        "refused": {"mask": "SGLang attends to every slot of a thread: a span cannot be hidden from it"},
        "span": settings.span,
        "depth": settings.depth,
        "repeats": settings.repeats,
        "model": model,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine("cpu"),
        "versions": versions(),
    }


def ledger_hook_ms(num_retractions: int, *, length: int = 8192, repeats: int = 9) -> float:
    """Return the median time to find out which of a thread's retractions apply to a request of `length` tokens."""
    ids = np.random.default_rng(0).integers(0, 2000, length)
    ends = np.linspace(8, length, num_retractions, dtype=np.int64)
    found = digests(ids, ends.tolist())
    records = [
        SpanRecord(
            retraction_id=str(number), extra_key="t", start=int(end) - 1, end=int(end), digest=found[int(end)],
            state="exact", eraser="recompute", eraser_id="recompute", shared=False,
        )
        for number, end in enumerate(ends)
    ]  # fmt: skip
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        standing(records, ids)
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def _next_steps(
    client: httpx.Client, url: str, settings: SGLangBench, tick: Any
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return by length and arm (time to first token, time of the withdrawal) in milliseconds."""
    rng, found, done = np.random.default_rng(settings.seed), {}, 0
    for length in settings.lengths:
        arms: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        start = int(length * settings.depth)
        for repeat in range(settings.repeats + 1):
            ids = rng.integers(3, 2000, length + NEXT_TOKENS)
            turn = repeat % len(ARMS)
            for arm in ARMS[turn:] + ARMS[:turn]:
                name = f"{length}/{repeat}/{arm}"
                times = _one_step(client, url, ids, (start, start + settings.span), arm, name)
                if repeat:
                    arms[arm].append(times)
            done += 1
            tick(done)
        found[str(length)] = arms
    return found


def _one_step(
    client: httpx.Client, url: str, ids: IntArray, span: tuple[int, int], arm: str, extra_key: str
) -> tuple[float, float]:
    thread = ids[:-NEXT_TOKENS]
    _first_token_ms(client, url, thread, extra_key)
    edit_ms = 0.0
    if arm != PLAIN:
        body = {
            "token_ids": thread.tolist(), "spans": [{"start": span[0], "end": span[1]}], "extra_key": extra_key,
            "eraser": arm,
        }  # fmt: skip
        started = time.perf_counter()
        answer = client.post(f"{url}/kv_retract/retract", json=body)
        edit_ms = (time.perf_counter() - started) * 1e3
        answer.raise_for_status()
    sent = np.delete(ids, np.arange(*span)) if arm == PLAIN else ids
    first = _first_token_ms(client, url, sent, extra_key)
    client.post(f"{url}/flush_cache")
    return first, edit_ms


def _first_token_ms(client: httpx.Client, url: str, ids: IntArray, extra_key: str) -> float:
    body = {
        "input_ids": ids.tolist(), "extra_key": extra_key, "stream": True,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
    }  # fmt: skip
    started = time.perf_counter()
    with client.stream("POST", f"{url}/generate", json=body) as answer:
        answer.raise_for_status()
        lines: Iterator[str] = (line for line in answer.iter_lines() if line.startswith("data:"))
        next(lines)
        elapsed = (time.perf_counter() - started) * 1e3
        for _ in lines:
            pass
    return elapsed


def _traffic(client: httpx.Client, on: str, off: str, settings: SGLangBench, tick: Any) -> list[float]:
    """Return by run how many times as fast the server with the plugin answers the same requests; both warm up once."""
    ratios = []
    for run in range(settings.traffic_runs + 1):
        order = (on, off) if run % 2 else (off, on)
        seconds = {url: _load(client, url, settings, run) for url in order}
        if run:
            ratios.append(seconds[off] / seconds[on])
        tick(settings.traffic_runs - run)
    return ratios


def _load(client: httpx.Client, url: str, settings: SGLangBench, run: int) -> float:
    """Return the seconds that a batch of ordinary requests takes: threads of several turns, several at once."""
    rng = np.random.default_rng(settings.seed + run)
    prompts: Sequence[list[int]] = [
        rng.integers(3, 2000, int(size)).tolist() for size in rng.integers(100, 800, settings.traffic_requests)
    ]

    def ask(prompt: list[int]) -> None:
        sampling = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
        for turn in range(2):  # the second turn finds the first one in the cache
            body = {"input_ids": prompt + [5] * (8 * turn), "sampling_params": sampling}
            client.post(f"{url}/generate", json=body).raise_for_status()

    started = time.perf_counter()
    with ThreadPoolExecutor(settings.concurrency) as pool:
        list(pool.map(ask, prompts))
    return time.perf_counter() - started
