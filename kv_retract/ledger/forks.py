"""What must be closed around a fork of the process, and is opened again afterwards."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Final


class ClosesAroundForks(ABC):
    """An object that holds something which a forked child must not inherit open.

    The hooks run in the thread that forks, in the parent and in the child.
    """

    @abstractmethod
    def before_fork(self) -> None:
        """Let nobody use it, and close what it holds."""

    @abstractmethod
    def after_fork(self) -> None:
        """Let it be used again."""


class _Watch:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: weakref.WeakSet[ClosesAroundForks] = weakref.WeakSet()
        self._stopped: list[ClosesAroundForks] = []
        if hasattr(os, "register_at_fork"):  # where processes cannot fork there is nothing to watch
            os.register_at_fork(before=self._stop, after_in_parent=self._go_on, after_in_child=self._go_on)

    def add(self, one: ClosesAroundForks) -> None:
        with self._lock:
            self._watched.add(one)

    def _stop(self) -> None:
        self._lock.acquire()  # until the fork is done: nothing new may open meanwhile
        for one in self._watched:
            one.before_fork()
            self._stopped.append(one)

    def _go_on(self) -> None:
        while self._stopped:
            self._stopped.pop().after_fork()
        self._lock.release()


# One for the process, as forks concern the whole process and fork hooks cannot be taken back.
_WATCH: Final = _Watch()


def close_around_forks(one: ClosesAroundForks) -> None:
    """Call the hooks of `one` at every fork, for as long as it lives."""
    _WATCH.add(one)
