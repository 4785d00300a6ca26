"""Which models the embedded engine can edit correctly, found out by looking at the configuration and by trying.

Configurations name what is known to be wrong (sliding windows, recurrent state, latent attention, quantised KV); the
probe then checks by experiment what no configuration says: that every layer keeps its KV in the cache, that keys
rotate with position, and that a forward pass in pieces gives the logits of a plain one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..cache.pool import PagedKVPool
from ..errors import UnsupportedModelError
from ..kernels.rope import Rotary, rotate_keys
from .base import ModelSpec
from .working import ModelRunner, StopForwardError, WorkingSet

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_PROBE_TOKENS = 12


def inspect_model(model: Any, *, name: str = "") -> tuple[ModelSpec, Rotary]:
    """Check that a transformers causal LM can be edited and return its shape and its rotary embedding.

    Raises:
        UnsupportedModelError: what is wrong with it.
    """
    name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
    _check_config(model, name)
    spec = _spec(model, name)
    rotary = _probe_rotary(model, spec)
    _probe_logits(model, spec)
    return spec, rotary


def _refuse(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model {name!r} {why}; supported are decoder-only models with full attention and rotary embeddings "
        "(Llama, Qwen2, Qwen3, Mistral without sliding window, Phi-3 and their kin) in float32 or bfloat16"
    )


def _check_config(model: Any, name: str) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise _refuse(name, "is an encoder-decoder model")
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "num_attention_heads"):
        raise _refuse(name, "has no attention layers: its recurrent state cannot be edited by span")
    if getattr(config, "kv_lora_rank", None):
        raise _refuse(name, "uses latent attention (kv_lora_rank)")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if other:
        raise _refuse(name, f"has layers of type {', '.join(other)}")
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        raise _refuse(name, f"uses a sliding window of {config.sliding_window} tokens")
    kind = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if kind in ("quantized", "sliding_window", "hybrid"):
        raise _refuse(name, f"asks for a {kind} KV cache")
    rope = _rope_type(config)
    if rope in ("dynamic", "longrope"):
        raise _refuse(name, f"has {rope} rotary embeddings: their frequencies depend on the length of the thread")
    if model.dtype not in _DTYPES:
        raise _refuse(name, f"is in {model.dtype}")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise _refuse(
            name, f"was loaded with attn_implementation={config._attn_implementation!r} (load it with 'sdpa')"
        )


def _rope_type(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return str(rope.get("rope_type", rope.get("type", "default")))


def _spec(model: Any, name: str) -> ModelSpec:
    config = model.config
    heads = int(config.num_attention_heads)
    return ModelSpec(
        name=name,
        num_layers=int(config.num_hidden_layers),
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab_size=int(config.vocab_size),
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 1 << 30),
        dtype=_DTYPES[model.dtype],
        device=str(model.device),
    )


def _probe_set(model: Any, spec: ModelSpec, tokens: int) -> WorkingSet:
    pool = PagedKVPool(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, num_pages=1,
        dtype=model.dtype, device=spec.device,
    )  # fmt: skip
    return WorkingSet(pool, np.empty(0, np.int64), capacity=tokens)


def _probe_rotary(model: Any, spec: ModelSpec) -> Rotary:
    """Cache one token at two positions: the keys of the first layer must differ by just a rotation."""
    frequencies = [m.inv_freq for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if not frequencies:
        raise _refuse(spec.name, "has no rotary embeddings")
    if any(f.shape != frequencies[0].shape or not torch.equal(f, frequencies[0]) for f in frequencies):
        raise _refuse(spec.name, "has layers with different rotary frequencies")
    runner, token, zero = ModelRunner(model), np.array([1 % spec.vocab_size]), np.array([0])
    at = np.array([min(37, spec.max_positions - 1)])
    near, far = _probe_set(model, spec, 1), _probe_set(model, spec, 1)
    try:
        for working, position in ((near, zero), (far, at)):
            working.k.fill_(torch.nan)
            runner.forward(working, token, position, zero)
    except (RuntimeError, TypeError, StopForwardError) as error:
        raise _refuse(spec.name, f"does not take a plain KV cache ({type(error).__name__}: {error})") from error
    if torch.isnan(far.k).any():
        raise _refuse(spec.name, "keeps state outside of the KV cache in some layers")
    scale = float(far.k[0].abs().max())
    tolerance = scale * (1e-4 if model.dtype == torch.float32 else 3e-2)
    for interleaved in (False, True):
        rotary = Rotary(inv_freq=frequencies[0].detach().float().cpu(), interleaved=interleaved)
        turned = rotate_keys(near.k[0], torch.from_numpy(zero), torch.from_numpy(at), rotary)
        if float((turned - far.k[0]).abs().max()) <= tolerance:
            return rotary
    raise _refuse(spec.name, "does not rotate its keys by their position")


def _probe_logits(model: Any, spec: ModelSpec) -> None:
    """A forward pass in pieces, one of them written out of order, must give the logits of a plain pass."""
    ids = np.arange(1, _PROBE_TOKENS + 1) % spec.vocab_size
    with torch.inference_mode():
        plain = model(input_ids=torch.from_numpy(ids)[None].to(spec.device), use_cache=False).logits[0, -1].float()
    runner, working = ModelRunner(model), _probe_set(model, spec, _PROBE_TOKENS)
    cut, rows = _PROBE_TOKENS // 2, np.arange(_PROBE_TOKENS)
    runner.forward(working, ids[:cut], rows[:cut], rows[:cut])
    runner.forward(working, ids[cut - 2 : -1], rows[cut - 2 : -1], rows[cut - 2 : -1])
    pieces = runner.forward(working, ids[-1:], rows[-1:], rows[-1:])
    assert pieces is not None, "no stop layer was asked for"
    tolerance = 1e-3 if model.dtype == torch.float32 else 1e-1
    if not float((plain - pieces[0]).abs().max()) <= tolerance * max(1.0, float(plain.abs().max())):
        raise _refuse(spec.name, "does not give the same logits from its KV cache as without it")
