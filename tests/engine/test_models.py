"""Models by name and by directory, and the bundled tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_retract.cache.keys import build_key
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import MODELS, load_model, load_reference_tokenizer
from kv_retract.errors import UnknownNameError, UnsupportedModelError

TOOLS = [{"type": "function", "function": {"name": "find", "description": "Find ü.", "parameters": {"type": "object"}}}]
CALL = {"id": "a", "type": "function", "function": {"name": "find", "arguments": {"q": "ümlaut", "n": 1.5}}}
THREAD = [
    {"role": "system", "content": "  Be brief. \n\n"},
    {"role": "user", "content": "\tTwo  spaces, 漢字 and 🙂\r\n"},
    {"role": "assistant", "content": "Looking.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "\n{'a': 1}  ", "tool_call_id": "a"},
    {"role": "tool", "content": "", "tool_call_id": "a"},
    {"role": "system", "content": "A late system turn"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "user", "content": "bye"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_reference_tokenizer()


@torch.inference_mode()
def log_probs(model, ids):
    return torch.log_softmax(model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1].float(), -1)


def kl(p, q):
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("name", ["random", "random-256"])
def test_what_stands_200_tokens_back_moves_the_next_token(name):
    loaded = load_model(name)
    assert loaded.is_random and "random weights" in loaded.quality_note and loaded.name == name
    rng = np.random.default_rng(0)
    single, span = [], []
    for _ in range(4):
        ids = rng.integers(10, 4000, 240)
        one, many = ids.copy(), ids.copy()
        one[39] = (one[39] + 1) % 4000
        many[20:40] = rng.integers(10, 4000, 20)
        exact = log_probs(loaded.model, ids)
        single.append(kl(exact, log_probs(loaded.model, one)))
        span.append(kl(exact, log_probs(loaded.model, many)))
    print(f"{name}: KL of one token {single}, of 20 tokens {span}")
    assert np.mean(single) > 1e-3 and np.mean(span) > 1e-2


def test_the_seed_decides_the_weights():
    first, again, other = (load_model("random", seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_loading_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_model("random")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_engine_runs_it(dtype):
    loaded = load_model("random", dtype=dtype)
    engine = HFEngine(loaded.model, max_tokens=256, name=loaded.name)
    ids = np.arange(10, 110)
    logits = engine.extend(build_key(ids, ())).logits[0]
    expected = log_probs(loaded.model, ids)
    assert kl(expected, torch.log_softmax(logits.float(), -1)) < (1e-6 if dtype == "float32" else 0.3)
    assert engine.spec.dtype == dtype


def test_a_directory_loads_as_it_was_saved(tmp_path):
    random = load_model("random")
    random.model.save_pretrained(tmp_path / "mine")
    random.tokenizer.save_pretrained(tmp_path / "mine")
    loaded = load_model(str(tmp_path / "mine"))
    assert loaded.name == "mine" and not loaded.is_random and loaded.quality_note == ""
    assert loaded.model.config._attn_implementation == "sdpa" and not loaded.model.training
    ids = np.arange(50, 90)
    torch.testing.assert_close(log_probs(loaded.model, ids), log_probs(random.model, ids))
    assert loaded.tokenizer.apply_chat_template(THREAD, tokenize=False) == random.tokenizer.apply_chat_template(
        THREAD, tokenize=False
    )


def test_a_hub_name_is_refused_with_the_remedy():
    with pytest.raises(
        UnknownNameError, match=r"random, random-200m, random-256, random-8b, reference.*'Qwen/Qwen3-0.6B'.*--local-dir"
    ):
        load_model("Qwen/Qwen3-0.6B")


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "shape", "cut"])
def test_damaged_weights_are_refused_and_not_drawn_at_random(tmp_path, damage):
    random = load_model("random")
    random.model.save_pretrained(tmp_path)
    random.tokenizer.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    weights = load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        kept = {name: weights[name][:5].clone()} if damage == "shape" else {}
        save_file({k: v for k, v in weights.items() if k != name} | kept, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=name if damage == "missing" else "save_pretrained"):
        load_model(str(tmp_path))


def test_a_tokenizer_without_template_is_refused(tmp_path):
    random = load_model("random")
    random.model.save_pretrained(tmp_path)
    random.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModelError, match="chat_template.jinja"):
        load_model(str(tmp_path))


def test_unknown_dtypes_are_refused():
    with pytest.raises(ValueError, match="float16"):
        load_model("random", dtype="float16")


def test_third_parties_can_add_models():
    loaded = load_model("random")
    MODELS.register("test-only")(lambda device, dtype, seed: loaded)
    try:
        assert load_model("test-only") is loaded
    finally:
        del MODELS._factories["test-only"]


def test_vocabulary(tokenizer):
    assert len(tokenizer) == 4096
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer("reservation HAT136, 2024-05-20")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids][2:5] == ["1", "3", "6"], "digits are tokens of their own"
    kept = tokenizer.decode(tokenizer("<tool_call>{}</tool_call><|im_end|>")["input_ids"], skip_special_tokens=True)
    assert kept == "<tool_call>{}</tool_call>"


@pytest.mark.parametrize("text", ["", " ", "a  b , c n't", "漢字 🙂 é\u0301\r\n\t", "\x00\x7f", "x" * 300])
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("first", range(len(THREAD)))
def test_a_longer_thread_begins_with_the_shorter_one(tokenizer, tools, first):
    thread = THREAD[first:]
    whole = tokenizer.apply_chat_template(thread, tools=tools)["input_ids"]
    for n in range(1, len(thread)):
        part = tokenizer.apply_chat_template(thread[:n], tools=tools)["input_ids"]
        assert whole[: len(part)] == part


def test_turns_are_written_verbatim(tokenizer):
    text = tokenizer.apply_chat_template(THREAD, tokenize=False, add_generation_prompt=True)
    call = '<tool_call>\n{"name": "find", "arguments": {"q": "ümlaut", "n": 1.5}}\n</tool_call>'
    bodies = [m["content"] or "" for m in THREAD]
    bodies[2] += f"\n{call}\n{call}"
    bodies[6] = call
    for i in (3, 4):
        bodies[i] = f"<tool_response>\n{bodies[i]}\n</tool_response>"
    turns = [f"<|im_start|>{m['role']}\n{body}<|im_end|>\n" for m, body in zip(THREAD, bodies, strict=True)]
    assert text == "".join(turns) + "<|im_start|>assistant\n"


def test_tools_stand_in_the_first_system_turn(tokenizer):
    listed = json.dumps(TOOLS[0], ensure_ascii=False)
    with_system = tokenizer.apply_chat_template(THREAD[:2], tools=TOOLS, tokenize=False)
    without = tokenizer.apply_chat_template(THREAD[1:2], tools=TOOLS, tokenize=False)
    assert listed in with_system.split("<|im_end|>")[0] and with_system.count("<|im_start|>system") == 1
    assert listed in without.split("<|im_end|>")[0] and without.startswith("<|im_start|>system\n# Tools")


def test_argument_text_is_kept_as_it_came(tokenizer):
    broken = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a":1'}]}
    text = tokenizer.apply_chat_template([broken], tokenize=False)
    assert '{"name": "f", "arguments": {"a":1}' in text


def test_the_build_script_reproduces_a_tokenizer(tmp_path):
    from kv_retract.reference.build_tokenizer import main

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat with the hat\n" * 50)
    chats = Path(__file__).parents[2] / "examples/data/tau_bench_airline_sample.jsonl"
    for out in ("one", "two"):
        main([str(corpus), str(chats), "--out", str(tmp_path / out)])
    files = [(tmp_path / out / "tokenizer.json").read_text() for out in ("one", "two")]
    assert files[0] == files[1]
    assert "Ġreservation" in json.loads(files[0])["model"]["vocab"]
