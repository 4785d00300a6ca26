"""The loop that samples tokens and feeds them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..types import SamplingParams
from .base import GeneratedToken, LogitsProcessor
from .sampling import Sampler


def decode(
    logits: torch.Tensor,
    forward: Callable[[int], torch.Tensor],
    sampler: Sampler,
    sampling: SamplingParams,
    *,
    room: int,
    num_cached_tokens: int,
    logits_processor: LogitsProcessor | None = None,
) -> Iterator[GeneratedToken]:
    """Yield sampled tokens until an end token, `max_tokens`, or the end of the room.

    Args:
        logits: of the first token. Shape: (vocab_size,)
        forward: runs a token through the model and returns the logits of the next one.
        sampler: draws tokens.
        sampling: limits and end tokens.
        room: most tokens that fit behind the thread.
        num_cached_tokens: told on every token.
        logits_processor: may change logits.
    """
    ids: list[int] = []
    while True:
        if logits_processor is not None:
            logits = logits_processor(ids, logits.clone())  # in place must work outside inference mode
        token = sampler.sample(logits)
        stopped = token in sampling.stop_token_ids
        ids.append(token)
        done = stopped or len(ids) >= min(sampling.max_tokens, room)
        yield GeneratedToken(
            id=token,
            logprob=float(logits.log_softmax(-1)[token]) if sampling.logprobs else None,
            num_cached_tokens=num_cached_tokens,
            finish_reason="stop" if stopped else "length" if done else None,
        )
        if done:
            return
        logits = forward(token)
