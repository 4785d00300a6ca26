"""From blocks of messages to a sample: order, filler between them, mentions behind them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..types import Message, SpanRef, ToolCall
from .names import Names, Split
from .samples import CorpusSpan, Probe
from .templates import ASK, DONE, MENTION_ASSISTANT, MENTION_USER, SYSTEM, choose

TextLength = Callable[[str], int]
"""Tokens of a text; `characters // 4` where no tokenizer is at hand."""
_TURN, _CALL = (5, 9), 13
"""Tokens that the chat template adds to a message (not of a tool, of a tool) and to a call."""
RESULT = 2
"""Which message of `Writer.exchange` is the tool's result."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A retractable span of a block: characters of one of its messages."""

    span_id: str
    kind: str
    subject: str
    at: int
    """Index in the block."""
    start: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Messages that stay together, in order."""

    messages: tuple[Message, ...]
    marks: tuple[Mark, ...] = ()
    subjects: tuple[str, ...] = ()
    """What later messages may mention."""


@dataclass(slots=True)
class Draft:
    """What a family writes."""

    blocks: list[Block] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    tools: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Writer:
    """What families write with: chance, names and wordings of one split."""

    rng: random.Random
    split: Split
    names: Names
    size: int
    """How many things the sample is about; grows with its length."""
    mentions: float
    """Probability that a subject is mentioned again."""
    _calls: int = 0

    def say(self, wordings: Sequence[str], **values: str) -> str:
        """Return one of several wordings."""
        return choose(self.rng, self.split, wordings, **values)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolCall:
        """Return a call with an id of its own."""
        self._calls += 1
        return ToolCall(f"call_{self._calls}", tool, json.dumps(arguments))

    def look_up(self, what: str, tool: str, arguments: Mapping[str, str], result: str) -> tuple[Message, ...]:
        """Return the exchange in which something is looked up; the reply does not repeat the result."""
        return self.exchange(self.say(ASK, what=what), tool, arguments, result, self.say(DONE))

    def exchange(
        self, request: str, tool: str, arguments: Mapping[str, str], result: str, reply: str
    ) -> tuple[Message, ...]:
        """Return a user's request, the call, its result (`RESULT`), and the reply."""
        call = self.call(tool, arguments)
        return (
            Message("user", request),
            Message("assistant", tool_calls=(call,)),
            Message("tool", result, tool_call_id=call.id, name=tool),
            Message("assistant", reply),
        )

    def mention(self, subject: str) -> Block:
        """Return a turn that names a subject and says nothing of it."""
        return Block(
            (
                Message("user", self.say(MENTION_USER, subject=subject)),
                Message("assistant", self.say(MENTION_ASSISTANT, subject=subject)),
            )
        )

    def shuffled(self, blocks: Sequence[Sequence[Block]]) -> list[Block]:
        """Interleave sequences of blocks at random; each sequence keeps its order."""
        order = [i for i, sequence in enumerate(blocks) for _ in sequence]
        self.rng.shuffle(order)
        iterators = [iter(sequence) for sequence in blocks]
        return [next(iterators[i]) for i in order]


def function_tool(name: str, parameter: str, what: str) -> Mapping[str, Any]:
    """Return an OpenAI function tool with one text parameter."""
    properties = {parameter: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": f"Look up {what}.", "parameters": parameters}}


def assemble(
    draft: Draft, writer: Writer, filler: Callable[[], Block], *, length: int, tokens: TextLength
) -> tuple[tuple[Message, ...], tuple[CorpusSpan, ...]]:
    """Put a system prompt in front, mentions behind what they mention, and filler in between.

    Args:
        draft: blocks in order.
        writer: of the sample.
        filler: returns blocks that concern nothing of the draft.
        length: tokens of all texts together, to be reached by filler; a draft that is longer stays as it is.
        tokens: length of a text.

    Returns:
        Messages, and spans in their order.
    """
    blocks: list[Block] = []
    for block in draft.blocks:
        blocks.append(block)
        for subject in block.subjects:
            if writer.rng.random() < writer.mentions:
                blocks.append(writer.mention(subject))
    system = Message("system", writer.say(SYSTEM))
    left = length - sum(_length(block, tokens) for block in blocks) - tokens(system.content)
    padding: list[Block] = []
    while left > 0:
        padding.append(filler())
        left -= _length(padding[-1], tokens)
    # What a thread is about does not begin or end at a fixed distance from its ends.
    blocks = writer.shuffled([blocks, padding[:-1] if left < -20 else padding])
    messages, spans = [system], []
    for block in blocks:
        for mark in block.marks:
            ref = SpanRef(len(messages) + mark.at, start=mark.start, end=mark.end)
            spans.append(CorpusSpan(span_id=mark.span_id, kind=mark.kind, ref=ref, subject=mark.subject))
        messages += block.messages
    return tuple(messages), tuple(spans)


def _length(block: Block, tokens: TextLength) -> int:
    return sum(_TURN[m.role == "tool"] + tokens(m.content) for m in block.messages) + sum(
        _CALL + tokens(call.name + call.arguments) for m in block.messages for call in m.tool_calls
    )
