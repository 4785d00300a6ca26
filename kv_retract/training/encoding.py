"""Samples of the corpus as token ids for training: the thread, some probes behind it, and what may see what.

Writes the chat form of the bundled template by itself, which is fast; `tests/training` compares it with the renderer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Interval, Message, SpanRef
from .samples import CorpusSample, Probe

IntArray = NDArray[np.int64]
_END_OF_TURN = 2
"""Tokens behind a content that belong to its turn: `<|im_end|>` and a line break."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence."""

    ids: IntArray
    """Shape: (num_tokens,)"""
    answer: NDArray[np.bool_]
    """Tokens of answers, their end-of-turn included. Shape: (num_tokens,)"""
    probe: IntArray
    """Which probe a token belongs to, -1 for the thread. Shape: (num_tokens,)"""
    hidden: tuple[tuple[int, Interval], ...] = ()
    """(probe, interval): tokens of the thread that a probe must not see."""

    def visible(self) -> NDArray[np.bool_]:
        """Return who sees whom: earlier tokens of the thread and of the own probe, hidden ones left out.

        Shape: (num_tokens, num_tokens)
        """
        seen = np.tril(np.ones((len(self.ids), len(self.ids)), dtype=np.bool_))
        seen &= (self.probe[None, :] == -1) | (self.probe[None, :] == self.probe[:, None])
        for probe, (start, end) in self.hidden:
            rows = np.flatnonzero(self.probe == probe)
            seen[rows[0] : rows[-1] + 1, start:end] = False
        return seen


class RowEncoder:
    """Turns samples into rows.

    Args:
        tokenizer: the fast tokenizer of the model, with the bundled chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self.marks: frozenset[int] = frozenset(self._backend.get_added_tokens_decoder())
        """Tokens that are no part of running text: they begin and end turns, calls and results."""

    def length(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.ids(text))

    def ids(self, text: str) -> IntArray:
        """Return the tokens of a text; shape: (num_tokens,)."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def thread(
        self, sample: CorpusSample, *, with_tools: bool = True
    ) -> tuple[IntArray, Callable[[SpanRef], Interval]]:
        """Return the tokens of a thread, and what tells the tokens of a place in it."""
        text, at = thread_text(sample.messages, sample.tools if with_tools else ())
        encoding = self._backend.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets])
        ends = np.array([end for _, end in encoding.offsets])

        def tokens_of(ref: SpanRef) -> Interval:
            begin = at[ref.message]
            length = len(sample.messages[ref.message].content)
            first, last = begin + ref.start, begin + (length if ref.end is None else ref.end)
            return int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(starts, last, side="left"))

        return np.array(encoding.ids, dtype=np.int64), tokens_of

    def probe(self, question: str, answer: str) -> tuple[IntArray, IntArray]:
        """Return the tokens of a question with the generation prompt, and those of its answer."""
        asked, told = probe_text(question, answer)
        return self.ids(asked), self.ids(told)

    def encode(
        self,
        sample: CorpusSample,
        probes: Sequence[Probe],
        *,
        removed: Iterable[str] = (),
        hidden: Iterable[str] = (),
        notes_only: bool = False,
        with_tools: bool = True,
    ) -> Row:
        """Encode a thread with probes behind it.

        Args:
            sample: the thread.
            probes: each asked on the thread alone, and answered rightly.
            removed: ids of spans whose tokens are cut out.
            hidden: ids of spans that the probes they affect must not see, and yet answer as if they did.
            notes_only: such probes see the system message and later messages that name the subject of a hidden span,
                and nothing else of the thread.
            with_tools: whether the tools are listed in the first turn.
        """
        removed, hidden = set(removed), set(hidden)
        ids, tokens_of = self.thread(sample, with_tools=with_tools)
        where = {span.span_id: tokens_of(span.ref) for span in sample.spans}
        keep = np.ones(len(ids), dtype=np.bool_)
        for span_id in removed:
            keep[slice(*where[span_id])] = False
        moved = np.concatenate([[0], np.cumsum(keep)])
        ids = ids[keep]
        parts, answers, owners = [ids], [np.zeros(len(ids), np.bool_)], [np.full(len(ids), -1)]
        blind = []
        for number, probe in enumerate(probes):
            asked, told = self.probe(probe.question, answer_without(probe, removed))
            parts.append(np.concatenate([asked, told]))
            answers.append(np.repeat([False, True], [len(asked), len(told)]))
            owners.append(np.full(len(asked) + len(told), number))
            spans = hidden & set(probe.without)
            covered = [where[span_id] for span_id in spans]
            if spans and notes_only:
                notes = [tokens_of(SpanRef(index)) for index in _notes(sample, spans)]
                covered = _complement([(start, end + _END_OF_TURN) for start, end in notes], len(keep))
            blind += [(number, (int(moved[start]), int(moved[end]))) for start, end in covered]
        return Row(np.concatenate(parts), np.concatenate(answers), np.concatenate(owners), tuple(blind))


