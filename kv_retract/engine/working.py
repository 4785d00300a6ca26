"""The contiguous working copy of one thread's KV that a transformers model attends to.

Pages are gathered once per forward run, not per token. New KV lands in the working copy, in rows the caller chooses:
at the end (prefill, decode) or scattered in the middle (erasers that recompute part of a thread).
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..cache.base import NO_SLOT, IntArray
from ..cache.pool import PagedKVPool


class StopForwardError(Exception):
    """Ends a forward pass once the layers of interest have written their KV; never leaves this package."""


class Buffers:
    """Memory of working sets that are done, for the next ones: fresh pages of the system cost more than the gather.

    Idle memory holds what was gathered last, until it is taken again or forgotten. Keeps the largest; for other devices
    than the CPU nothing, since torch keeps their memory itself. Safe to share between threads.
    """

    def __init__(self, keep: int = 2) -> None:
        self._keep, self._kept = keep, list[tuple[torch.Tensor, torch.Tensor]]()
        self._lock = threading.Lock()
        self.generation = 0
        """How often everything was forgotten."""

    def take(self, pool: PagedKVPool, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return room for at least so many rows, with what was there. Shape of each: (num_layers, capacity, ...)."""
        with self._lock:
            large = [n for n, (k, _) in enumerate(self._kept) if k.shape[1] >= rows]
            if large:
                return self._kept.pop(large[0])
            self._kept.clear()  # too small, and so would soon be the others
        with torch.inference_mode(False):  # it may be used outside of it next time
            return pool.paged.empty(rows + rows // 8)  # a thread is a little longer at its next step

    def give(self, k: torch.Tensor, v: torch.Tensor, generation: int) -> None:
        """Take room back, unless everything was forgotten since `generation`."""
        with self._lock:
            if generation == self.generation and k.device.type == "cpu":
                self._kept = sorted([*self._kept, (k, v)], key=lambda pair: pair[0].shape[1])[-self._keep :]

    def forget(self) -> None:
        """Give all of it back to the system, also what is in use, once it is done: it is to be deleted."""
        with self._lock:
            self.generation += 1
            self._kept.clear()


class WorkingSet:
    """K and V of the visible entries of a thread, in order, with room to grow.

    Rows are visible entries: row r is the r-th entry of the thread that has a slot. A context manager where it has
    buffers: leaving it gives its memory back to them.

    Attributes:
        k, v: Shape (num_layers, capacity, num_kv_heads, head_dim)
        length: rows in use.
    """

    cache: Any = None
    """Of transformers, over these rows; made by the first pass."""
    _buffers: Buffers | None = None
    _generation = 0

    def __init__(
        self, pool: PagedKVPool, slots: IntArray, *, capacity: int = 0, buffers: Buffers | None = None
    ) -> None:
        """Gather the entries of `slots` (NO_SLOT left out) from the pool; `capacity` rows are reserved."""
        visible = pool.index(slots[slots != NO_SLOT])
        buffers = buffers or Buffers()
        self.length, self._buffers, self._generation = len(visible), buffers, buffers.generation
        self.k, self.v = buffers.take(pool, max(capacity, self.length))
        rows = self.k[:, : self.length], self.v[:, : self.length]
        pool.kernels.gather_pages(pool.paged, visible, out=rows)

    def close(self) -> None:
        """Give the memory back; the rows are gone."""
        if self._buffers is not None:
            self._buffers.give(self.k, self.v, self._generation)
            self._buffers, self.cache, self.k, self.v = None, None, self.k[:, :0], self.v[:, :0]

    def __enter__(self) -> WorkingSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def of(cls, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], *, capacity: int) -> WorkingSet:
        """Return a working set of copies of some K, rotated, and V behind each other, with `capacity` rows reserved.

        Shape of each: (num_layers, num_tokens, num_kv_heads, head_dim)
        """
        first = parts[0][0]
        working = cls.__new__(cls)
        working.length = sum(k.shape[1] for k, _ in parts)
        shape = (first.shape[0], max(capacity, working.length), *first.shape[2:])
        working.k, working.v = first.new_empty(shape), first.new_empty(shape)
        at = 0
        for k, v in parts:
            rows = slice(at, at := at + k.shape[1])
            working.k[:, rows], working.v[:, rows] = k, v
        return working

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all; doubles, so that decoding copies each row a constant number of times."""
        if rows <= self.k.shape[1]:
            return
        capacity = max(rows, 2 * self.k.shape[1])
        for name in ("k", "v"):
            old = getattr(self, name)
            with torch.inference_mode(False):  # as in `Buffers.take`
                new = old.new_empty((old.shape[0], capacity, *old.shape[2:]))
            new[:, : self.length] = old[:, : self.length]
            setattr(self, name, new)


def fingerprint_of(model: Any) -> str:
    """Return a short digest of a model's weights: the name, shape and some values of each, as bfloat16.

    The same for the same checkpoint in float32 and in bfloat16, on any device.
    """
    return fingerprint_of_tensors(model.state_dict().items())


def fingerprint_of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """As `fingerprint_of`, of weights by name, in the order of the model's `state_dict`."""
    digest = sha256()
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class ModelRunner:
    """Runs a transformers decoder over a working set; the only place that calls the model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache_argument = cache_argument_of(model)
        self._takes_logits = bool(logits_argument(model, 1))
        self.num_layers = int(model.config.num_hidden_layers)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights; see `fingerprint_of`."""
        return fingerprint_of(self.model)

    @torch.inference_mode()
    def forward(
        self,
        working: WorkingSet,
        ids: IntArray,
        positions: IntArray,
        rows: IntArray,
        *,
        visible: torch.Tensor | None = None,
        num_logits: int = 1,
        stop_layer: int | None = None,
    ) -> torch.Tensor | None:
        """Run tokens through the model and write their KV into `rows` of the working set.

        Each token attends to all rows up to its own, or to those that `visible` says. Rows ascend; those at or past
        `working.length` extend it and must be consecutive.

        Args:
            working: attended to and written.
            ids: Shape: (n,)
            positions: rotary positions. Shape: (n,)
            rows: where their KV goes. Shape: (n,)
            visible: which rows each token sees. Shape: (n, rows in use), bool
            num_logits: return logits of so many last tokens.
            stop_layer: stop once this layer has written its KV (attention of it not computed); no logits then.

        Returns:
            Shape: (num_logits, vocab_size), float32, or None with `stop_layer`.
        """
        n, end = len(ids), max(working.length, int(rows[-1]) + 1)
        working.reserve(end)
        device = working.k.device
        where = torch.from_numpy(rows).to(device)
        if working.cache is None:
            working.cache = Cache(layers=[_WorkingLayer(working, layer) for layer in range(self.num_layers)])
        for layer in working.cache.layers:
            layer.aim(where, end, stop_layer)
        kwargs: dict[str, Any] = {self._cache_argument: working.cache, "use_cache": True}
        if self._takes_logits:
            kwargs["logits_to_keep"] = num_logits
        from_start = int(rows[0]) == 0 and end == n
        last_only = n == 1 and int(rows[0]) == end - 1
        if visible is None and int(rows[0]) == end - n and not (from_start or last_only):
            kwargs["attention_mask"] = causal_mask(n, end, working.k.dtype, device)[None, None]
        elif visible is not None or not (from_start or last_only):
            seen = torch.arange(end, device=device)[None] <= where[:, None] if visible is None else visible.to(device)
            kwargs["attention_mask"] = additive_mask(seen, working.k.dtype)[None, None]
        try:
            output = self.model(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids))[None].to(device),
                position_ids=torch.from_numpy(np.ascontiguousarray(positions))[None].to(device),
                **kwargs,
            )
        except StopForwardError:
            return None
        finally:
            working.length = end
        return output.logits[0, -num_logits:].float()  # type: ignore[no-any-return]


