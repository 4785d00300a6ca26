"""Tool results and the calls that they answer, as policies look at them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from ..errors import PolicyError
from ..ledger.recent import remembered
from ..types import Message, SpanRef

DEFAULT_ERROR_PATTERN = (
    r"\s*(?:[Ee]rror\b|ERROR\b|\w*(?:Error|Exception):"
    r"|Traceback \(most recent call last\)"
    r"|Your proposed edit has introduced new syntax error"  # SWE-agent
    r"|Could not find \[)"  # ReAct over Wikipedia
)
"""Matched at the beginning of a tool result. tau-bench writes `Error: ...`."""

# Parsing every long JSON result would cost more than the rest of a policy; only these can say that it failed.
_MAY_SAY_ERROR = re.compile(r'"(?:error|errors|isError|is_error|status|success|ok)"\s*:', re.IGNORECASE)
_FAILED_STATUS = frozenset({"error", "failed", "failure"})


@dataclass(frozen=True, slots=True)
class ToolResult:
    """One tool message with the call that it answers."""

    message: int
    """Index of the tool message."""
    name: str
    """Name of the tool; empty where neither the message nor a call tells it."""
    arguments: Mapping[str, Any]
    """Parsed arguments of the call, shared and not to be changed; empty where there is no call or they are not a JSON
    object."""
    raw_arguments: str
    """Arguments as the model wrote them; normalised JSON where they parse."""
    call_message: int | None
    """Index of the assistant message that holds the call."""
    call: int
    """Which tool call of that message."""
    failed: bool
    """Whether the content says that the call failed."""

    def spans(self, *, include_call: bool) -> list[SpanRef]:
        """Return the place of the result, behind that of its call where asked for and known."""
        own = SpanRef(self.message)
        if not include_call or self.call_message is None:
            return [own]
        return [SpanRef(self.call_message, "tool_call", self.call), own]


class ToolReader:
    """Reads tool results; remembers what it parsed, since a thread only grows. Safe to share between threads."""

    def __init__(self) -> None:
        self._says_error, self._arguments = remembered(_says_error), remembered(_read_arguments)

    def results(self, messages: Sequence[Message], error_pattern: str = DEFAULT_ERROR_PATTERN) -> list[ToolResult]:
        """Pair tool messages with their calls, in message order; linear in the messages.

        A result belongs to the newest earlier call with its `tool_call_id` (some traces use an id twice). A result
        without an id belongs to the first call of the newest assistant message that has no result yet.

        Args:
            messages: the thread, oldest first.
            error_pattern: regular expression, matched at the beginning of the content.

        Raises:
            PolicyError: the pattern is not a regular expression.
        """
        failed = error_matcher(error_pattern, self._says_error)
        by_id: dict[str, tuple[int, int]] = {}
        open_calls: dict[tuple[int, int], None] = {}
        results = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                open_calls = {(index, call): None for call in range(len(message.tool_calls))}
                by_id.update({call.id: (index, number) for number, call in enumerate(message.tool_calls)})
            elif message.role == "tool":
                place = _answered(message, by_id, open_calls)
                if place is not None:
                    open_calls.pop(place, None)
                results.append(self._result(messages, index, place, failed(message.content)))
        return results

    def _result(
        self, messages: Sequence[Message], index: int, place: tuple[int, int] | None, failed: bool
    ) -> ToolResult:
        name = messages[index].name or ""
        if place is None:
            return ToolResult(index, name, {}, "", None, 0, failed)
        call = messages[place[0]].tool_calls[place[1]]
        arguments, raw = self._arguments(call.arguments)
        return ToolResult(index, call.name or name, arguments, raw, place[0], place[1], failed)


def tool_results(messages: Sequence[Message], error_pattern: str = DEFAULT_ERROR_PATTERN) -> list[ToolResult]:
    """Pair tool messages with their calls once; see `ToolReader.results`."""
    return ToolReader().results(messages, error_pattern)


def error_matcher(pattern: str, says_error: Callable[[str], bool]) -> ErrorMatcher:
    """Return a predicate on the content of tool results; raises PolicyError where `pattern` is malformed."""
    try:
        return ErrorMatcher(re.compile(pattern), says_error)
    except re.error as error:
        raise PolicyError(f"expected a regular expression for errors, got {pattern!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class ErrorMatcher:
    """Whether the content of a tool result says that the call failed."""

    pattern: re.Pattern[str]
    says_error: Callable[[str], bool]

    def __call__(self, content: str) -> bool:
        """True where the pattern matches, or a JSON object has an error key or a failed status."""
        if self.pattern.match(content):
            return True
        return content[:1].lstrip() in ("", "{") and self.says_error(content)


def _says_error(content: str) -> bool:
    if not content.lstrip().startswith("{") or not _MAY_SAY_ERROR.search(content):
        return False
    data = parse_object(content)
    status = data.get("status")
    return (
        any(bool(data.get(key)) for key in ("error", "errors", "isError", "is_error"))
        or (isinstance(status, str) and status.lower() in _FAILED_STATUS)
        or data.get("success") is False
        or data.get("ok") is False
    )


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; anything else, and malformed text, gives an empty dictionary."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def canonical(value: Any) -> str:
    """Return JSON text that is equal for equal values, whatever the order of keys and the white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def any_glob(name: str, globs: Sequence[str]) -> bool:
    """Whether a tool's name matches one of the globs, case-sensitively."""
    return _any_glob(name, tuple(globs))


@lru_cache(maxsize=4096)
def _any_glob(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _answered(
    message: Message, by_id: Mapping[str, tuple[int, int]], open_calls: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    if message.tool_call_id:
        return by_id.get(message.tool_call_id)
    return next(iter(open_calls), None)


def _read_arguments(text: str) -> tuple[Mapping[str, Any], str]:
    arguments = parse_object(text)
    return MappingProxyType(arguments), canonical(arguments) if arguments else text.strip()
