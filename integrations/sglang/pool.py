"""SGLang's pool of keys and values, as kernels take it; what is written to it stands in line with the batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kv_retract.kernels import HeadMap, PagedKV, kernels_for
from kv_retract.kernels.rope import Rotary


class KVPool:
    """K and V of one rank.

    A batch runs on SGLang's forward stream while the scheduler, on a stream of its own, goes on to the next. Edits are
    queued on the forward stream: behind the batch that runs, which may still read what they free, and before the next
    one. For copies, wiping and the map the host does not wait, so other threads' traffic goes on meanwhile; adapters
    need a forward pass, whose inputs it hands over.

    Args:
        pool: `MHATokenToKVPool` of SGLang.
        runner: `ModelRunner` of SGLang.
    """

    def __init__(self, pool: Any, runner: Any) -> None:
        self.paged = PagedKV(tuple(pool.k_buffer), tuple(pool.v_buffer))
        self._kernels, self._stream = kernels_for(self.paged.device), runner.forward_stream
        self._streams = torch.get_device_module(self.paged.device)
        self.wipe(torch.zeros(1, dtype=torch.int64, device=self.paged.device))  # SGLang's slot 0 is padding: compiles

    @contextmanager
    def in_line(self) -> Iterator[None]:
        """Queue what is launched inside on the forward stream, in order with what the scheduler's stream does."""
        scheduling = self._streams.current_stream()
        self._stream.wait_stream(scheduling)
        try:
            with self._streams.stream(self._stream):
                yield
        finally:
            scheduling.wait_stream(self._stream)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy K and V of slots to others. Shape of each: (num_slots,)."""
        with self.in_line():
            self._kernels.copy_pages(self.paged, source.long(), target.long())

    def wipe(self, slots: torch.Tensor) -> None:
        """Zero K and V of slots. Shape: (num_slots,)."""
        with self.in_line():
            self._kernels.wipe(self.paged, slots.long())

    def map(
        self, source: torch.Tensor, target: torch.Tensor, positions: torch.Tensor, weights: HeadMap, rotary: Rotary
    ) -> None:
        """Map K and V of slots and write them to others; see `Kernels.kv_map`."""
        with self.in_line():
            self._kernels.kv_map(self.paged, source.long(), target.long(), positions, weights, rotary)
