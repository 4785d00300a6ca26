"""What an edit costs at least on a machine: bytes at the rate of a copy, operations at the rate of a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kv_retract.erasers import Eraser, KVEraserEraser
from kv_retract.erasers.base import EditShape

from .arms import clock

COPY_BYTES = 256 * 2**20
"""Of the buffer that is copied: several times any cache."""
_REPEATS = 7
_CACHED = ("k_proj", "v_proj", "k_norm", "qkv", "query_key_value", "input_layernorm")
"""Parts of a layer's names whose weights lead to what is cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a device does at best, as measured on it."""

    bytes_per_s: float
    """Of a copy of `COPY_BYTES`, read and written bytes together."""
    flops_per_s: float
    """Of a product of two square matrices, a multiplication and an addition counted as two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What has to be done, whoever does it."""

    bytes: float = 0.0
    """Read and written."""
    flops: float = 0.0

    def floor_ms(self, limits: Limits) -> float:
        """Return the least time: memory and arithmetic may overlap."""
        return max(self.bytes / limits.bytes_per_s, self.flops / limits.flops_per_s) * 1e3


def measure_limits(device: str, dtype: torch.dtype) -> Limits:
    """Measure what a device does at best; medians of several runs after one to warm up."""
    copied = copy_seconds(device)
    size = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    multiplied = seconds_of(lambda: a @ b, device)
    return Limits(bytes_per_s=2 * COPY_BYTES / copied, flops_per_s=2 * size**3 / multiplied)


def copy_seconds(device: str) -> float:
    """Return the seconds of a copy of `COPY_BYTES` on a device."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device)


def seconds_of(run: Any, device: str) -> float:
    """Return the median seconds of one call, after one to warm up."""
    times = []
    for _ in range(_REPEATS + 1):
        started = clock(device)
        run()
        times.append(clock(device) - started)
    return float(np.median(times[1:]))


def edit_work(eraser: Eraser, model: Any, *, context: int, span: int, start: int) -> Work:
    """Return what an edit of one thread has to do, from the cost that its eraser predicts.

    Tokens through the model read its weights once, the KV before them, and write their own; a token that is moved is
    read and written, of a shift only its keys. Embeddings, the output layer, and what of the last layer comes after its
    keys and values are left out. Bytes are taken at the rate of memory: what stays in a processor's cache can beat it.

    Args:
        eraser: whose edit it is.
        model: a transformers causal LM.
        context: tokens of the thread.
        span: tokens that are erased.
        start: where the span begins.
    """
    cost = eraser.cost(EditShape(prefix=start, span=span, suffix=context - start - span))
    shape, item = model.config, model.dtype.itemsize
    heads = shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    kv_bytes = 2 * shape.num_hidden_layers * (getattr(shape, "num_key_value_heads", None) or heads) * head_dim * item
    flops, bytes_ = 0.0, 0.0
    if cost.recomputed:
        weights = _weights(model)
        seen = start + cost.recomputed / 2
        flops += cost.recomputed * (2 * weights + 4 * seen * (shape.num_hidden_layers - 1) * heads * head_dim)
        bytes_ += weights * item + (start + cost.recomputed) * kv_bytes
    if cost.moved:
        mapped = _map_weights(eraser)
        flops += 2 * mapped * cost.moved
        bytes_ += 4 * mapped + cost.moved * kv_bytes * (2 if mapped else 1)
    return Work(bytes=bytes_, flops=flops)


def _weights(model: Any) -> int:
    """Return the weights that a token passes until its last state is cached: of the last layer, those of K and V."""
    skipped = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.get_decoder().layers[-1].named_parameters():
        if not any(part in name for part in _CACHED):
            skipped.add(id(parameter))
    return sum(p.numel() for p in model.parameters() if id(p) not in skipped)


def _map_weights(eraser: Eraser) -> int:
    """Return the weights of a map on cached states; 0 where the eraser has none."""
    if not isinstance(eraser, KVEraserEraser) or eraser.variant != "kv_map":
        return 0
    return eraser.num_parameters
