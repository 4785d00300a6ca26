"""What the engine cannot edit correctly is refused by name."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kv_retract.engine.hf import HFEngine
from kv_retract.engine.support import inspect_model
from kv_retract.errors import UnsupportedModelError
from kv_retract.testing.models import FAMILIES, tiny_model

SMALL = dict(
    vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def sliding_mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))


def sliding_qwen():
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1))


def gemma():
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4))


def latent():
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SMALL,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=2,
        )  # fmt: skip
    )


def learned_positions():
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))


def long_rope():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    return Phi3ForCausalLM(
        Phi3Config(**SMALL, rope_parameters=rope, sliding_window=None, original_max_position_embeddings=64)
    )


def quantised():
    model = tiny_model()
    model.generation_config.cache_implementation = "quantized"
    return model


def half():
    return tiny_model().to(torch.float16)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (sliding_mistral, "sliding window of 8"),
        (sliding_qwen, "sliding_attention"),
        (gemma, "sliding_attention"),
        (mamba, "recurrent"),
        (latent, "latent attention"),
        (learned_positions, "no rotary"),
        (long_rope, "longrope"),
        (quantised, "quantized KV"),
        (half, "float16"),
    ],
)
def test_refused(build, why):
    with pytest.raises(UnsupportedModelError, match=why) as error:
        HFEngine(build(), max_tokens=64)
    assert "supported are" in str(error.value)


def test_a_model_that_ignores_its_cache_is_found_out_by_the_probe():
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *a, **kw: forward(*a, **{**kw, "cache": None, "past_key_values": None})
    with pytest.raises(UnsupportedModelError, match="outside of the KV cache"):
        inspect_model(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_spec(family):
    spec, rotary = inspect_model(tiny_model(family), name="m")
    assert (spec.name, spec.num_layers, spec.num_kv_heads, spec.vocab_size) == ("m", 3, 2, 211)
    assert spec.head_dim == (16 if family == "qwen3" else 12)
    assert len(rotary.inv_freq) == {"qwen3": 8, "phi3": 3}.get(family, 6)
    assert not rotary.interleaved
