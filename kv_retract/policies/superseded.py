"""Tool results that newer knowledge has replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from ..ledger.recent import Kept
from ..types import Guarantee, Message, Retraction, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .entities import OpenReads, entity_pairs
from .tool_results import DEFAULT_ERROR_PATTERN, ToolResult, any_glob, canonical
from .writers import DEFAULT_WRITERS, WriterTable

DEFAULT_READERS = (
    "get_*", "get[A-Z]*", "read*", "fetch_*", "list_*", "find_*", "search_*", "lookup_*", "query_*", "check_*",
    "describe_*", "show_*", "view*", "open", "goto", "cat", "ls", "find_file", "search_dir", "search_file",
)  # fmt: skip
"""Globs of tools that only read, so that repeating the same call replaces its earlier result. A tool that acts is not
among them: two equal bookings are two bookings."""

DEFAULT_KEYS = ("id", "*_id", "*Id", "*ID", "path", "*_path", "filename")
"""Globs of argument names that say which entity a call is about."""

DEFAULT_UNTIL_READ = ("open", "goto", "scroll_*", "create", "edit", "view*", "cat", "read_file", "*_read_file")
"""Globs of readers whose result stays after a write until the entity is read again: an old view of a file is still
the best knowledge of the parts that an edit did not touch."""


class _Event(NamedTuple):
    """What made a result stale, and when."""

    message: int
    reason: str


@register_policy("superseded")
@dataclass(kw_only=True)
class SupersededToolResult(RetractionPolicy):
    """Retract a tool result once a newer result of the same call, or a successful write on its entity, replaced it.

    Two rules. *Same call*: a successful result of a reader with equal arguments and another content replaces the
    older. *Write*: a successful call of a writer on the same entity makes an earlier read of it stale, at once, or
    for `until_read` tools with the next read. Results of failed calls neither replace nor are replaced.

    False positives: a write changes some fields, so the rest of the old read was still right, and nobody may have
    read the entity again; results that page through a list under equal arguments replace each other although all
    pages hold; an old view of a file goes as a whole even where the later view shows other lines; a user who asks
    "what was it before?" finds nothing. Deliberate comparisons over time (two prices, two measurements) need `readers`
    without those tools.
    """

    name: ClassVar[str] = "superseded"

    readers: Sequence[str] = DEFAULT_READERS
    """Globs of tools whose repeated call replaces its earlier result."""
    same_arguments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Glob of a reader to the names of the arguments that must be equal; by default all."""
    only_changed: bool = True
    """Whether an older result with equal content stays: it is repeated, not stale."""
    writers: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(DEFAULT_WRITERS))
    """Glob of a reader to globs of the tools that make its results stale; see `writers.py`. Empty: no such rule."""
    keys: Sequence[str] = DEFAULT_KEYS
    """Globs of argument names. Reader and writer speak of one entity where all of these that both have are equal, and
    at least one is."""
    until_read: Sequence[str] = DEFAULT_UNTIL_READ
    error_pattern: str = DEFAULT_ERROR_PATTERN
    guarantee: Guarantee = Guarantee.STEERED
    _table: Kept[WriterTable] = field(default_factory=lambda: Kept(WriterTable), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Accept the guarantee as text."""
        self.guarantee = Guarantee(self.guarantee)

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the stale results in message order; the first event that made one stale gives the reason."""
        results = [r for r in ctx.tool_results(self.error_pattern) if r.name and not r.failed]
        first: dict[int, _Event] = {}
        for message, event in self._repeated(results, ctx.messages) + self._written(results):
            first[message] = min(event, first.get(message, event))
        return [
            Retraction(span=SpanRef(message), policy=self.name, reason=first[message].reason, guarantee=self.guarantee)
            for message in sorted(first)
        ]

    def _repeated(self, results: Sequence[ToolResult], messages: Sequence[Message]) -> list[tuple[int, _Event]]:
        stale: list[tuple[int, _Event]] = []
        standing: dict[tuple[str, str], list[int]] = {}
        for result in results:
            if not any_glob(result.name, self.readers):
                continue
            key = (result.name, self._call_key(result))
            older = standing.get(key, [])
            if older and self.only_changed and messages[older[-1]].content == messages[result.message].content:
                older.append(result.message)
                continue
            event = _Event(result.message, f"{result.name} was called again alike; message {result.message} is newer")
            stale += [(message, event) for message in older]
            standing[key] = [result.message]
        return stale

    def _call_key(self, result: ToolResult) -> str:
        for glob, names in self.same_arguments.items():
            if any_glob(result.name, (glob,)):
                return canonical([result.arguments.get(name) for name in names])
        return result.raw_arguments

    def _written(self, results: Sequence[ToolResult]) -> list[tuple[int, _Event]]:
        stale: list[tuple[int, _Event]] = []
        table = self._table.of(dict(self.writers))
        reads = OpenReads()
        awaiting_read: dict[tuple[tuple[str, str], ...], list[tuple[int, str]]] = {}
        for result in results:
            pairs = entity_pairs(result.arguments, self.keys)
            if not pairs:
                continue
            for reader in table.stale_after(result.name, reads.readers()):
                for message in reads.take(reader, pairs):
                    reason = f"{result.name} in message {result.message} changed what {reader} had read"
                    if any_glob(reader, self.until_read):
                        awaiting_read.setdefault(tuple(pairs.items()), []).append((message, reason))
                    else:
                        stale.append((message, _Event(result.message, reason)))
            if table.is_reader(result.name):
                if any_glob(result.name, self.until_read):
                    outdated = awaiting_read.pop(tuple(pairs.items()), ())
                    stale += [(message, _Event(result.message, reason)) for message, reason in outdated]
                reads.add(result.name, pairs, result.message)
        return stale