def thread_text(messages: Sequence[Message], tools: Sequence[Any] = ()) -> tuple[str, list[int]]:
    """Return a thread in the bundled chat form, and the character at which each content begins."""
    parts: list[str] = []
    length, at = 0, []

    def add(text: str) -> None:
        nonlocal length
        parts.append(text)
        length += len(text)

    for number, message in enumerate(messages):
        add(f"<|im_start|>{message.role}\n")
        if message.role == "tool":
            add("<tool_response>\n")
        at.append(length)
        add(message.content)
        if message.role == "tool":
            add("\n</tool_response>")
        if tools and number == 0 and message.role == "system":
            add(("\n\n" if message.content else "") + _tool_list(tools))
        for index, call in enumerate(message.tool_calls):
            name = json.dumps(call.name, ensure_ascii=False)
            add("\n" if message.content or index else "")
            add(f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments}}}\n</tool_call>')
        add("<|im_end|>\n")
    return "".join(parts), at


def probe_text(question: str, answer: str) -> tuple[str, str]:
    """Return a question with the generation prompt, and its answer, in the bundled chat form."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>\n"


def choose_spans(sample: CorpusSample, rng: random.Random, *, share: float) -> set[str]:
    """Draw spans that may be taken back together: no probe is affected by two of them."""
    chosen: set[str] = set()
    affected: set[str] = set()
    candidates = sorted({span_id for probe in sample.probes for span_id in probe.without})
    rng.shuffle(candidates)
    for span_id in candidates:
        questions = {probe.question for probe in sample.probes if span_id in probe.without}
        if rng.random() < share and not questions & affected:
            chosen.add(span_id)
            affected |= questions
    return chosen


def _notes(sample: CorpusSample, span_ids: Set[str]) -> list[int]:
    """Return the messages where notes on some spans can be: the first of all, and later ones that name a subject."""
    own = {sample.span(span_id).ref.message for span_id in span_ids}
    return sorted({0}.union(*(sample.mentions(span_id) for span_id in span_ids)) - own)


def _complement(intervals: Sequence[Interval], length: int) -> list[Interval]:
    """Return what ascending intervals leave of `length` tokens."""
    edges = [0, *(edge for interval in intervals for edge in interval), length]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def answer_without(probe: Probe, removed: Set[str]) -> str:
    """Return the right answer once some spans are taken back, of which at most one affects the probe."""
    changed = [probe.without[span_id] for span_id in removed if span_id in probe.without]
    assert len(changed) <= 1, "spans that are removed together affect different probes"
    return changed[0] if changed else probe.answer


def _tool_list(tools: Sequence[Any]) -> str:
    lines = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
    return (
        "# Tools\n\nYou may call these functions. Their signatures, one JSON object per line:\n<tools>\n"
        f"{lines}</tools>\n\nWrite each call as a JSON object with the name and the arguments of the function:\n"
        '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
    )
