"""Kernels timed: bytes over time, against what a copy of the same device reaches; checked against their twins first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import numpy as np
import torch

from kv_retract.engine.models import check_device, dtype_of
from kv_retract.errors import KVRetractError
from kv_retract.kernels import HeadMap, Kernels, PagedKV, kernels_for
from kv_retract.kernels.reference import TorchKernels
from kv_retract.kernels.rope import Rotary

from .arms import clock
from .floor import Limits, Work, measure_limits
from .machine import describe_machine, versions
from .progress import Progress, silent
from .stats import spread

MAP_TOKENS = (16, 128, 1024)
"""Spans of the map: it is bound by arithmetic, the others by memory."""
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference between twins, relative to the largest value."""


class KernelParityError(KVRetractError, RuntimeError):
    """A kernel does not do what its twin does on this device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBench:
    """What to time; by default the shape of Qwen3-8B's cache."""

    tokens: tuple[int, ...] = (1024, 8192, 32_768)
    layers: int = 36
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 1
    hidden: int = 128
    """Of the map."""
    repeats: int = 20
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One kernel at one size."""

    kernel: str
    tokens: int
    run: Callable[[Kernels, PagedKV], Any]
    work: Work


def bench_kernels(settings: KernelBench, *, progress: Progress = silent) -> dict[str, Any]:
    """Check, then time every kernel; return one JSON-able document.

    `rows`: kernel, tokens, arm (`torch` everywhere, `triton` beside it on CUDA), `ms` with quartiles, `bytes`,
    `gb_per_s`, `floor_ms` (`evals.floor`) and `of_floor`; for kernels bound by memory `of_copy`, their share of the
    rate that a copy of the device reaches. Slots are in random order. The arms turn with every repetition; the first
    one warms up.

    Raises:
        DeviceError: the device is not there.
        KernelParityError: a kernel and its twin differ.
    """
    check_device(settings.device)
    dtype = dtype_of(settings.dtype)
    limits = measure_limits(settings.device, dtype)
    arms: dict[str, Kernels] = {"torch": TorchKernels()}
    chosen = kernels_for(settings.device)
    if not isinstance(chosen, TorchKernels):
        arms["triton"] = chosen
    kv, tasks, count = _tasks(settings, dtype)
    rows = []
    for number, task in enumerate(tasks):
        if task.tokens == min(settings.tokens) or task.tokens == min(MAP_TOKENS):
            _check(task, arms, kv, dtype)  # the cache is copied for it, so not at the sizes that fill a device
        rows += _time(task, arms, kv, settings, limits)
        progress(number + 1, count)
    return {
        **asdict(settings), "rows": rows, "limits": asdict(limits),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device), "versions": versions(),
    }  # fmt: skip


def _tasks(settings: KernelBench, dtype: torch.dtype) -> tuple[PagedKV, Iterator[_Task], int]:
    """Return a cache of twice the largest size, what is to be done with it, made as it is asked for, and how much."""
    device, size = torch.device(settings.device), settings.page_size
    pages = 2 * (max(*settings.tokens, *MAP_TOKENS) // size + 1)
    draw = torch.Generator(device).manual_seed(settings.seed)
    shape = (settings.layers, pages * size, settings.kv_heads, settings.head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=draw) for _ in range(2))
    kv = PagedKV.of(k, v, size)
    order = torch.from_numpy(np.random.default_rng(settings.seed).permutation(pages)).to(device)
    frequencies = 1e6 ** (-torch.arange(0, settings.head_dim, 2, dtype=torch.float32) / settings.head_dim)
    rotary = Rotary(frequencies.to(device))
    weights = _weights(settings, draw, device)
    moves = (task for n in settings.tokens for task in _moves(kv, order[: 2 * -(-n // size)], n, rotary))
    maps = (_map(kv, order[: 2 * -(-n // size)], n, rotary, weights) for n in MAP_TOKENS)
    return kv, chain(moves, maps), 4 * len(settings.tokens) + len(MAP_TOKENS)


def _moves(kv: PagedKV, pages: torch.Tensor, n: int, rotary: Rotary) -> list[_Task]:
    """Return the kernels that are bound by memory, on `n` tokens of the first half of some pages."""
    first, second = pages.chunk(2)
    source, target = kv.slots_of(first)[:n], kv.slots_of(second)[:n]
    places = torch.arange(n, device=kv.device)
    out, given = kv.empty(n), TorchKernels().gather_pages(kv, source)
    whole, keys = Work(bytes=2 * n * _token_bytes(kv)), Work(bytes=n * _token_bytes(kv))
    kinds: list[tuple[str, Callable[[Kernels, PagedKV], Any], Work]] = [
        ("gather_pages", lambda x, kv: x.gather_pages(kv, source, out=out), whole),
        ("copy_pages", lambda x, kv: x.copy_pages(kv, first, second), whole),
        ("steer_scatter", lambda x, kv: x.steer_scatter(kv, target, *given, positions=places, rotary=rotary), whole),
        ("gather_rotate", lambda x, kv: x.gather_rotate(kv, source, places + 1, places, rotary), keys),
    ]
    return [_Task(kernel=name, tokens=n, run=run, work=work) for name, run, work in kinds]


def _map(kv: PagedKV, pages: torch.Tensor, n: int, rotary: Rotary, weights: HeadMap) -> _Task:
    """Return the map of `n` tokens from the first half of some pages to the second."""
    source, target = (kv.slots_of(half)[:n] for half in pages.chunk(2))
    places = torch.arange(n, device=kv.device)
    numbers = sum(w.numel() for w in (weights.w1, weights.b1, weights.w2, weights.b2))
    return _Task(
        kernel="kv_map", tokens=n, run=lambda x, kv: x.kv_map(kv, source, target, places, weights, rotary),
        work=Work(bytes=2 * n * _token_bytes(kv) + 4 * numbers, flops=2 * numbers * n),
    )  # fmt: skip


def _weights(settings: KernelBench, draw: torch.Generator, device: torch.device) -> HeadMap:
    heads, size, hidden = settings.layers * settings.kv_heads, 2 * settings.head_dim, settings.hidden
    shapes = ((size, hidden), (1, hidden), (hidden, size), (1, size))
    return HeadMap(*(torch.empty(heads, *s, device=device).normal_(0, s[0] ** -0.5, generator=draw) for s in shapes))


def _token_bytes(kv: PagedKV) -> int:
    """Return the bytes of K and V of one token in all layers."""
    return 2 * kv.num_layers * kv.k[0][0].numel() * kv.k[0].element_size()


def _check(task: _Task, arms: dict[str, Kernels], kv: PagedKV, dtype: torch.dtype) -> None:
    """Run every arm on the same cache, which stays as the last one leaves it."""
    if len(arms) == 1:
        return
    before = [layer.clone() for layer in (*kv.k, *kv.v)]
    left: list[list[torch.Tensor]] = []
    for kernels in arms.values():
        for layer, was in zip((*kv.k, *kv.v), before, strict=True):
            layer.copy_(was)
        out = task.run(kernels, kv)
        left.append([layer.clone() for layer in (*kv.k, *kv.v, *(out or ()))])
    for wanted, found in zip(*left, strict=True):
        error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
        if not error <= BOUNDS[dtype]:
            raise KernelParityError(
                f"{task.kernel} of {task.tokens} tokens differs from its twin by {error:.1e} of the largest value; "
                "report the device and the versions of torch and triton"
            )


def _time(
    task: _Task, arms: dict[str, Kernels], kv: PagedKV, settings: KernelBench, limits: Limits
) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(settings.repeats + 1):
        order = list(arms) if repeat % 2 else list(arms)[::-1]
        for arm in order:
            started = clock(settings.device)
            task.run(arms[arm], kv)
            if repeat:
                times[arm].append((clock(settings.device) - started) * 1e3)
    floor = task.work.floor_ms(limits)
    rows = []
    for arm, values in times.items():
        found = spread(values)
        assert found is not None, "there is at least one repetition"
        rate = task.work.bytes / found.median * 1e3
        rows.append(
            {
                "kernel": task.kernel,
                "tokens": task.tokens,
                "arm": arm,
                "ms": found.median,
                "ms_low": found.low,
                "ms_high": found.high,
                "bytes": task.work.bytes,
                "gb_per_s": rate / 1e9,
                "floor_ms": floor,
                "of_floor": found.median / floor,
                "of_copy": None if task.work.flops else rate / limits.bytes_per_s,
            }  # fmt: skip
        )
    return rows
