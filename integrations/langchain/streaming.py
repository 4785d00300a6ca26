"""Pieces of an answer while it is decoded: text as it comes, tool calls once they are whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from typing import Any, TypeVar

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from kv_retract.ledger.tool_calls import ToolCallFormat
from kv_retract.types import StepDelta, StepResult

from .messages import metadata, usage

T = TypeVar("T")
_END: Any = object()


class AnswerStream:
    """Turns the deltas of one step into LangChain's chunks.

    The text of tool calls never shows up as content: it is held back from the string that begins a call, and white
    space before it too. Joined, the chunks are the message that `to_ai_message` makes; only white space at the very
    beginning, which that leaves out where calls follow, may be out already.

    Args:
        calls: how the model writes tool calls.
        model_name: for `response_metadata`.
    """

    def __init__(self, calls: ToolCallFormat, *, model_name: str) -> None:
        # Marks such as <|python_tag|> may stand before a call or in its place.
        self._begins = (calls.begin, *calls.keep)
        self._model_name = model_name
        self._text = ""
        self._emitted = 0

    def push(self, delta: StepDelta) -> ChatGenerationChunk | None:
        """Add a piece; return a chunk where there is something to show."""
        self._text += delta.text
        if delta.result is not None:
            return self._last(delta.result)
        end = self._safe_end()
        if end <= self._emitted:
            return None
        text, self._emitted = self._text[self._emitted : end], end
        return ChatGenerationChunk(message=AIMessageChunk(content=text))

    def _safe_end(self) -> int:
        """Return where the text ends that is content whatever comes."""
        return len(self._text[: min(self._held_from(begin) for begin in self._begins)].rstrip())

    def _held_from(self, begin: str) -> int:
        """Return where the string begins, wholly or as far as the text goes."""
        at = self._text.find(begin)
        if at >= 0:
            return at
        return len(self._text) - max((n for n in range(1, len(begin)) if self._text.endswith(begin[:n])), default=0)

    def _last(self, result: StepResult) -> ChatGenerationChunk:
        shown, content = self._text[: self._emitted], result.message.content
        # Where calls were taken out of the text, the content is trimmed on both sides.
        shown = shown if content.startswith(shown) else shown.strip()
        message = AIMessageChunk(
            content=content.removeprefix(shown),
            tool_call_chunks=[
                tool_call_chunk(name=call.name, args=call.arguments, id=call.id, index=i)
                for i, call in enumerate(result.message.tool_calls)
            ],
            usage_metadata=usage(result),
            response_metadata=metadata(result, model_name=self._model_name),
            chunk_position="last",
        )
        info = {"finish_reason": result.finish_reason}
        return ChatGenerationChunk(message=message, generation_info=info)


async def in_thread(pieces: Generator[T, None, None]) -> AsyncIterator[T]:
    """Drive a generator in worker threads, so that decoding never blocks the event loop.

    Leaving the iteration early, or cancelling it, closes the generator after its current piece.
    """
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(asyncio.to_thread(next, pieces, _END))
            piece = await asyncio.shield(pending)
            if piece is _END:
                return
            yield piece
    finally:
        if pending is not None and not pending.done():
            await asyncio.wait({pending})  # a generator cannot be closed while it runs
        await asyncio.to_thread(pieces.close)
