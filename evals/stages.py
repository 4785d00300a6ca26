"""Exclusive wall time of the stages of a call, measured from outside: functions are wrapped for as long as it takes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

Targets = Mapping[str, Sequence[tuple[Any, str]]]
REST = "rest"
"""What no stage accounts for."""


class Stages:
    """A stopwatch per stage. What a stage calls in another stage counts there and not here.

    Only the Python thread that measures is watched; others run through the wrappers unmeasured.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stack: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._owner = threading.get_ident()

    @contextmanager
    def measuring(self) -> Iterator[dict[str, float]]:
        """Measure what the block does; the dictionary holds the seconds of its stages once the block is left."""
        self._seconds = defaultdict(float)
        self._owner = threading.get_ident()
        self._since = self._clock()
        self._stack = [REST]
        found: dict[str, float] = {}
        try:
            yield found
        finally:
            self._note()
            self._stack = []
            found.update(self._seconds)

    def enter(self, stage: str) -> None:
        """Begin a stage inside of the one at work."""
        if self._stack and threading.get_ident() == self._owner:
            self._note()
            self._stack.append(stage)

    def leave(self) -> None:
        """End the newest stage."""
        if len(self._stack) > 1 and threading.get_ident() == self._owner:
            self._note()
            self._stack.pop()

    def wrapped(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """Return a function that does the same as a stage."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed

    @contextmanager
    def watching(
        self, targets: Mapping[str, Sequence[tuple[Any, str]]], model: Any, model_stage: str
    ) -> Iterator[None]:
        """Wrap functions and methods while the block runs.

        Args:
            targets: stage to pairs of a module or class and the name of a plain function in it.
            model: a torch module whose forward passes are a stage too.
            model_stage: its name.
        """
        with ExitStack() as stack:
            for stage, places in targets.items():
                for owner, name in places:
                    stack.enter_context(patch.object(owner, name, self.wrapped(getattr(owner, name), stage)))
            before = model.register_forward_pre_hook(lambda *_: self.enter(model_stage))
            stack.callback(before.remove)
            behind = model.register_forward_hook(lambda *_: self.leave())
            stack.callback(behind.remove)
            yield

    def _note(self) -> None:
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now
