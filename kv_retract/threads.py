"""What a session knows of its threads while it runs: who is at work, and what each thread read last. No state."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .thread import Tools
from .types import Message

MOST_REMEMBERED = 4096
"""Threads whose newest messages are kept for the healer; of more, the oldest are forgotten and stay steered."""


@dataclass(frozen=True, slots=True, eq=False)
class Latest:
    """What a thread read and answered last. Two are the same only where they are the same object."""

    messages: tuple[Message, ...]
    tools: Tools | None
    answer_from: int
    """Index of the first message that is an answer of the newest step; `len(messages)` where there is none."""


class ThreadTable:
    """Shared by a session and its healer.

    Attributes:
        lock: held while records change and while a key is built from them, policies and edits included; never while an
            answer is decoded.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._quiet = threading.Condition(self.lock)
        self._streams: Counter[str] = Counter()
        self._deletions: Counter[str] = Counter()
        self._steps = 0
        self._latest: OrderedDict[str, Latest] = OrderedDict()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count one step or retraction as being at work."""
        with self.lock:
            self._steps += 1
        try:
            yield
        finally:
            with self.lock:
                self._steps -= 1
                if not self._steps:
                    self._quiet.notify_all()

    @contextmanager
    def streaming(self, thread_id: str) -> Iterator[None]:
        """Mark a thread as decoding: its cached path must not be edited or replaced."""
        with self.lock:
            self._streams[thread_id] += 1
        try:
            yield
        finally:
            with self.lock:
                self._streams[thread_id] -= 1
                if not self._streams[thread_id]:
                    del self._streams[thread_id]

    def is_streaming(self, thread_id: str) -> bool:
        """Whether an answer to the thread is being decoded."""
        return bool(self._streams[thread_id])

    def wait_quiet(self, timeout_s: float) -> None:
        """Wait until no step of any thread is at work, `wake` is called, or the time is over."""
        with self.lock:
            if self._steps:
                self._quiet.wait(timeout_s)

    def wake(self) -> None:
        """End the waiting of all."""
        with self.lock:
            self._quiet.notify_all()

    def remember(
        self, thread_id: str, messages: Sequence[Message], tools: Tools | None, answer: Message | None = None
    ) -> None:
        """Keep what a thread read last. What was kept before is no longer its newest."""
        read = tuple(messages)
        newest = Latest((*read, answer) if answer else read, tools, len(read))
        with self.lock:
            self._latest[thread_id] = newest
            self._latest.move_to_end(thread_id)
            while len(self._latest) > MOST_REMEMBERED:
                self._latest.popitem(last=False)

    def latest(self, thread_id: str) -> Latest | None:
        """Return it; None where the thread is unknown or was forgotten."""
        return self._latest.get(thread_id)

    def forbid(self, thread_id: str) -> None:
        """What was planned of a thread before now must not stay cached: it may have read what is to be deleted."""
        with self.lock:
            self._deletions[thread_id] += 1

    def deletions(self, thread_id: str) -> int:
        """Return how often something of a thread was to be deleted."""
        return self._deletions[thread_id]

    def forget(self, thread_id: str) -> None:
        """Let go of what a thread read: nobody is going to heal it."""
        with self.lock:
            self._latest.pop(thread_id, None)

    def touch(self, thread_id: str) -> None:
        """The retractions of a thread changed: what is planned of it is no longer its newest."""
        with self.lock:
            if thread_id in self._latest:
                self._latest[thread_id] = replace(self._latest[thread_id])
