"""What a server has to answer: the embedded engine's greedy tokens on the same model and edit."""

import numpy as np

from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.erasers import ERASERS
from kv_retract.types import SamplingParams

SPAN = (60, 80)
ASK = slice(380, 400)
"""Tokens of the next turn."""


def embedded(engine, ids, spans, eraser, ask, n=8):
    """What the embedded engine answers on the same edit: ids and log-probabilities."""
    made = ERASERS.create(eraser) if isinstance(eraser, str) else eraser
    edits = [KeyEdit(start=a, end=b, exact=made.exact, eraser_id=made.eraser_id, retraction_id="r") for a, b in spans]
    old = build_key(ids, ())
    engine.extend(old)
    engine.erase(old, spans, made, build_key(ids, edits))
    return answer(engine, build_key(np.concatenate([ids, ask]), edits), n)


def answer(engine, key, n=8):
    told = list(engine.generate(key, SamplingParams(max_tokens=n, temperature=0.0, logprobs=True)))
    return [t.id for t in told], np.array([t.logprob for t in told])


def assert_same(told, wanted, tolerance=1e-5):
    ids, logprobs = wanted
    assert told["ids"] == ids
    difference = np.abs(told["logprobs"] - logprobs)
    print(f"log-probabilities differ by {difference.max():.2e} at most, {difference.mean():.2e} in the mean")
    assert difference.max() < tolerance
