"""JSON text as a tree whose every value knows which characters it stands in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..types import Interval

# Strings, brackets and separators, and whatever else has no white space in it: numbers and constants.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')

Place = tuple[str | int, ...]
"""Keys and indices from the root to a value."""


class Node(NamedTuple):
    """One value and its characters `[start, end)`, quotes and brackets included."""

    value: Any
    """Text, number, bool or None; `dict[str, Node]` for an object, `list[Node]` for a list."""
    start: int
    end: int


def parse(text: str) -> Node | None:
    """Parse an object or a list; None where `text` is anything else, or malformed, or nested too deeply."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        json.loads(text)  # so that the walk below may trust the order of tokens
        tokens = _TOKEN.finditer(text)
        return _node(tokens, next(tokens))
    except (ValueError, RecursionError):
        return None


def locate(text: str, places: Sequence[Place]) -> list[Interval]:
    """Return the characters of the values at `places`, each of which `json.loads(text)` has."""
    root = parse(text)
    assert root is not None, "the text was read before"
    found = []
    for place in places:
        node = root
        for key in place:
            node = node.value[key]
        found.append((node.start, node.end))
    return found


def _node(tokens: Iterator[re.Match[str]], first: re.Match[str]) -> Node:
    if first[0] == "{":
        return _object(tokens, first.start())
    if first[0] == "[":
        return _list(tokens, first.start())
    return Node(_scalar(first[0]), first.start(), first.end())


def _object(tokens: Iterator[re.Match[str]], start: int) -> Node:
    members: dict[str, Node] = {}
    token = next(tokens)
    while token[0] != "}":
        if token[0] != ",":
            next(tokens)  # the colon
            members[_scalar(token[0])] = _node(tokens, next(tokens))
        token = next(tokens)
    return Node(members, start, token.end())


def _list(tokens: Iterator[re.Match[str]], start: int) -> Node:
    items: list[Node] = []
    token = next(tokens)
    while token[0] != "]":
        if token[0] != ",":
            items.append(_node(tokens, token))
        token = next(tokens)
    return Node(items, start, token.end())


def _scalar(token: str) -> Any:
    if token[0] == '"' and "\\" not in token:
        return token[1:-1]
    return json.loads(token)
