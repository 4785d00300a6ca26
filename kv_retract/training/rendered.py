"""Samples of the corpus as token ids in any chat form: for models that do not speak the bundled template. Slower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..ledger.render import Renderer
from ..reference import MODEL_DIR
from ..types import Interval, Message, SpanRef
from .encoding import IntArray, RowEncoder
from .samples import CorpusSample

_BEFORE = (Message("user", "Good morning."), Message("assistant", "Good morning."))
"""A thread to which a probe is appended, to see what the template writes for it."""


class RenderedEncoder(RowEncoder):
    """As `RowEncoder`, by the tokenizer's own chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template that only appends to what it has written.

    Raises:
        ValueError: the template writes something else for a turn once another one follows.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._renderer = Renderer(tokenizer)
        self._before = self._renderer.render(_BEFORE, add_generation_prompt=False).ids
        self.probe("Is it?", "It is.")

    def thread(
        self, sample: CorpusSample, *, with_tools: bool = True
    ) -> tuple[IntArray, Callable[[SpanRef], Interval]]:
        """Return the tokens of a thread, and what tells the tokens of a place in it."""
        tools = sample.tools if with_tools else None
        rendering = self._renderer.render(sample.messages, tools=tools, add_generation_prompt=False)
        return rendering.ids, rendering.interval

    def probe(self, question: str, answer: str) -> tuple[IntArray, IntArray]:
        """Return the tokens of a question with the generation prompt, and those of its answer."""
        turns = [*_BEFORE, Message("user", question)]
        asked = self._renderer.render(turns).ids
        told = self._renderer.render([*turns, Message("assistant", answer)], add_generation_prompt=False).ids
        start = len(self._before)
        if not (np.array_equal(asked[:start], self._before) and np.array_equal(told[: len(asked)], asked)):
            raise ValueError(
                "the chat template rewrites earlier turns: probes cannot be appended to a thread; use a template that "
                "only appends (no default system prompt per turn, no reasoning that is dropped later)"
            )
        return asked[start:], told[len(asked) :]


def encoder_for(tokenizer: Any) -> RowEncoder:
    """Return what encodes samples for a tokenizer: the fast one where it has the bundled chat template."""
    bundled = (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    return RowEncoder(tokenizer) if tokenizer.chat_template == bundled else RenderedEncoder(tokenizer)
