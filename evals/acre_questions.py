"""What is asked of long threads: probes of the corpus, and questions about a whole thread."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_retract.errors import SpanError
from kv_retract.training.samples import UNKNOWN
from kv_retract.types import SpanRef

from .acre_readers import LongThread

if TYPE_CHECKING:
    from kv_retract.ledger.render import Renderer
    from kv_retract.training.encoding import RowEncoder
    from kv_retract.training.samples import CorpusSample

OVERVIEW = "overview"
"""The task whose questions are about a whole thread; no model of the project was trained on such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a thread."""

    text: str
    right: str
    outdated: tuple[str, ...] = ()
    """Answers that would be right without one of the thread's spans, where these tell something."""
    named: bool = False
    """An answer is right where it names `right`, and need not be just that."""

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right."""
        if not self.named:
            return answer == self.right
        return re.search(rf"(?<![\w-]){re.escape(self.right)}(?![\w-])", answer) is not None

    def is_outdated(self, answer: str) -> bool | None:
        """Whether an answer is one of the outdated ones; None where there are none."""
        return answer in self.outdated if self.outdated else None


def family_of(task: str) -> str:
    """Return the family of a task's threads."""
    return "facts" if task == OVERVIEW else task


def long_thread(sample: CorpusSample, encoder: RowEncoder, renderer: Renderer) -> LongThread:
    """Return a sample as the model reads it."""
    ids, tokens_of = encoder.thread(sample)
    contents = []
    for number, message in enumerate(sample.messages):
        with suppress(SpanError):  # the template rewrites it, or leaves it out
            contents += [tokens_of(SpanRef(number))] if message.content else []
    return LongThread.of(ids, contents, renderer.stop_token_ids)


def questions_of(task: str, sample: CorpusSample, most: int) -> list[Question]:
    """Return what a task asks of a thread: probes that the thread tells something about, at most so many.

    Whoever has read nothing can say that he does not know, so what is unknown is not asked.
    """
    if task == OVERVIEW:
        return overview(sample)[:most]
    probes = [probe for probe in sample.probes if probe.answer != UNKNOWN]
    probes = random.Random(sample.sample_id).sample(probes, min(most, len(probes)))
    return [
        Question(
            text=probe.question, right=probe.answer,
            outdated=tuple(sorted({answer for answer in probe.without.values() if answer != UNKNOWN})),
        )
        for probe in probes
    ]  # fmt: skip


def overview(sample: CorpusSample) -> list[Question]:
    """Return questions about a whole thread: how many calls of tools there are, and what the first one was for."""
    calls = [call for message in sample.messages for call in message.tool_calls]
    [first, *_] = json.loads(calls[0].arguments).values()
    return [
        Question(text="How many times was a tool called in this conversation?", right=str(len(calls)), named=True),
        Question(text="For what was a tool called first in this conversation?", right=first, named=True),
    ]
