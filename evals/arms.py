"""Arms of a replay: one session each, in a namespace of its own, all on one engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kv_retract.cache.base import ThreadKey
from kv_retract.engine.base import ExtendResult, LocalEngine
from kv_retract.erasers.base import ERASERS
from kv_retract.errors import KVRetractError
from kv_retract.ledger.render import Renderer
from kv_retract.planner import Planner
from kv_retract.session import KVRetractSession
from kv_retract.types import Message, Retraction, RetractionPlan

from .specs import Spec

REFERENCE = "recompute"
"""The arm that all others are compared with."""

Tools = Sequence[Mapping[str, Any]]


class ArmError(KVRetractError, RuntimeError):
    """An eraser failed."""


class Arm:
    """One eraser and the threads that it edits.

    Args:
        spec: the eraser.
        engine: shared by all arms.
        renderer: shared by all arms.

    Raises:
        UnknownNameError: no eraser has the name.
        SpecError: the eraser refuses the parameters.
    """

    def __init__(self, spec: Spec, engine: LocalEngine, renderer: Renderer) -> None:
        self.label = spec.label
        # exact_suffix=0: the planner would recompute short suffixes, and hide what the eraser does there.
        self.session = KVRetractSession(
            engine,
            renderer,
            eraser=spec.create(ERASERS),
            planner=Planner(exact_suffix=0),
            extra_key=f"arm {spec.label}",
        )
        self._engine = engine
        self._used: list[ThreadKey] = []

    def key(
        self, thread_id: str, messages: Sequence[Message], tools: Tools | None, *, add_generation_prompt: bool = True
    ) -> ThreadKey:
        """Return the key of a thread with this arm's retractions applied."""
        return self.session.key(thread_id, messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def retract(
        self, thread_id: str, messages: Sequence[Message], tools: Tools | None, proposals: Sequence[Retraction]
    ) -> RetractionPlan:
        """Take proposals back, as `KVRetractSession.retract`.

        Raises:
            ArmError: the eraser failed; the message names it.
        """
        try:
            return self.session.retract(thread_id, messages, tools=tools, proposals=proposals)
        except (KVRetractError, AssertionError):
            raise
        except Exception as error:
            raise ArmError(f"eraser {self.label!r} failed: {type(error).__name__}: {error}") from error

    def extend(self, key: ThreadKey, *, num_last: int = 1) -> tuple[ExtendResult, float]:
        """Bring a key's cache up to date; return the result and the milliseconds it took, device included."""
        self._used.append(key)
        started = clock(self._engine.spec.device)
        result = self._engine.extend(key, num_last=num_last)
        return result, (clock(self._engine.spec.device) - started) * 1e3

    def forget(self) -> None:
        """Drop from the cache whatever was extended since the last call."""
        for key in reversed(self._used):
            self._engine.drop(key, 0)
        self._used.clear()


def clock(device: str) -> float:
    """Return the time in seconds once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(torch.device(device))
    return time.perf_counter()
