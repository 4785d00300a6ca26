"""How models write tool calls in their answers, and how to read them back."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from ..registry import Registry
from ..types import ToolCall
from .json_text import members, value_end

Found = tuple[int, int, list[ToolCall]]
"""Half-open interval of characters that the calls take, and the calls."""


class ToolCallFormat(ABC):
    """Finds tool calls in what a model wrote. Stateless.

    What cannot be read as a call is left in the content: models write malformed ones, and nothing is lost silently.
    """

    name: ClassVar[str]
    """As in `TOOL_CALL_FORMATS`; of several names there, the first."""
    begin: ClassVar[str]
    """Where a stream may have to hold text back: a call begins with it."""
    end: ClassVar[str]
    """What ends a call; empty where only its own syntax does."""
    keep: ClassVar[tuple[str, ...]] = ()
    """Strings that some tokenizers hold as special tokens and that decoding must not leave out."""
    example: ClassVar[str]
    """One call, as the model would write it."""

    @abstractmethod
    def find(self, text: str) -> Iterator[Found]:
        """Yield the well-formed calls, in order, without overlap."""

    def parse(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Split an answer into its content and its calls.

        Returns:
            The content, trimmed where calls were taken out of it and unchanged where there are none; and the calls,
            with fresh ids and the arguments as they were written.
        """
        calls: list[ToolCall] = []
        content: list[str] = []
        at = 0
        for start, end, found in self.find(text):
            content.append(text[at:start].strip())
            calls += found
            at = end
        if not calls:
            return text, ()
        content.append(text[at:].strip())
        return "\n".join(filter(None, content)), tuple(calls)


TOOL_CALL_FORMATS: Registry[ToolCallFormat] = Registry("tool call format", "kv_retract.tool_call_formats")
"""By the names that SGLang's `--tool-call-parser` takes."""


@TOOL_CALL_FORMATS.register("hermes")
@TOOL_CALL_FORMATS.register("qwen25")
class HermesToolCalls(ToolCallFormat):
    """`<tool_call>` around a JSON object with `name` and `arguments`: Hermes, Qwen2.5, Qwen3."""

    name = "hermes"
    begin = "<tool_call>"
    end = "</tool_call>"
    keep = (begin, end)
    example = '<tool_call>\n{"name": "search", "arguments": {"query": "weather"}}\n</tool_call>'

    _open = re.compile(r"<tool_call>\s*(?=\{)")
    _close = re.compile(r"\s*(?:</tool_call>|\Z)")  # a stop string may have eaten the closing tag

    def find(self, text: str) -> Iterator[Found]:
        """See the base class."""
        at = 0
        while match := self._open.search(text, at):
            at = match.end()
            read = _call_object(text, at, "arguments")
            close = self._close.match(text, read[1]) if read else None
            if read and close:
                at = close.end()
                yield match.start(), at, [read[0]]


@TOOL_CALL_FORMATS.register("llama3")
class Llama3JsonToolCalls(ToolCallFormat):
    """JSON objects with `name` and `parameters` on lines of their own, or joined by semicolons: Llama 3."""

    name = "llama3"
    begin = '{"name":'
    end = "}"
    keep = ("<|python_tag|>",)
    example = '{"name": "search", "parameters": {"query": "weather"}}'

    # Possessive, and blank lines left out: no white space is walked over twice.
    _open = re.compile(r"(?:(?:^|(?<=;))[^\S\n]*+(?:<\|python_tag\|>\s*+)?|<\|python_tag\|>\s*+)(?=\{)", re.MULTILINE)
    _close = re.compile(r"[^\S\n]*(?:;|(?=\n)|\Z)")

    def find(self, text: str) -> Iterator[Found]:
        """See the base class."""
        at = 0
        while match := self._open.search(text, at):
            at = match.end()
            read = _call_object(text, at, "parameters", "arguments")
            close = self._close.match(text, read[1]) if read else None
            if read and close:
                at = close.end()
                yield match.start(), at, [read[0]]
            else:
                at += 1


@TOOL_CALL_FORMATS.register("mistral")
class MistralToolCalls(ToolCallFormat):
    """`[TOOL_CALLS]` before a JSON list of objects with `name` and `arguments`, or before `name[ARGS]{...}`."""

    name = "mistral"
    begin = "[TOOL_CALLS]"
    end = ""
    keep = (begin, "[ARGS]", "[CALL_ID]")
    example = '[TOOL_CALLS][{"name": "search", "arguments": {"query": "weather"}}]'

    _list = re.compile(r"\[TOOL_CALLS\]\s*\[\s*")
    _named = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
    _next = re.compile(r"\s*(,|\])\s*")

    def find(self, text: str) -> Iterator[Found]:
        """See the base class."""
        at = 0
        while (start := text.find(self.begin, at)) >= 0:
            at = start + len(self.begin)
            read = self._read_list(text, start) or self._read_named(text, start)
            if read:
                at = read[1]
                yield start, at, read[0]

    def _read_list(self, text: str, start: int) -> tuple[list[ToolCall], int] | None:
        match = self._list.match(text, start)
        calls = []
        while match and (read := _call_object(text, match.end(), "arguments")):
            calls.append(read[0])
            match = self._next.match(text, read[1])
            if match and match[1] == "]":
                return calls, match.end(1)
        return None

    def _read_named(self, text: str, start: int) -> tuple[list[ToolCall], int] | None:
        match = self._named.match(text, start)
        end = value_end(text, match.end()) if match else None
        if match is None or end is None:
            return None
        return [ToolCall(_fresh_id(), match[1], text[match.end() : end])], end


def format_for_template(template: str) -> ToolCallFormat:
    """Guess from a chat template how its model writes tool calls; Hermes where nothing tells."""
    if "[TOOL_CALLS]" in template:
        return MistralToolCalls()
    if "<tool_call>" not in template and ("<|python_tag|>" in template or re.search(r'"parameters\\?"\s*:', template)):
        return Llama3JsonToolCalls()
    return HermesToolCalls()


def _call_object(text: str, at: int, *argument_keys: str) -> tuple[ToolCall, int] | None:
    """Read one call from a JSON object that begins at `at`; return it and where it ends."""
    read = members(text, at)
    if read is None:
        return None
    found, end = read
    name = _text(found.get("name", ""))
    raw = next((found[key] for key in argument_keys if key in found), None)
    if not name or raw is None:
        return None
    # Some models write the arguments as a string that holds JSON.
    arguments = raw if raw.startswith("{") else _text(raw)
    return (ToolCall(_fresh_id(), name, arguments), end) if arguments is not None else None


def _text(raw: str) -> str | None:
    """Return the value of a JSON string; None for anything else, and for text that is not valid Unicode."""
    if not raw.startswith('"'):
        return None
    value = json.loads(raw)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return str(value)


def _fresh_id() -> str:
    return f"call_{uuid.uuid4().hex}"
