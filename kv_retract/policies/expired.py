"""Tool results whose time is over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

from ..errors import PolicyError
from ..types import Guarantee, Retraction, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .steps import answers_after
from .tool_results import ToolResult, any_glob

TIME_KEYS = ("timestamp", "*_timestamp", "as_of", "asOf", "fetched_at", "fetchedAt", "retrieved_at", "retrievedAt",
             "observed_at", "observedAt", "generated_at", "generatedAt", "quoted_at", "quotedAt")  # fmt: skip
"""Globs of keys that say when a result was true. `created_at` is not among them: it is when a thing was made."""

_MILLISECONDS = 1e11
# As seconds that is the year 5138, as milliseconds 1973: what is larger counts milliseconds.


@register_policy("expired")
@dataclass(kw_only=True)
class Expired(RetractionPolicy):
    """Retract a tool result once it is older than its tool's results stay true.

    Two limits. *Steps*: a message carries no time, so the answers of the model that follow are counted. *Seconds*: a
    time in the result's own JSON is compared with the moment of the step; where nobody knows that moment (a replayed
    trace) or the result has no time, this limit does nothing. A result that exceeds one of its limits goes.

    False positives: age is not falsehood. What expires may still be true, and may be all that the thread knows, so
    the model must be able to call the tool again; steps pass quickly in a busy minute, and slowly while a user is
    away. A time may tell of something else than the result (`time_keys`).
    """

    name: ClassVar[str] = "expired"

    steps: Mapping[str, int] = field(default_factory=dict)
    """Glob of a tool to how many answers may follow before its result goes; the first glob that matches counts."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Glob of a tool to the greatest age in seconds, likewise."""
    time_keys: Sequence[str] = TIME_KEYS
    """Globs of JSON keys, at any depth, that hold ISO 8601 text or Unix time (seconds or milliseconds). Text without
    an offset is UTC; a date without a time of day is no time. The newest counts."""
    guarantee: Guarantee = Guarantee.STEERED
    """What the retraction promises."""

    def __post_init__(self) -> None:
        """Accept the guarantee as text; raises PolicyError where there is no limit, or a limit is not positive."""
        self.guarantee = Guarantee(self.guarantee)
        if not (self.steps or self.seconds):
            raise PolicyError(
                "policy 'expired' has no limit; give steps or seconds per tool, as in steps={'get_weather*': 8}"
            )
        for name, limits in (("steps", self.steps), ("seconds", self.seconds)):
            for glob, limit in limits.items():
                if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
                    raise PolicyError(f"expected a positive number as {name} of {glob!r}, got {limit!r}")

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the expired results in message order, failed ones too."""
        after = answers_after(ctx.messages)
        proposals = []
        for result in ctx.tool_results():
            reason = self._too_many_steps(result, after[result.message]) or self._too_old(result, ctx)
            if reason:
                proposals.append(
                    Retraction(span=SpanRef(result.message), policy=self.name, reason=reason, guarantee=self.guarantee)
                )
        return proposals

    def _too_many_steps(self, result: ToolResult, answers: int) -> str:
        limit = _limit(result.name, self.steps)
        if limit is None or answers <= limit:
            return ""
        return f"results of {result.name} hold for {limit:g} steps"

    def _too_old(self, result: ToolResult, ctx: PolicyContext) -> str:
        limit = _limit(result.name, self.seconds)
        if limit is None or ctx.now is None:
            return ""
        time = newest_time(ctx.messages[result.message].content, self.time_keys)
        if time is None or (_utc(ctx.now) - time).total_seconds() <= limit:
            return ""
        return f"results of {result.name} hold for {limit:g} seconds"


def newest_time(content: str, keys: Sequence[str]) -> datetime | None:
    """Return the newest time under one of the globs `keys` in a JSON text; None where there is none."""
    if content.lstrip()[:1] not in ("{", "["):
        return None
    try:
        times = list(_times(json.loads(content), keys))
    except (ValueError, RecursionError):
        return None
    return max(times, default=None)


def _times(value: Any, keys: Sequence[str]) -> Iterator[datetime]:
    if isinstance(value, list):
        for item in value:
            yield from _times(item, keys)
    elif isinstance(value, dict):
        for name, member in value.items():
            if isinstance(member, dict | list):
                yield from _times(member, keys)
            elif any_glob(name, keys) and (time := _time(member)) is not None:
                yield time


def _time(value: Any) -> datetime | None:
    try:
        if isinstance(value, str):
            return _utc(datetime.fromisoformat(value)) if ":" in value or "T" in value else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value / 1000 if value >= _MILLISECONDS else value, UTC)
    except (ValueError, OverflowError, OSError):
        pass  # no time that a calendar has
    return None


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def _limit(tool: str, limits: Mapping[str, float]) -> float | None:
    return next((limit for glob, limit in limits.items() if any_glob(tool, (glob,))), None)