class _WorkingLayer(CacheLayerMixin):
    """One layer of a working set, in the form transformers models update."""

    is_sliding = False

    def __init__(self, working: WorkingSet, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The working set holds the layers: a circle would keep its memory until garbage is collected.
        self._working, self._layer = weakref.proxy(working), layer
        self.is_initialized = True

    def aim(self, rows: torch.Tensor, end: int, stop_layer: int | None) -> None:
        """Say where the next pass writes, how many rows there are then, and whether it stops here."""
        self._rows, self._end, self._stop = rows, end, self._layer == stop_layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new rows; return all rows. Shapes: (1, num_kv_heads, n, head_dim)."""
        k, v = self._working.k[self._layer], self._working.v[self._layer]
        k[self._rows] = key_states[0].transpose(0, 1).to(k.dtype)
        v[self._rows] = value_states[0].transpose(0, 1).to(v.dtype)
        if self._stop:
            raise StopForwardError
        return k[: self._end].transpose(0, 1)[None], v[: self._end].transpose(0, 1)[None]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the working set is there."""

    def get_seq_length(self) -> int:
        """Rows before the new ones."""
        return self._end - len(self._rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows in all, and the offset of the first."""
        return self._end, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum; the name that transformers used before 5.24."""
        return -1


def cache_argument_of(model: Any) -> str:
    """Return how a model's forward pass calls its cache: transformers 5.24 renamed it and deprecates the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def logits_argument(model: Any, num_logits: int) -> dict[str, int]:
    """Return what asks a model for the logits of so many last tokens; nothing where it always gives all."""
    return {"logits_to_keep": num_logits} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def additive_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask to add to attention scores: 0 where `seen`, else the lowest number. Shape as `seen`."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def causal_mask(num_tokens: int, end: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the `additive_mask` of the last `num_tokens` of `end`, each of which sees what stands before it."""
    mask = torch.zeros(num_tokens, end, dtype=dtype, device=device)
    mask[:, end - num_tokens :].fill_(torch.finfo(dtype).min).triu_(1)
    return mask
