"""From logits to the next token, through the warpers of transformers."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..types import SamplingParams


class Sampler:
    """Draws tokens for one answer; greedy where the temperature is 0.

    Raises:
        ValueError: a parameter is out of range; the message names it.
    """

    def __init__(self, params: SamplingParams, device: torch.device | str = "cpu") -> None:
        if params.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {params.max_tokens}")
        if params.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {params.temperature}")
        if not 0 < params.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {params.top_p}")
        if params.top_k < 0:
            raise ValueError(f"top_k must not be negative (0: all), got {params.top_k}")
        self._greedy = params.temperature == 0
        self._warpers: list[LogitsProcessor] = (
            [] if self._greedy else [TemperatureLogitsWarper(float(params.temperature))]
        )
        if not self._greedy and params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if not self._greedy and params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(params.top_p))
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, logits: torch.Tensor) -> int:
        """Draw one token. Shape of logits: (vocab_size,)."""
        if self._greedy:
            return int(logits.argmax())
        scores = logits[None]
        for warp in self._warpers:
            scores = warp(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
