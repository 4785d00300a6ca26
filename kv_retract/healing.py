"""Steer now, heal later: what was steered becomes exact while its thread is idle (DESIGN D5).

A heal is a prefill of the thread's exact key (spans left out), chunk by chunk, each chunk kept in the prefix cache. So
it can stop after any chunk without harm and goes on where it stopped, even after the thread has grown. The steered
path stays and answers until the exact one is whole. The swap is one change of status in the ledger: the next key that
is built from the thread is the exact one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .bookkeeping import Bookkeeper
from .cache.base import ThreadKey
from .engine.base import Engine
from .errors import ColdTombstoneError, KVRetractError, PoolExhaustedError
from .events import Diverged, Event, Healed
from .thread import ThreadView, Tools
from .threads import Latest, ThreadTable
from .types import Divergence, Message, Status

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Healing:
    """When and how fast steered threads are made exact."""

    every_thread: bool = True
    """Heal every steered thread; else only those with an edit that was drawn for verification
    (`RetractionPolicy.verify`)."""
    background: bool = True
    """Heal in a thread of its own. Else only `Healer.run` does: call it while a tool runs, or from a scheduler."""
    tokens_per_second: float | None = None
    """Most tokens that healing sends through the model, on the average. None: as many as there is time for."""
    chunk_tokens: int = 64
    """Tokens of one forward pass. A step that begins meanwhile waits for its end, so this bounds the delay."""
    most_tokens: int = 65_536
    """Most tokens that unfinished heals may hold in the cache beside the steered threads. A thread whose rest alone
    is longer is healed when no other is."""
    patience_s: float = 5.0
    """While steps are at work healing waits, but after so many seconds it takes one chunk all the same."""
    compare_tokens: int = 16
    """How many of the newest positions are compared when a heal is whole; 0 compares nothing."""
    threshold: float = 0.1
    """KL in nats over which `Diverged` is told."""

    def __post_init__(self) -> None:
        """Check the numbers; raises ValueError."""
        if self.chunk_tokens < 1 or self.most_tokens < 1 or self.compare_tokens < 0:
            raise ValueError(
                "expected chunk_tokens and most_tokens of at least 1 and compare_tokens of at least 0, got "
                f"{self.chunk_tokens!r}, {self.most_tokens!r} and {self.compare_tokens!r}"
            )
        if (self.tokens_per_second is not None and not self.tokens_per_second > 0) or self.patience_s < 0:
            raise ValueError(
                "expected tokens_per_second above 0 (or None) and patience_s of at least 0, got "
                f"{self.tokens_per_second!r} and {self.patience_s!r}"
            )


@dataclass(slots=True, eq=False)
class _Wanted:
    """A thread that was offered and is not exact yet."""

    since: float
    """Monotonic seconds."""
    tokens: int = 0
    """Prefilled for it so far."""


@dataclass(slots=True, eq=False)
class _Task:
    """A thread that is to become exact."""

    thread_id: str
    latest: Latest
    steered: ThreadKey
    exact: ThreadKey
    retraction_ids: tuple[str, ...]
    first: int
    """Entry of the first steered span."""
    shared: bool
    """Whether other threads share one of the edits."""
    after: int
    """How many entries of `exact` lie behind its last edit."""
    answer: int
    """How many of the last entries are the newest answer and what the template puts behind it."""
    wanted: _Wanted
    deletions: int
    """Of the thread, when the task was planned."""
    done: int = 0
    """Entries of `exact` that were prefilled."""
    cached: int = 0
    """How many of them were cached after the newest chunk."""
    lost: bool = False
    """Whether some of them were evicted since."""

    @property
    def rest(self) -> int:
        return len(self.exact) - self.first


class Healer:
    """Makes the steered threads of one session exact; safe to use from several Python threads.

    Takes turns among the threads, a chunk each, threads that are to be verified first. Closing it stops the work;
    what is steered stays so.

    Args:
        healing: the settings.
        engine: holds the threads.
        books: writes their records.
        threads: of the session.
        view: builds the view of a thread from its messages and tools, with or without a generation prompt.
        tell: takes events.
    """

    def __init__(
        self,
        healing: Healing,
        engine: Engine,
        books: Bookkeeper,
        threads: ThreadTable,
        view: Callable[[str, Sequence[Message], Tools | None, bool], ThreadView],
        tell: Callable[[Event], None],
    ) -> None:
        self.healing = healing
        self._engine, self._books, self._threads, self._view, self._tell = engine, books, threads, view, tell
        self._wanted: dict[str, _Wanted] = {}
        self._waiting: OrderedDict[str, object] = OrderedDict()  # those to be planned; another object at every offer
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self._work = threading.Condition()
        self._turn = threading.Lock()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._free_at = 0.0  # when the token budget allows the next chunk

    def offer(self, thread_id: str, *, first: bool = False) -> None:
        """Heal a thread as soon as there is time; offering it again changes nothing.

        Args:
            thread_id: whose newest messages the session remembers.
            first: before all others.
        """
        with self._work:
            if self._closed:
                return
            self._wanted.setdefault(thread_id, _Wanted(time.monotonic()))
            self._waiting[thread_id] = object()
            if first:
                self._waiting.move_to_end(thread_id, last=False)
            if self.healing.background and (self._worker is None or not self._worker.is_alive()):
                self._worker = threading.Thread(target=self._go_on, name="kv-retract healer", daemon=True)
                self._worker.start()
            self._work.notify_all()

    def wants(self, thread_id: str) -> bool:
        """Whether a thread was offered and is not exact yet; it has to be offered anew whenever it went on."""
        with self._work:
            return thread_id in self._wanted

    def pending(self) -> int:
        """Return how many threads are to be healed."""
        with self._work:
            return len(self._waiting.keys() | self._tasks.keys())

    def run(self, max_tokens: int | None = None) -> int:
        """Heal in the caller's thread until nothing is left or about `max_tokens` went through the model.

        Neither waits for quiet nor for the budget per second.

        Returns:
            Tokens that went through the model.
        """
        done = 0
        while max_tokens is None or done < max_tokens:
            tokens = self._advance()
            if tokens is None:
                break
            done += tokens
        return done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is pending, or the healer is closed; return whether that came in time."""
        with self._work:
            return self._work.wait_for(lambda: self._closed or not (self._waiting or self._tasks), timeout_s)

    def close(self) -> None:
        """Stop after the chunk that is being worked at. Idempotent."""
        with self._work:
            self._closed = True
            worker, self._worker = self._worker, None
            self._work.notify_all()
        self._threads.wake()
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    # -- the worker -------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        while True:
            with self._work:
                if not (self._closed or self._waiting or self._tasks):
                    self._work.wait()
                    continue
            # Patience begins with the work, and anew with every chunk.
            self._threads.wait_quiet(self.healing.patience_s)
            with self._work:
                if not self._closed and (left := self._free_at - time.monotonic()) > 0:
                    self._work.wait(left)
                    continue
                if self._closed:
                    return
            try:
                tokens = self._advance()
            except Exception as error:  # of the engine or a required observer; the thread stays steered
                log.warning("healing failed: %s", type(error).__name__)
                tokens = 0
            if tokens and self.healing.tokens_per_second is not None:
                self._free_at = max(self._free_at, time.monotonic()) + tokens / self.healing.tokens_per_second

    def _advance(self) -> int | None:
        """Take one chunk of the next thread; return the tokens it took, None where nothing is pending."""
        with self._turn:
            task = self._next()
            if task is None:
                return None
            tokens, done = 0, True
            try:
                tokens = self._chunk(task)
                task.wanted.tokens += tokens
                done = task.done == len(task.exact)
                if done:
                    self._finish(task)
            except (PoolExhaustedError, ColdTombstoneError):
                log.info("thread %r is not healed now: the cache has no room for it", task.thread_id)
            finally:
                if done:
                    self._drop(task)
            return tokens

    def _next(self) -> _Task | None:
        """Return the task whose turn it is; begins new ones while there is room for what they hold."""
        while True:
            self._begin_waiting()
            with self._work:
                if not self._tasks:
                    return None
                thread_id, task = self._tasks.popitem(last=False)
                if task.latest is self._threads.latest(thread_id):
                    # At the end, so that the others come first; but where they evict each other, one after the other.
                    self._tasks[thread_id] = task
                    self._tasks.move_to_end(thread_id, last=not task.lost)
                    return task
                # The thread went on: what was healed of it stays cached, and the rest is planned anew.
                self._waiting.setdefault(thread_id, object())

    def _begin_waiting(self) -> None:
        while True:
            with self._work:
                thread_id, offered = next(iter(self._waiting.items()), (None, None))
            if thread_id is None:
                return
            try:
                task = self._begin(thread_id)
            except BaseException:
                with self._work:
                    self._waiting.pop(thread_id, None)
                    self._wanted.pop(thread_id, None)
                    self._work.notify_all()
                raise
            with self._work:
                if self._waiting.get(thread_id) is not offered:
                    continue  # it was offered again while it was planned
                held = sum(other.rest for name, other in self._tasks.items() if name != thread_id)
                if task is not None and held and held + task.rest > self.healing.most_tokens:
                    return
                self._waiting.pop(thread_id, None)
                self._tasks.pop(thread_id, None)
                if task is not None:
                    self._tasks[thread_id] = task
                    self._tasks.move_to_end(thread_id, last=False)
                else:
                    self._wanted.pop(thread_id, None)
                    self._work.notify_all()

    def _begin(self, thread_id: str) -> _Task | None:
        """Plan the heal of a thread; None where nothing of it is steered."""
        with self._threads.lock:
            latest, deletions = self._threads.latest(thread_id), self._threads.deletions(thread_id)
            if latest is None:
                return None
            unanswered = latest.answer_from == len(latest.messages)
            try:
                view = self._view(thread_id, latest.messages, latest.tools, unanswered)
            except KVRetractError as error:  # the next step tells the caller, who can do something about it
                log.info("thread %r is not healed now: %s", thread_id, type(error).__name__)
                return None
        steered = [edit for edit in view.edits if not edit.exact]
        wanted = self._wanted.get(thread_id)
        if not steered or wanted is None:
            return None
        exact = view.key_after([], exact_from=0)
        num_tokens = len(view.rendering.ids)
        answers = (span.start for span in view.rendering.spans() if span.ref.message >= latest.answer_from)
        return _Task(
            thread_id=thread_id,
            latest=latest,
            steered=view.key,
            exact=exact,
            retraction_ids=tuple(dict.fromkeys(edit.retraction_id for edit in steered)),
            first=view.entry(steered[0].start),
            shared=any(edit.shared for edit in steered),
            after=num_tokens - view.edits[-1].end,
            answer=num_tokens - min(answers, default=num_tokens),
            wanted=wanted,
            deletions=deletions,
        )

    def _chunk(self, task: _Task) -> int:
        cached = self._engine.cached(task.exact)
        # An engine with pages caches no incomplete one, so what was asked for counts; after an eviction, what is left.
        start = max(task.done, cached) if cached >= task.cached else cached
        task.done = min(start + self.healing.chunk_tokens, len(task.exact))
        task.lost = task.lost or cached < task.cached
        tokens = self._engine.prefill(task.exact.cut(task.done))
        task.cached = self._engine.cached(task.exact)
        if task.deletions != self._threads.deletions(task.thread_id):
            self._engine.purge(task.exact, task.first)  # it may have read what was to be deleted meanwhile
        return tokens

    def _finish(self, task: _Task) -> None:
        """Measure how far the steered path was from the exact one, and swap.

        Nothing is swapped where the thread went on meanwhile or is decoding: at the end of its step it is offered anew.
        """
        measured = self._measure(task)
        with self._threads.lock:
            if self._threads.is_streaming(task.thread_id):
                return
            if task.latest is not self._threads.latest(task.thread_id):
                with self._work:
                    self._waiting.setdefault(task.thread_id, object())
                return
            exact = dict.fromkeys(task.retraction_ids, Status.EXACT)
            ids = tuple(
                r.retraction_id for r in self._books.set_status(task.thread_id, exact, "healer", "healed", measured)
            )
            with self._work:
                self._wanted.pop(task.thread_id, None)
            self._threads.forget(task.thread_id)
        self._forget(task)
        self._tell(
            Healed(
                thread_id=task.thread_id,
                retraction_ids=ids,
                tokens=task.wanted.tokens,
                waited_s=time.monotonic() - task.wanted.since,
                divergence=measured,
            )
        )
        threshold = self.healing.threshold
        if measured is not None and not measured.kl <= threshold:  # NaN is told too
            self._tell(Diverged(thread_id=task.thread_id, retraction_ids=ids, divergence=measured, threshold=threshold))

    def _measure(self, task: _Task) -> Divergence | None:
        """Compare from the first token of the newest answer on; without one, at the last tokens of the thread."""
        positions = min(self.healing.compare_tokens, task.after)
        if positions < 1:
            return None
        # The first distribution of the answer follows the entry before it.
        behind = max(0, min(task.answer - positions + 1, task.after - positions))
        exact, steered = (key.cut(len(key) - behind) for key in (task.exact, task.steered))
        try:
            return self._engine.divergence(exact, steered, positions)
        except PoolExhaustedError:
            return None

    def _forget(self, task: _Task) -> None:
        """Give the steered path back, with answers that hang off it, unless other threads share the edit."""
        forget = self._engine.drop if task.shared else self._engine.purge
        try:
            forget(task.steered, task.first)
        except KVRetractError as error:  # a server is busy with it: it is left to eviction
            log.info("a healed thread's steered path stays cached: %s", type(error).__name__)

    def _drop(self, task: _Task) -> None:
        with self._work:
            if self._tasks.get(task.thread_id) is task:
                del self._tasks[task.thread_id]
            self._work.notify_all()
