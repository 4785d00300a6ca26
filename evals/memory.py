"""What forks of a long thread cost: keys and values in the pool, and what is kept to find them."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from kv_retract.cache.manager import CacheManager
from kv_retract.cache.pool import PagedKVPool
from kv_retract.cache.radix import RadixCache
from kv_retract.engine.models import dtype_of

from .machine import describe_machine, versions
from .progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBench:
    """What to weigh; by default the shape of the reference model's cache."""

    context: int = 8192
    """Tokens of the thread."""
    forks: int = 1000
    own_tokens: int = 16
    """With which every fork goes on."""
    layers: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 1
    dtype: str = "float32"
    seed: int = 0


def bench_memory(settings: MemoryBench, *, progress: Progress = silent) -> dict[str, Any]:
    """Weigh one thread, its forks, and the forks once each has gone on; return one JSON-able document.

    A thread is cached; its forks are sequences that an engine has open on it, all at once, as `HFEngine.generate` opens
    them. What attention needs beside (the embedded engine copies a thread's KV while it decodes) is not weighed.

    `rows`: what is open (`one thread`, `forks`, `forks with tokens of their own`), `kv_bytes` of the pages held,
    `host_bytes` of everything else (`tracemalloc`: slots, ids, nodes), and `ratio`, both together over those of one
    thread. `own_kv_bytes` are those of the forks' own tokens, which nothing could share. `per_fork_bytes`: what a fork
    costs besides.
    """
    dtype = dtype_of(settings.dtype)
    own = -(-settings.own_tokens // settings.page_size) + 1
    pool = PagedKVPool(
        num_layers=settings.layers, num_kv_heads=settings.kv_heads, head_dim=settings.head_dim,
        num_pages=settings.context // settings.page_size + 1 + settings.forks * own, page_size=settings.page_size,
        dtype=dtype, device=torch.device("meta"),
    )  # fmt: skip
    manager = CacheManager(pool, RadixCache(page_size=settings.page_size))
    page_bytes = 2 * settings.layers * settings.page_size * settings.kv_heads * settings.head_dim * dtype.itemsize
    ids = np.random.default_rng(settings.seed).integers(0, 2**17, settings.context)
    rows: list[dict[str, Any]] = []

    def weigh(what: str) -> None:
        gc.collect()
        kv, host = manager.pages_in_use() * page_bytes, tracemalloc.get_traced_memory()[0] - empty
        one = rows[0]["kv_bytes"] + rows[0]["host_bytes"] if rows else kv + host
        rows.append({"open": what, "kv_bytes": kv, "host_bytes": host, "ratio": (kv + host) / one})
        progress(len(rows), 3)

    tracemalloc.start()
    try:
        empty = tracemalloc.get_traced_memory()[0]
        thread = manager.lease(ids)
        manager.append(thread, ids)
        manager.publish(thread)
        weigh("one thread")
        forks = [manager.lease(ids) for _ in range(settings.forks)]
        weigh("forks")
        for number, fork in enumerate(forks):
            manager.append(fork, np.full(settings.own_tokens, number))
        weigh("forks with tokens of their own")
    finally:
        tracemalloc.stop()
    manager.check_integrity()
    return {
        **asdict(settings), "rows": rows,
        "own_kv_bytes": settings.forks * settings.own_tokens * page_bytes // settings.page_size,
        "per_fork_bytes": (rows[1]["kv_bytes"] + rows[1]["host_bytes"] - rows[0]["kv_bytes"] - rows[0]["host_bytes"])
        / settings.forks,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine("cpu"), "versions": versions(),
    }  # fmt: skip
