"""Where the texts of messages stand in a rendered thread: from marks to places."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json import JSONDecoder
from typing import Any

from ..types import Message, ToolCall
from .located import LEFT_OUT, Located, Segment
from .marks import Found, MarkKey, Marks, bounds, escaped
from .pieces import pieces_of

Place = tuple[int, str, int]
"""(message, part, call): a message's content or one of its tool calls."""
Hide = Callable[[Any], Any]
"""`Guard.hide`."""

CALLS = "calls"
_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Style:
    """What is marked in one rendering."""

    groups: frozenset[str]
    """Roles, whose contents are marked, and `CALLS`."""
    edges: bool = True
    """Marks around the texts; else one in the middle of each content, for templates that look at its first words."""


def styles_for(messages: Sequence[Message]) -> Iterator[tuple[Style, ...]]:
    """Yield alternatives to try for the groups of messages; the first covers everything at once."""
    groups = {m.role for m in messages if m.content} | {CALLS for m in messages if m.tool_calls}
    yield (Style(frozenset(groups)),)
    for group in sorted(groups):
        only = Style(frozenset({group}))
        yield (only,) if group == CALLS else (only, replace(only, edges=False))


def mark_content(content: str, message: int, style: Style, marks: Marks, hide: Hide) -> str:
    """Return a content with marks in it; unchanged where it is white space only."""
    low, high = bounds(content)
    if low >= high:
        return str(hide(content))
    if not style.edges:
        middle = (low + high) // 2
        return f"{hide(content[:middle])}{marks.wrap('', ('m', message, 0))}{hide(content[middle:])}"
    inner, at = [], low
    for number, (start, end) in enumerate(pieces_of(content)):
        inner += [hide(content[at:start]), marks.wrap(hide(content[start:end]), ("c", message, number))]
        at = end
    inner.append(hide(content[at:high]))
    return marks.wrap("".join(inner), ("w", message, 0), content[:low], content[high:])


def mark_call(call: dict[str, Any], message: int, number: int, marks: Marks) -> None:
    """Put marks into a call as templates get it: around its name and around what tells where its arguments are."""
    call["name"] = marks.wrap(call["name"], ("n", message, number))
    arguments = call["arguments"]
    if isinstance(arguments, str):
        call["arguments"] = marks.wrap(arguments, ("r", message, number))
    elif arguments:
        items = list(arguments.items())
        last = items[-1][1]
        if isinstance(last, str):
            items[-1] = items[-1][0], marks.wrap(last, ("v", message, number))
        items[0] = marks.wrap(items[0][0], ("k", message, number)), items[0][1]
        call["arguments"] = dict(items)


def locate(
    text: str, found: Mapping[MarkKey, list[Found]], messages: Sequence[Message], style: Style
) -> dict[Place, Located]:
    """Find the contents and tool calls that `style` marks.

    Args:
        text: the template rendered without marks.
        found: what `Marks.read` found, in a rendering that equals `text` but for the marks.
        messages: what was rendered.
        style: which texts were marked, and how.

    Returns:
        Places by message and part, `LEFT_OUT` among them. What the template rewrote or repeated is missing.
    """
    places: dict[Place, Located | None] = {}
    for i, message in enumerate(messages):
        if message.role in style.groups and message.content.strip():
            places[i, "content", 0] = _content(text, found, i, message.content, style)
        if CALLS in style.groups:
            for c, call in enumerate(message.tool_calls):
                places[i, "tool_call", c] = _call(text, found, (i, c), call)
    return {place: located for place, located in places.items() if located}


def arguments_of(call: ToolCall) -> dict[str, Any] | str:
    """Return the arguments as chat templates expect them: an object where they are one, else the text."""
    try:
        value = json.loads(call.arguments)
        # Escapes may hide lone surrogates, which no tokenizer takes.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return call.arguments
    return value if isinstance(value, dict) else call.arguments


