"""Asking policies that may be slow, or asynchronous: deadlines in worker threads."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias

from ..errors import KVRetractError, PolicyError
from ..types import Retraction
from .base import PolicyContext, RetractionPolicy, ask
from .tool_results import ToolReader

OnFailure: TypeAlias = Literal["raise", "skip"]
log = logging.getLogger(__name__)

_UNTIL: contextvars.ContextVar[float | None] = contextvars.ContextVar("kv_retract_policy_deadline", default=None)
# Monotonic time at which the worker of this context is late: so it reaches policies inside of wrappers too.


class AsyncRetractionPolicy(RetractionPolicy):
    """A policy whose work is awaited, such as a question to a service.

    Override `propose_async`; what the contract says of `propose` holds for it. `propose` runs it to its end in an event
    loop of its own, so such a policy can be used and wrapped like any other. It must not hold on to things that
    belong to one event loop, such as an open client: every call has a new one.
    """

    @abstractmethod
    async def propose_async(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the spans to take back. With a deadline it is cancelled when the deadline is over."""

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Run `propose_async`, in a thread of its own where this one has a running event loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._in_time(ctx))
        worker = _Worker(self, ctx, _UNTIL.get())
        worker.start()
        worker.join()
        return worker.result()

    async def _in_time(self, ctx: PolicyContext) -> list[Retraction]:
        until = _UNTIL.get()
        if until is None:
            return await self.propose_async(ctx)
        limit = asyncio.timeout(until - time.monotonic())
        try:
            async with limit:
                return await self.propose_async(ctx)
        except TimeoutError as error:
            if limit.expired():
                raise _LateError(f"policy {self.name!r} was cancelled at its deadline") from error
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFailure:
    """A policy that gave nothing in this step."""

    policy: str
    """Its name."""
    kind: Literal["late", "failed"]
    message: str
    """One line for people; of a failure, what `PolicyError` says."""


class Asked(NamedTuple):
    """What came of asking policies."""

    proposals: list[Retraction]
    """In the order of the policies."""
    failures: tuple[PolicyFailure, ...]
    """In the same order."""


