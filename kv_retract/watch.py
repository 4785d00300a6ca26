"""How long the parts of one step took, for those who watch (`events.Stepped`)."""

from __future__ import annotations

import time
from dataclasses import replace

from .events import Stepped, now
from .types import StepDelta


class StepWatch:
    """Begins with a step; `event` says what came of it."""

    def __init__(self, thread_id: str, model: str) -> None:
        self._began = time.perf_counter()
        self._event = Stepped(
            thread_id=thread_id, model=model, retract_ms=0.0, first_token_ms=None, total_ms=0.0, finish_reason="closed"
        )

    def retracted(self) -> None:
        """What there was to retract is retracted."""
        self._event = replace(self._event, retract_ms=self._ms())

    def saw(self, delta: StepDelta) -> None:
        """A piece of the answer came."""
        if delta.token_ids and self._event.first_token_ms is None:
            self._event = replace(self._event, first_token_ms=self._ms())
        if (result := delta.result) is not None:
            self._event = replace(
                self._event,
                num_prompt_tokens=result.num_prompt_tokens,
                num_cached_tokens=result.num_cached_tokens,
                num_completion_tokens=result.num_completion_tokens,
                finish_reason=result.finish_reason,
            )

    def failed(self, error: Exception) -> None:
        """The step raised."""
        self._event = replace(self._event, finish_reason="error", error=type(error).__name__)

    def event(self) -> Stepped:
        """Return the event, as of now."""
        return replace(self._event, total_ms=self._ms(), at=now())

    def _ms(self) -> float:
        return (time.perf_counter() - self._began) * 1e3
