"""Contract of an eraser: edit the cached KV so that a span no longer influences what follows."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..cache.base import EditView
from ..registry import Registry

ERASERS: Registry[Eraser] = Registry("eraser", "kv_retract.erasers")
register_eraser = ERASERS.register


@dataclass(frozen=True, slots=True, kw_only=True)
class EditShape:
    """Size of an edit, for cost models; all in tokens."""

    prefix: int
    """Before the first span."""
    span: int
    """In all spans together."""
    suffix: int
    """Cached after the first span, spans not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditCost:
    """What an edit will cost; all in tokens."""

    recomputed: int = 0
    """Tokens through the model."""
    moved: int = 0
    """Tokens whose KV is rewritten without the model."""


@dataclass(kw_only=True)
class Eraser(ABC):
    """Strategy of one edit; the dataclass fields are its hyper-parameters.

    An eraser keeps no state between edits and may serve several threads. Lengths stay: the span's entries remain in
    the key as tombstones. Positions stay unless `closes_gap`.
    """

    name: ClassVar[str]
    closes_gap: ClassVar[bool] = False
    """Whether entries after a span move up by its length (delete-and-shift) instead of keeping their positions."""
    exact: ClassVar[bool] = False
    """Whether the result equals a fresh prefill without the span; then the span leaves the key altogether."""
    needs_notice: ClassVar[bool] = False
    """Whether the method is text told to the model: the session appends a notice to the newest message."""

    @property
    def suffix_free(self) -> bool:
        """Whether what the span becomes depends on nothing behind it: threads that share the span share the edit.

        Once one of several threads with the same beginning has been edited, the others take over its states.
        """
        return False

    @property
    def eraser_id(self) -> str:
        """Name and hyper-parameters, as in `repair(tokens=32)`; part of the tombstones."""
        fields = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({fields})" if fields else self.name

    @abstractmethod
    def cost(self, shape: EditShape) -> EditCost:
        """Predict the cost of an edit, for the planner."""

    @abstractmethod
    def erase(self, view: EditView) -> None:
        """Edit `view` in place. Deterministic; raises before the first write where it cannot work."""