@dataclass(kw_only=True)
class Asker:
    """Asks policies before a step, with a deadline or without. One per session; safe to share between threads.

    With a deadline every policy runs in a worker thread of its own, all at once, on a copy of the list of messages.
    A policy that is late loses the step: what it returns later is thrown away. Python cannot stop a thread, so it goes
    on until it returns (`propose_async` is cancelled); until then the same policy is not started again for the same
    thread id, but is late at once. Workers are daemons: they do not keep the process alive. Policies that compute
    share one interpreter lock, so a deadline is for those that wait; give the others a few milliseconds more.
    """

    deadline_s: float | None = None
    """Seconds from the beginning of the step for every policy. None: no deadline, in the caller's thread."""
    on_failure: OnFailure = "raise"
    """What a failed policy does: raise PolicyError, or be left out of the step, logged and reported."""
    most_workers: int = 64
    """How many workers may run at once, late ones of all threads included; more policies are late at once."""
    _reader: ToolReader = field(default_factory=ToolReader, init=False, repr=False, compare=False)
    _running: dict[tuple[str, int], _Worker] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise PolicyError(f"expected a deadline_s above 0, or None for no deadline, got {self.deadline_s!r}")
        if self.on_failure not in ("raise", "skip"):
            raise PolicyError(f"expected on_failure 'raise' or 'skip', got {self.on_failure!r}")
        if self.most_workers < 1:
            raise PolicyError(f"expected most_workers of at least 1, got {self.most_workers!r}")

    def ask(self, policies: Sequence[RetractionPolicy], ctx: PolicyContext) -> Asked:
        """Return the proposals of all policies that are in time; an instance that is named twice is asked once.

        Raises:
            PolicyError: a policy failed and `on_failure` is "raise"; being late is no failure. The others go on.
            SpanError: as `ask`.
        """
        ctx = replace(ctx, reader=self._reader)
        chosen = list({id(policy): policy for policy in policies}.values())
        asked = Asked([], ())
        if self.deadline_s is None:
            for policy in chosen:
                asked = self._with(asked, policy, ctx, None)
            return asked
        until = time.monotonic() + self.deadline_s
        snapshot = replace(ctx, messages=tuple(ctx.messages), records=tuple(ctx.records))
        workers = [self._start(policy, snapshot, until) for policy in chosen]
        for policy, worker in zip(chosen, workers, strict=True):
            if isinstance(worker, PolicyFailure):
                asked = Asked(asked.proposals, (*asked.failures, worker))
                continue
            worker.join(max(0.0, until - time.monotonic()))
            if worker.is_late():
                log.warning("policy %r is late: no answer within %s s", policy.name, self.deadline_s)
                late = _late(policy, f"no answer within {self.deadline_s} s")
                asked = Asked(asked.proposals, (*asked.failures, late))
            else:
                asked = self._with(asked, policy, ctx, worker)
        return asked

    def _with(self, asked: Asked, policy: RetractionPolicy, ctx: PolicyContext, worker: _Worker | None) -> Asked:
        try:
            proposals = ask(policy, ctx) if worker is None else worker.result()
        except KVRetractError as error:
            if self.on_failure == "raise":
                raise
            # The message may quote what the policy read, so it is for the caller and not for the log.
            log.warning("policy %r failed and was left out: %s", policy.name, type(error.__cause__ or error).__name__)
            failure = PolicyFailure(policy=policy.name, kind="failed", message=" ".join(str(error).split()))
            return Asked(asked.proposals, (*asked.failures, failure))
        return Asked([*asked.proposals, *proposals], asked.failures)

    def _start(self, policy: RetractionPolicy, ctx: PolicyContext, until: float) -> _Worker | PolicyFailure:
        key = (ctx.thread_id, id(policy))
        with self._lock:
            self._running = {k: worker for k, worker in self._running.items() if worker.is_alive()}
            if key in self._running:
                return _late(policy, "still running from an earlier step of this thread")
            if len(self._running) >= self.most_workers:
                return _late(policy, f"not started: {self.most_workers} workers are running already")
            worker = self._running[key] = _Worker(policy, ctx, until)
            worker.start()
            return worker


def ask_all(
    policies: Sequence[RetractionPolicy],
    ctx: PolicyContext,
    *,
    deadline_s: float | None = None,
    on_failure: OnFailure = "raise",
) -> Asked:
    """Ask policies once. Whoever asks before every step keeps an `Asker`, which knows what is still running."""
    return Asker(deadline_s=deadline_s, on_failure=on_failure).ask(policies, ctx)


class _LateError(PolicyError):
    """An asynchronous policy was cancelled at its deadline."""


class _Worker(threading.Thread):
    """Asks one policy. Holds it while it runs, so that its `id` is not given to another object."""

    def __init__(self, policy: RetractionPolicy, ctx: PolicyContext, until: float | None) -> None:
        super().__init__(name=f"policy {policy.name}", daemon=True)
        self._policy, self._ctx = policy, ctx
        self._context = contextvars.copy_context()
        self._context.run(_UNTIL.set, until)
        self._proposals: list[Retraction] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Ask the policy and keep what it returns or raises."""
        try:
            self._proposals = self._context.run(ask, self._policy, self._ctx)
        except BaseException as error:  # the asking thread raises it
            self._error = error

    def is_late(self) -> bool:
        """Whether there is no result yet, or was none at the deadline."""
        return self.is_alive() or isinstance(self._error, _LateError)

    def result(self) -> list[Retraction]:
        """Return or raise what the policy did; only once the thread has ended."""
        if self._error is not None:
            raise self._error
        return self._proposals


def _late(policy: RetractionPolicy, message: str) -> PolicyFailure:
    return PolicyFailure(policy=policy.name, kind="late", message=message)
