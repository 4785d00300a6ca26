"""The scores of a replay once more, with nothing but transformers: no cache, no renderer, no eraser of ours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from kv_retract.engine.models import load_model

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "tau_bench_airline_sample.jsonl"


def as_templates_want_it(message):
    """Arguments of calls as objects, not as text."""
    calls = [dict(call["function"]) for call in message.get("tool_calls") or ()]
    for call in calls:
        call["arguments"] = json.loads(call["arguments"])
    return {"role": message["role"], "content": message["content"] or "", "tool_calls": calls}


@pytest.fixture(scope="module")
def by_hand(sample_run):
    """Logits of the first retraction step of the first trace, for three readings of its thread."""
    result = sample_run[1]
    first = result.samples[0]
    (place,) = [(s.excerpt.message, s.tokens) for s in result.retracted if s.step == first.step]
    loaded = load_model(result.config["model"], seed=result.config["seed"])
    messages = [as_templates_want_it(m) for m in json.loads(SAMPLE.read_text().splitlines()[0])["traj"]]

    def render(count, prompt):
        return loaded.tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    prompt, whole = render(first.step, True), render(first.step + 1, False)
    encoded = loaded.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, begins = np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"])[:, 0]
    context = int((begins < len(prompt)).sum())
    begin = prompt.index(messages[place[0]]["content"], len(render(place[0], False)))
    span = (begins >= begin) & (begins < begin + len(messages[place[0]]["content"]))
    assert (context, span.sum()) == (first.context_tokens, place[1]), "both speak of the same tokens"
    end = context + first.tokens_scored - 1
    newest_answer = max(i for i in range(first.step) if messages[i]["role"] == "assistant")
    cached = int((begins < len(render(newest_answer + 1, False))).sum())

    def logits(keep, mask=None):
        chosen = torch.tensor(ids[:end][keep[:end]])[None]
        positions = torch.arange(end)[: chosen.shape[1]] if mask is None else torch.arange(end)
        with torch.inference_mode():
            output = loaded.model(
                chosen, position_ids=positions[None], attention_mask=mask, use_cache=False,
                logits_to_keep=first.tokens_scored,
            )  # fmt: skip
        return output.logits[0].numpy()

    everything = np.ones(len(ids), dtype=bool)
    # What came before the edit has read the span; what comes after it cannot.
    sees = np.tril(np.ones((end, end), dtype=bool))
    sees[cached:, span[:end]] = False
    return {
        "recompute": logits(~span),
        "none": logits(everything),
        "mask": logits(everything, torch.tensor(sees)[None, None]),
    }


@pytest.mark.parametrize("arm", ["recompute", "none", "mask"])
def test_divergence_and_agreement(sample_run, by_hand, arm):
    first = sample_run[1].samples[0]
    (sample,) = [s for s in sample_run[1].samples if (s.source, s.step, s.arm) == (first.source, first.step, arm)]
    p, q = (log_softmax(by_hand[name].astype(np.float64), axis=-1) for name in ("recompute", arm))
    assert sample.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3, abs=1e-9)
    assert sample.top1 == np.mean(p.argmax(-1) == q.argmax(-1))
    assert arm == "recompute" or sample.kl > 0.1, "the span shows, so that the comparison can fail"