def _content(
    text: str, found: Mapping[MarkKey, list[Found]], message: int, content: str, style: Style
) -> Located | None:
    if not style.edges:
        return _around_point(text, found.get(("m", message, 0), []), content)
    pieces = pieces_of(content)
    places = [found.get(("c", message, number)) for number in range(len(pieces))]
    whole = found.get(("w", message, 0))
    if whole is None and all(at is None for at in places):
        return LEFT_OUT
    if len(whole or ()) > 1 or any(at is not None and len(at) != 1 for at in places):
        return None
    kept = [(*piece, at[0]) for piece, at in zip(pieces, places, strict=True) if at]
    low, high = bounds(content)
    if whole:
        edges = whole[0]
    elif kept:  # the template cut it: what it kept begins and ends with a piece
        edges = Found(kept[0][2].start, kept[-1][2].end)
    else:
        return None
    segments = [Segment(content[:low], edges.start - len(edges.head), edges.start)]
    done, at_text = low, edges.start
    for start, end, at in kept:
        if at.start < at_text:
            return None  # out of order
        segments += [Segment(content[done:start], at_text, at.start), Segment(content[start:end], at.start, at.end)]
        done, at_text = end, at.end
    segments.append(Segment(content[done:high], at_text, edges.end))
    segments.append(Segment(content[high:], edges.end, edges.end + len(edges.tail)))
    return Located(segments[0].start, segments[-1].end, tuple(s for s in segments if s.original))


def _around_point(text: str, points: Sequence[Found], content: str) -> Located | None:
    """Find a content from its middle: only where it stands verbatim or escaped as JSON on both sides."""
    low, high = bounds(content)
    middle = (low + high) // 2
    if len(points) != 1:
        return None
    for write in (str, escaped, lambda part: escaped(part, ascii_only=True)):
        start = points[0].start - len(write(content[low:middle]))
        end = points[0].start + len(write(content[middle:high]))
        if start >= 0 and text[start:end] == write(content[low:high]):
            edges = Segment(content[:low], start, start), Segment(content[high:], end, end)
            inner = Segment(content[low:high], start, end)
            return Located(start, end, tuple(s for s in (edges[0], inner, edges[1]) if s.original))
    return None


def _call(text: str, found: Mapping[MarkKey, list[Found]], where: tuple[int, int], call: ToolCall) -> Located | None:
    names = found.get(("n", *where))
    if names is None:
        return LEFT_OUT
    if not names:
        return None
    name = names[0]  # a template may repeat it with the call's result
    arguments = arguments_of(call)
    if isinstance(arguments, str):
        raw = found.get(("r", *where), [])
        inner = (raw[0].start, raw[0].end) if len(raw) == 1 else None
    else:
        keys = found.get(("k", *where), [])
        inner = _json_object(text, arguments, name.end, keys)
        values = found.get(("v", *where), [])
        if inner is None and len(keys) == len(values) == 1 and name.end <= keys[0].start <= values[0].end:
            return Located(name.start, values[0].end)  # not as JSON: one element for each argument
    if inner and name.end <= inner[0]:
        return Located(name.start, inner[1], (Segment(call.arguments, *inner),))
    # Without arguments the name is all there is to retract.
    return None if arguments else Located(name.start, name.end)


def _json_object(text: str, value: dict[str, Any], after: int, keys: Sequence[Found]) -> tuple[int, int] | None:
    """Find an object that a template wrote as JSON behind `after`, at the mark of its first key."""
    if value and len(keys) != 1:
        return None
    if value:
        start = keys[0].start - 1
        if start < after or text[start] != '"':
            return None
        while text[start - 1] in _SPACE:
            start -= 1
        start -= 1
    else:
        line = text.find("\n", after)
        start = text.find("{", after, line if line >= 0 else len(text))
    if start < after or not text.startswith("{", start):
        return None
    try:
        read, end = JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return (start, end) if json.dumps(read) == json.dumps(value) else None
