"""What SGLang 0.5.23 needs on a machine without a GPU, vllm or AMX kernels; nothing here runs on others.

Its rotary embeddings ask for vllm there, its `torch_native` attention computes queries for the whole cached prefix
again, so that a cached prefix saves a request nothing but the other layers, and its LoRA layers ask for pinned memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch.nn.functional import pad, scaled_dot_product_attention

_ROTARY = "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.__init__"
_EXTEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend"


_LORA = "sglang.srt.lora.lora_manager.LoRAManager"
_PINNING = ("__init__", "load_lora_adapter_from_tensors", "fetch_new_loras", "prepare_lora_batch")
"""Its methods that pin memory."""


def register(*, lora: bool) -> None:
    """Register the hooks where they are needed; `lora`: also for an eraser's adapters in SGLang's LoRA layers."""
    if lora and not torch.cuda.is_available():
        for method in _PINNING:
            HookRegistry.register(f"{_LORA}.{method}", _without_pinning, HookType.AROUND)
    if not (torch.cuda.is_available() or importlib.util.find_spec("vllm")):
        HookRegistry.register(_ROTARY, _native_rotary, HookType.AROUND)
        HookRegistry.register(_EXTEND, _extend, HookType.AROUND)


def _native_rotary(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    import sglang.srt.layers.rotary_embedding.base as base

    before, base._is_cpu = base._is_cpu, True
    try:
        return original(*args, **kwargs)
    finally:
        base._is_cpu = before


def _without_pinning(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _unpinned():
        return original(*args, **kwargs)


@contextmanager
def _unpinned() -> Iterator[None]:
    """Let torch ignore wishes for pinned memory while the block runs: only a GPU's driver has any."""
    patched: Any = torch
    makers = {name: getattr(torch, name) for name in ("tensor", "empty", "zeros", "ones_like")}
    pin = torch.Tensor.pin_memory
    for name, make in makers.items():
        setattr(patched, name, partial(_make_unpinned, make))
    patched.Tensor.pin_memory = lambda self, *args: self
    try:
        yield
    finally:
        for name, make in makers.items():
            setattr(patched, name, make)
        patched.Tensor.pin_memory = pin


def _make_unpinned(make: Callable[..., torch.Tensor], *args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
    return make(*args, **kwargs)


def _extend(
    original: Callable[..., torch.Tensor],
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend from the new tokens only, where they are few and the layer is causal; else as SGLang does."""
    windowed = (kwargs.get("sliding_window_size") or -1) > -1
    if not kwargs.get("causal") or kwargs.get("is_cross_attn") or windowed or any(a is not None for a in args):
        return original(
            backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens,
            extend_seq_lens, *args, **kwargs,
        )  # fmt: skip
    at = 0
    for row, total, count in zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True):
        slots = req_to_token[row, :total]
        k, v = (cache[slots].transpose(0, 1)[None].to(query.dtype) for cache in (k_cache, v_cache))
        asked, mask = query[at : at + count].transpose(0, 1)[None], None
        if 2 * count > total:  # a mask costs more than the queries that a causal kernel computes for nothing
            asked = pad(asked, (0, 0, total - count, 0))
        else:
            mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        attended = scaled_dot_product_attention(
            asked, k, v, attn_mask=mask, is_causal=mask is None, scale=kwargs.get("scaling"),
            enable_gqa=kwargs.get("enable_gqa", False),
        )  # fmt: skip
        output[at : at + count] = attended[0, :, -count:].transpose(0, 1)
        at += count
    return output
