"""The student and the teacher of a learned eraser, with gradients: next-token logits after an edit, and without spans.

The student prefills the thread once without gradient and then runs the spans' tokens, adapters on, and all queries in
one pass with a mask: memory follows spans and queries, not the thread. The teacher prefills the thread without spans
and runs the queries behind it. `whole=True` runs everything in a single pass instead, the slow twin of both. Outside
of training, erasers edit a paged cache (`erasers.kveraser`); the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from ..engine.working import additive_mask, cache_argument_of
from ..kernels.rope import Rotary
from .edits import EditRow


@dataclass(frozen=True, slots=True, eq=False)
class EditBatch:
    """Padded rows. Columns of masks: the thread, then the spans' tokens again, then the queries."""

    thread: torch.Tensor
    """Shape: (num_rows, num_thread)"""
    span_index: torch.Tensor
    """Where in the thread the spans' tokens are; padded by 0. Shape: (num_rows, num_span)"""
    span_ids: torch.Tensor
    """Shape: (num_rows, num_span)"""
    is_span: torch.Tensor
    """What of the two above is no padding. Shape: (num_rows, num_span), bool"""
    queries: torch.Tensor
    """All queries of a row behind each other. Shape: (num_rows, num_query)"""
    positions: torch.Tensor
    """Of the queries, in the edited thread. Shape: (num_rows, num_query)"""
    visible: torch.Tensor
    """Who sees whom, of blind spans' tokens and of queries. Shape: (num_rows, num_span + num_query, columns), bool"""
    outside: torch.Tensor
    """Thread tokens outside of spans. Shape: (num_rows, num_thread), bool"""
    left: torch.Tensor
    """Thread without spans. Shape: (num_rows, num_left)"""
    left_positions: torch.Tensor
    """Of the queries, behind the thread without spans. Shape: (num_rows, num_query)"""
    left_visible: torch.Tensor
    """Who of the queries sees whom there. Shape: (num_rows, num_query, num_left + num_query), bool"""
    weight: torch.Tensor
    """Weight of predicting each query token from the one before it. Shape: (num_rows, num_query)"""

    def to(self, device: torch.device | str) -> EditBatch:
        """Return the batch on a device."""
        return EditBatch(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class ReadBatch:
    """A batch, and what the frozen model makes of it: most of the work of a step, and the same whatever is learnt."""

    batch: EditBatch
    cache: DynamicCache
    """States of the threads; not to be extended."""
    teacher: torch.Tensor
    """See `teacher_logits`."""


def collate_edits(rows: Sequence[EditRow], *, weights: dict[str, float]) -> EditBatch:
    """Pad rows on the right.

    Args:
        rows: threads with spans and queries.
        weights: of each kind of query.
    """
    n = len(rows)
    left = [row.without_spans() for row in rows]
    num_thread, num_left = (max(map(len, parts)) for parts in ([row.thread for row in rows], left))
    num_span = max(len(row.span_index) for row in rows)
    num_query = max(sum(len(q.ids) for q in row.queries) for row in rows)
    thread, index, span_ids, is_span = (np.zeros((n, size), np.int64) for size in (num_thread, *[num_span] * 3))
    queries, positions = np.zeros((n, num_query), np.int64), np.zeros((n, num_query), np.int64)
    weight = np.zeros((n, num_query), np.float32)
    columns = num_thread + num_span + num_query
    visible = np.zeros((n, num_span + num_query, columns), np.bool_)
    kept = np.zeros((n, num_thread), np.bool_)
    left_ids, left_positions = np.zeros((n, num_left), np.int64), np.zeros((n, num_query), np.int64)
    left_visible = np.zeros((n, num_query, num_left + num_query), np.bool_)
    for i, row in enumerate(rows):
        spans, size = row.span_index, len(row.thread)
        thread[i, :size] = row.thread
        index[i, : len(spans)], span_ids[i, : len(spans)], is_span[i, : len(spans)] = spans, row.thread[spans], 1
        outside = np.ones(size, np.bool_)
        outside[spans] = False
        kept[i, :size] = outside
        place = np.arange(size)
        visible[i, : len(spans), :size] = outside & (place[None] < spans[:, None])
        visible[i, : len(spans), num_thread : num_thread + len(spans)] = spans[None] <= spans[:, None]
        left_ids[i, : len(left[i])] = left[i]
        at = 0
        for query in row.queries:
            length = len(query.ids)
            own = slice(num_span + at, num_span + at + length)
            queries[i, at : at + length] = query.ids
            positions[i, at : at + length] = query.sees + np.arange(length)
            weight[i, at + query.first : at + length] = weights[query.kind]
            visible[i, own, :size] = outside & (place < query.sees)
            visible[i, own, num_thread : num_thread + len(spans)] = spans < query.sees
            causal = np.tri(length, dtype=np.bool_)
            visible[i, own, num_thread + own.start : num_thread + own.stop] = causal
            sees, mine = row.sees_without_spans(query), slice(at, at + length)
            left_positions[i, mine] = sees + np.arange(length)
            left_visible[i, mine, :sees] = True
            left_visible[i, mine, num_left + at : num_left + at + length] = causal
            at += length
    padding = np.arange(num_span + num_query)
    visible[:, padding, num_thread + padding] = True  # padding sees itself, so that no softmax is empty
    left_visible[:, np.arange(num_query), num_left + np.arange(num_query)] = True
    arrays = (
        thread, index, span_ids, is_span.astype(np.bool_), queries, positions, visible, kept, left_ids, left_positions,
        left_visible, weight,
    )  # fmt: skip
    return EditBatch(*map(torch.from_numpy, arrays))


def read(model: Any, batch: EditBatch) -> ReadBatch:
    """Return a batch with the states of its threads and what the teacher says.

    Args:
        model: frozen.
        batch: rows, on the model's device.
    """
    return ReadBatch(batch, _prefill(model, batch.thread), teacher_logits(model, batch))


@torch.no_grad()
def teacher_logits(model: Any, batch: EditBatch, *, whole: bool = False) -> torch.Tensor:
    """Return logits of the queries behind the thread that never had the spans: full recomputation.

    Args:
        model: frozen.
        batch: rows.
        whole: one pass over everything instead of a prefill first.

    Returns:
        Shape: (num_rows, num_query, vocab_size), float32
    """
    ids, positions, visible, num_query = batch.queries, batch.left_positions, batch.left_visible, batch.queries.shape[1]
    if whole:
        ids, positions, visible = _with_prefix(batch.left, ids, positions, visible)
    mask = additive_mask(visible, model.dtype)[:, None]
    return _logits(model, ids, positions, mask, num_query, None if whole else _prefill(model, batch.left))


def student_logits(
    model: Any, net: Any, batch: EditBatch, *, rotary: Rotary | None = None, cache: DynamicCache | None = None,
    whole: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return logits of the queries on the edited cache, with gradients of the net's parameters.

    Args:
        model: frozen.
        net: an `AdapterNet` or a `MapNet`.
        batch: rows.
        rotary: of the model; for a `MapNet`.
        cache: states of the threads (`ReadBatch`), left as they are. None: they are prefilled.
        whole: one pass over everything instead of a prefill first; adapters only.

    Returns:
        Shape: (num_rows, num_query, vocab_size), float32
    """
    num_span, num_query = batch.span_ids.shape[1], batch.queries.shape[1]
    visible = batch.visible
    if net.config.variant == "suffix_aware":
        visible = visible.clone()
        visible[:, :num_span, : batch.thread.shape[1]] |= batch.outside[:, None] & batch.is_span[..., None]
    if net.config.variant == "kv_map":
        assert rotary is not None and not whole, "a map has no forward pass of its own"
        mapped = _mapped(_prefill(model, batch.thread) if cache is None else cache, net, batch, rotary)
        mask = additive_mask(visible[:, num_span:], model.dtype)[:, None]
        return _logits(model, batch.queries, batch.positions, mask, num_query, mapped)
    ids = torch.cat([batch.span_ids, batch.queries], dim=1)
    positions = torch.cat([batch.span_index, batch.positions], dim=1)
    gate = torch.cat([batch.is_span, torch.zeros_like(batch.queries, dtype=torch.bool)], dim=1)
    longer: Any = None
    if whole:
        ids, positions, visible = _with_prefix(batch.thread, ids, positions, visible)
        gate = torch.cat([torch.zeros_like(batch.thread, dtype=torch.bool), gate], dim=1)
    else:
        longer = _prefill(model, batch.thread) if cache is None else _copied(cache)
    with net.attached(model, gate):
        return _logits(model, ids, positions, additive_mask(visible, model.dtype)[:, None], num_query, longer)


def edit_loss(student: torch.Tensor, teacher: torch.Tensor, batch: EditBatch) -> torch.Tensor:
    """Return the weighted mean of KL(teacher || student) over predicted query tokens."""
    weight = batch.weight[:, 1:]
    at = weight.nonzero(as_tuple=True)
    target = teacher[:, :-1][at].log_softmax(-1)
    divergence = (target.exp() * (target - student[:, :-1][at].log_softmax(-1))).sum(-1)
    return (divergence * weight[at]).sum() / weight[at].sum()


def _with_prefix(
    prefix: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, positions and visibility of tokens with those of a causal prefix before them."""
    n, size = prefix.shape
    before = torch.ones(size, size, dtype=torch.bool, device=visible.device).tril().expand(n, size, size)
    before = torch.cat([before, before.new_zeros(n, size, ids.shape[1])], dim=2)
    places = torch.arange(size, device=ids.device).expand(n, size)
    return torch.cat([prefix, ids], 1), torch.cat([places, positions], 1), torch.cat([before, visible], 1)


def _prefill(model: Any, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1, **{cache_argument_of(model): cache, "use_cache": True})
    return cache


def _copied(cache: DynamicCache) -> DynamicCache:
    result = DynamicCache()
    layers: Any = cache.layers
    for number, layer in enumerate(layers):
        result.update(layer.keys, layer.values, number)
    return result


def _mapped(cache: DynamicCache, net: Any, batch: EditBatch, rotary: Rotary) -> DynamicCache:
    """Return the cache with steering states behind it, in the order of `batch.span_ids`."""
    result = DynamicCache()
    n, size = batch.span_index.shape
    rows = torch.arange(n, device=batch.thread.device)[:, None]
    layers: Any = cache.layers
    k, v = (
        torch.stack([getattr(layer, name).transpose(1, 2)[rows, batch.span_index] for layer in layers])
        for name in ("keys", "values")
    )  # (num_layers, num_rows, num_span, num_kv_heads, head_dim)
    flat = (len(k), n * size, *k.shape[3:])
    steered = net.steer(k.reshape(flat), v.reshape(flat), batch.span_index.reshape(-1), rotary)
    k, v = (states.reshape(k.shape).transpose(2, 3) for states in steered)
    for number, layer in enumerate(layers):
        result.update(torch.cat([layer.keys, k[number]], 2), torch.cat([layer.values, v[number]], 2), number)
    return result


def _logits(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, last: int, cache: Any = None
) -> torch.Tensor:
    options = {"use_cache": False} if cache is None else {cache_argument_of(model): cache, "use_cache": True}
    output = model(input_ids=ids, position_ids=positions, attention_mask=mask, logits_to_keep=last, **options)
    return output.logits.float()  # type: ignore[no-any-return]
