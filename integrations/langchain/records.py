"""Retraction records in an agent's checkpointed state: plain JSON, no tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kv_retract.types import RetractionRecord


def to_state(records: Iterable[RetractionRecord]) -> list[dict[str, Any]]:
    """Return records as built-in types only, so that any checkpointer can store them."""
    state: list[dict[str, Any]] = json.loads(json.dumps([record.to_json() for record in records]))
    return state


def from_state(state: Iterable[Mapping[str, Any]] | None) -> list[RetractionRecord]:
    """Read them back.

    Raises:
        ValueError: an entry is no retraction record.
    """
    return [RetractionRecord.from_json(entry) for entry in state or ()]


def merge(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join what several writers of one graph step keep; of one retraction the newest form stays. A LangGraph reducer.

    Records are never taken out of a state: a retraction that is undone is kept as `revoked`.
    """
    return list({entry.get("retraction_id"): dict(entry) for entry in (*old, *new)}.values())
