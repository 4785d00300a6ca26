"""What bringing tokens back costs, beside reading them again."""

from __future__ import annotations

from typing import Any

import torch

from kv_retract.cache.keys import build_key

from .acre_arms import BiLayerArm, Place
from .arms import clock
from .jobs import LengthError
from .stats import median

REPEATS = 15


def refill_cost(place: Place) -> dict[str, Any]:
    """Time `WindowStore.refilled` against a prefill of as many tokens on an empty cache, interleaved.

    The blocks are chosen at random, other ones each time. What comes before in an answer, the attention to landmarks,
    is not part of it; nor is a prefill's attention to what stands before the tokens in the thread.

    Args:
        place: with a thread that has old windows.

    Returns:
        `tokens` that are brought back, `refill_ms` and `encode_ms` (medians of `n`), and `ratio` of the two.

    Raises:
        LengthError: the thread has no old window.
    """
    reader = BiLayerArm().open(place)
    reader.read(place.thread)
    engine, key = reader.engine, reader.key()
    moved, device = engine.settings.moved(len(key)), engine.spec.device
    if not moved:
        raise LengthError(f"a thread of {len(key)} tokens has no old window to refill from; pass a larger --times")
    lease = engine.windows.lease(key, moved)
    parts = engine.windows.parts(lease.slots)
    tokens = min(engine.settings.refill, len(parts.candidates))
    other, again = place.engine(tokens), build_key(place.thread.ids[:tokens], ())
    generator = torch.Generator().manual_seed(0)
    refill_ms: list[float] = []
    encode_ms: list[float] = []
    for repeat in range(REPEATS + 1):
        scores = torch.rand(engine.spec.num_layers, len(parts.landmarks), generator=generator).to(device)
        for refills in (True, False) if repeat % 2 else (False, True):
            started = clock(device)
            if refills:
                engine.windows.refilled(parts, scores, tokens)
            else:
                other.extend(again)
            took = (clock(device) - started) * 1e3
            other.purge(again, 0)
            if repeat:  # the first one warms up
                (refill_ms if refills else encode_ms).append(took)
    engine.windows.manager.release(lease)
    refill, encode = median(refill_ms), median(encode_ms)
    assert refill is not None and encode is not None, "there are repetitions"
    return {"tokens": tokens, "refill_ms": refill, "encode_ms": encode, "ratio": refill / encode, "n": REPEATS}
