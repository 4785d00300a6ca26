"""Tiny seeded random models of several families: small enough for a test, real enough to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_SHAPE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=None)),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(
            **_SHAPE,
            sliding_window=None,
            original_max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        )
    ),
}
FAMILIES = tuple(_FAMILIES)
"""Names that `tiny_model` knows."""


def tiny_model(family: str = "qwen2", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a three-layer random model of a family, about 0.1 M parameters, the same for the same seed.

    The weights are larger than at the start of training, so that the answer depends on the context.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = _FAMILIES[family]()
    return cast(PreTrainedModel, model.to(dtype).eval())
