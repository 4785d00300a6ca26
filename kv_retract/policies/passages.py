"""Where lines, sentences and string values begin and end in a tool's output: plain text, JSON, Python literals, YAML.

Offsets are of the output as it stands, escapes and quotes included, so that a range can be taken back from it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NamedTuple

from ..types import Interval

_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL)
"""String literals of JSON and Python."""

_ENTRY = re.compile(
    r"^[ ]*(?:-[ ]+)*(?:[\w./@-]{1,40}:[ ]+|(?<=-[ ]))"
    r"(?:'(?P<single>(?:[^']|'')*)'[ ]*$|\"(?P<double>(?:[^\"\\]|\\.)*)\"[ ]*$"
    r"|(?P<plain>[^\s'\"|>\[{&*!-][^\n]*(?:\n+[ ]{2,}(?!-[ ]|[\w./@-]{1,40}:(?:[ ]|$))\S[^\n]*)*))",
    re.MULTILINE | re.DOTALL,
)
"""Scalars of YAML: the value of a key, or an item of a list; a plain one goes on in lines that are indented."""

_OPENS_LITERAL = re.compile(r"\s*[\[{(]\s*(?:[\"'\[{(\]})]|-?\d|true|false|null|None|True|False)|\s*\"[^\n]*\"\s*\Z")
_OPENS_YAML = re.compile(r"\s*(?:-[ ]+)*(?:[\w./@-]{1,40}:(?:[ ]|$)|(?<=-[ ]))", re.MULTILINE)

_MARKUP = r"</?(?:p|div|br|li|ul|ol|td|th|tr|table|h[1-6]|body|html|code|pre)\b[^<>]{0,200}>"
_BREAKS = {
    # Of plain text: a line that is full may go on in the next, which then begins with a small letter or a number.
    "plain": re.compile(rf"\n[ \t]*\n|(?<=[.!?:;>)\]\"'])[ \t\r]*\n|\r?\n(?![ \t]*[a-z0-9($])|{_MARKUP}"),
    # YAML folds long lines: a blank line is what was a line break.
    "folded": re.compile(rf"\n[ \t]*\n|{_MARKUP}"),
    # In quotes with escapes a line break is written out; YAML folds these too.
    "escaped": re.compile(rf"(?<!\\)(?:\\\\)*\\[nr]|\n[ \t]*\n|{_MARKUP}"),
}
_PROSE = re.compile(r"[^\W\d_] [^\W\d_]|[^\x00-\x7f]{4}")
"""Two words side by side: what stands between values is punctuation, or text that only begins like one."""
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|[。！？]")  # noqa: RUF001
_BLANK = {
    "plain": re.compile(r"\s+"),
    "folded": re.compile(r"\s+"),
    "escaped": re.compile(r"(?:\s|\\[nrt]|\\(?=\s))+"),
}


class Value(NamedTuple):
    """A string value in a tool's output, quotes left out; the whole output where it is plain text."""

    start: int
    end: int
    style: str
    """How it writes line breaks: plain, folded, escaped."""


class Passages:
    """Lines and sentences around a place of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._values = _values(text)
        self._starts = [value.start for value in self._values]
        self._lines: dict[Value, list[Interval]] = {}
        self._pieces: dict[Interval, list[Interval]] = {}

    def value(self, at: int) -> Value:
        """Return the string value around `at`, or the whole text as plain text."""
        index = bisect_right(self._starts, at) - 1
        if index >= 0 and at <= self._values[index].end:
            return self._values[index]
        return Value(0, len(self.text), "plain")

    def lines(self, value: Value) -> list[Interval]:
        """Return the lines of a value, trimmed, in order; empty ones are left out."""
        if value not in self._lines:
            breaks = _BREAKS[value.style].finditer(self.text, value.start, value.end)
            edges = [value.start, *(edge for found in breaks for edge in found.span()), value.end]
            pairs = (self._trim(low, high, value.style) for low, high in zip(edges[::2], edges[1::2], strict=True))
            self._lines[value] = [(low, high) for low, high in pairs if low < high]
        return self._lines[value]

    def line(self, at: int) -> tuple[list[Interval], int]:
        """Return the lines of the value around `at` and the number of the one that holds it, or precedes it."""
        lines = self.lines(self.value(at)) or [(at, at)]
        return lines, max(0, bisect_right(lines, (at, len(self.text))) - 1)

    def sentence(self, at: int) -> Interval:
        """Return the sentence that holds `at`, within its line, with the space behind it."""
        lines, index = self.line(at)
        pieces = self._cut(lines[index])
        return pieces[max(0, bisect_right(pieces, (at, len(self.text))) - 1)]

    def sentences(self) -> list[Interval]:
        """Return the sentences of all string values, and of the prose outside of them, in order."""
        if not self._values:
            return [piece for line in self.lines(self.value(0)) for piece in self._cut(line)]
        edges = [0, *(edge for value in self._values for edge in value[:2]), len(self.text)]
        gaps = [
            Value(start, end, "plain")
            for start, end in zip(edges[::2], edges[1::2], strict=True)
            if _PROSE.search(self.text, start, end)
        ]
        values = sorted([*self._values, *gaps])
        return [piece for value in values for line in self.lines(value) for piece in self._cut(line)]

    def _cut(self, line: Interval) -> list[Interval]:
        if line not in self._pieces:
            start, end = line
            inner = (found.end() for found in _SENTENCE_END.finditer(self.text, start, end))
            cuts = [start, *(at for at in inner if at < end), end]
            self._pieces[line] = list(zip(cuts, cuts[1:], strict=False))
        return self._pieces[line]

    def _trim(self, start: int, end: int, style: str) -> Interval:
        blank = _BLANK[style]
        found = blank.match(self.text, start, end)
        start = found.end() if found else start
        while start < end and self.text[end - 1].isspace():
            end -= 1
        return start, end


def _values(text: str) -> list[Value]:
    if _OPENS_LITERAL.match(text):
        return [Value(*found.span(found.lastindex or 0), "escaped") for found in _LITERAL.finditer(text)]
    if not _OPENS_YAML.match(text):
        return []
    return [
        Value(*found.span(found.lastgroup or 0), "escaped" if found.lastgroup == "double" else "folded")
        for found in _ENTRY.finditer(text)
    ]
