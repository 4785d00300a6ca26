"""What tests of evaluations share: a replay of real traces, small traces, learned erasers, a model that knows two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kv_retract.engine.models import load_model, load_reference_tokenizer
from kv_retract.engine.working import fingerprint_of
from kv_retract.erasers.kveraser.config import KVEraserConfig
from kv_retract.erasers.kveraser.model import new_net
from kv_retract.evals.replay import ReplaySettings, replay
from kv_retract.evals.specs import parse_specs
from kv_retract.training.corpus import generate
from kv_retract.training.encoding import RowEncoder

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "tau_bench_airline_sample.jsonl"


@pytest.fixture(scope="session")
def make_settings():
    """Settings of a small replay; arms and policies as on the command line."""

    def make(*paths, out, policies=("tool_error", "superseded"), arms=("none", "mask"), **kw):
        kw = {"score_tokens": 8, "model": "random", **kw}
        return ReplaySettings(
            paths=tuple(paths), policies=tuple(parse_specs(policies)), arms=tuple(parse_specs(arms)), out=out, **kw
        )

    return make


@pytest.fixture(scope="session")
def sample_run(make_settings, tmp_path_factory):
    """Two real traces under four arms: the folder, and what `replay` returned."""
    out = tmp_path_factory.mktemp("replay") / "out"
    result = replay(make_settings(SAMPLE, out=out, arms=("none", "mask", "shift"), limit=2))
    return out, result


@pytest.fixture
def chat():
    """Messages of a thread in which the second call of a tool repairs the first, and the agent goes on."""

    def make(*, error="Error: no such city", tool="get_fare", user="What does a flight cost?"):
        def call(id, city):
            function = {"name": tool, "arguments": json.dumps({"city": city})}
            return {"role": "assistant", "content": "", "tool_calls": [{"id": id, "function": function}]}

        return [
            {"role": "system", "content": "You are a travel agent."},
            {"role": "user", "content": user},
            call("c1", "Olso"),
            {"role": "tool", "tool_call_id": "c1", "content": error},
            call("c2", "Oslo"),
            {"role": "tool", "tool_call_id": "c2", "content": '{"fare": 440}'},
            {"role": "assistant", "content": "It costs 440 NOK, and that is all that I could find out for you."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "You are welcome."},
        ]

    return make


# -- learned erasers, and a model whose answers mean something ------------------------------------------------------


@pytest.fixture(scope="session")
def trace_of():
    """A short trace of the test split, as the evaluations draw it for the tokenizer of the random models."""

    def make(seed, family="needles", **kw):
        tokens = RowEncoder(load_reference_tokenizer()).length
        return generate(family, seed=seed, length=64, split="test", tokens=tokens, mentions=1.0, **kw)

    return make


@pytest.fixture(scope="session")
def learnt_model(trace_of, tmp_path_factory):
    """Folder of a tiny model that knows two traces of `needles` by heart, as they are and without each of the spans.

    So it is always right on them where a span is in place or was never there, and says what it likes elsewhere.
    """
    tokenizer = load_reference_tokenizer()
    encoder, rows = RowEncoder(tokenizer), []
    for sample in map(trace_of, (0, 1)):
        for gone in (None, *(span.span_id for span in sample.spans)):
            ids, tokens_of = encoder.thread(sample)
            start, end = tokens_of(sample.span(gone).ref) if gone else (0, 0)
            for probe in sample.probes:
                asked, told = encoder.probe(probe.question, probe.answer_without(gone))
                rows.append((np.concatenate([ids[:start], ids[end:], asked]), told))
    width = max(len(before) + len(told) for before, told in rows)
    x, y = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -1)
    for row, (before, told) in enumerate(rows):
        x[row, : len(before) + len(told)] = torch.from_numpy(np.concatenate([before, told]))
        y[row, len(before) - 1 : len(before) + len(told) - 1] = torch.from_numpy(told)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
                initializer_range=0.05, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                attn_implementation="sdpa",
            )
        )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20)
        logits = model.model(input_ids=x).last_hidden_state[y >= 0] @ model.get_input_embeddings().weight.T
        loss = torch.nn.functional.cross_entropy(logits, y[y >= 0])
        if loss < 1e-2:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert (logits.argmax(-1) == y[y >= 0]).all(), "it knows all of it"
    folder = tmp_path_factory.mktemp("model") / "learnt"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_eraser(tmp_path_factory):
    """Save a learned eraser of random weights, which changes what it erases, for a model; return its folder."""

    def make(variant, model="random"):
        base = load_model(str(model)).model
        config = KVEraserConfig(variant=variant, rank=2, hidden=8, fingerprint=fingerprint_of(base), base="some model")
        net, generator = new_net(base, config), torch.Generator().manual_seed(0)
        for weight in net.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
        folder = tmp_path_factory.mktemp("eraser") / variant
        net.save(folder)
        return folder

    return make
