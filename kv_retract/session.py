"""One agent step, top to bottom. Read this first.

A session joins the parts: the renderer turns messages into token ids, the ledger knows what was taken back, policies
propose what to take back now, the planner decides, the engine edits its cache through an eraser and answers. The
order never varies: retractions are written to the ledger before the cache is touched, and a thread is only ever
shown to the engine with its retractions applied (DESIGN D1), so whatever is lost, the retracted text is not prefilled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .answer import stream_thread
from .attention import check_lineage
from .bookkeeping import Bookkeeper
from .cache.base import ThreadKey
from .edits import apply_plan, plan_for
from .engine.base import Engine, LogitsProcessor
from .erasers import ERASERS, Eraser
from .events import Erased, Observer, Observers, PoliciesFailed
from .healing import Healer, Healing
from .ledger.ledger import Ledger, MemoryLedger, SqliteLedger, standing
from .ledger.lineage import Lineage
from .ledger.render import Renderer
from .planner import Planner
from .policies.asking import Asker, OnFailure, PolicyFailure
from .policies.base import RetractionPolicy
from .policies.supervised import approvals_in
from .thread import ThreadView, Tools, context_of, view_thread
from .threads import ThreadTable
from .types import (
    EraseResult,
    Guarantee,
    Message,
    Retraction,
    RetractionPlan,
    RetractionRecord,
    SamplingParams,
    Status,
    StepDelta,
    StepResult,
    Waiting,
)
from .watch import StepWatch

if TYPE_CHECKING:
    from .engine.bilayer import BiLayer


class KVRetractSession:
    """The threads of an agent application on one engine.

    Args:
        engine: holds model and cache.
        renderer: knows the tokenizer and its chat template.
        eraser: how steered edits are made: a registered name or an instance.
        policies: asked before every step, in order.
        policy_deadline_s: what a policy does not find in so many seconds waits for a later step. None: no deadline.
        on_policy_failure: `raise` the error of a policy that fails, or `skip` what it would have found; either is told
            by `policy_failures`.
        planner: decides what is done with their proposals.
        ledger: where retractions are kept; in memory by default. A path opens an SQLite file.
        extra_key: namespace of the threads in the prefix cache; sessions with different ones share nothing.
        notify: append a short notice whenever something is withdrawn (`Retraction.notice`, DESIGN D9).
        lineage: how it is found what was derived from a span, for policies with a `cascade`.
        healing: make steered threads exact while they are idle. None: only the edits that a policy's `verify` draws.
        observers: told what happens: audit log, traces, metrics.

    A context manager: leaving it stops healing and closes the observers, and the ledger where it was given as a path.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        *,
        eraser: str | Eraser = "mask",
        policies: Sequence[RetractionPolicy] = (),
        policy_deadline_s: float | None = None,
        on_policy_failure: OnFailure = "raise",
        planner: Planner | None = None,
        ledger: Ledger | str | Path | None = None,
        extra_key: str = "",
        notify: bool = False,
        lineage: Lineage | None = None,
        healing: Healing | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.engine, self.renderer = engine, renderer
        self.eraser = ERASERS.create(eraser) if isinstance(eraser, str) else eraser
        self.policies = tuple(policies)
        self._asker = Asker(deadline_s=policy_deadline_s, on_failure=on_policy_failure)
        self._failures: dict[str, tuple[PolicyFailure, ...]] = {}
        self.planner = planner or Planner()
        self.ledger = SqliteLedger(ledger) if isinstance(ledger, str | Path) else ledger or MemoryLedger()
        self._owns_ledger, self._closed = isinstance(ledger, str | Path), False
        self.extra_key, self.notify = extra_key, notify
        self.lineage = check_lineage(lineage or Lineage(), engine)
        self._observers = Observers(tuple(observers))
        self._threads = ThreadTable()
        self._books = Bookkeeper(self.ledger, self._observers, self._threads)
        self._last_erase: dict[str, EraseResult] = {}
        self._drawn: set[str] = set()  # threads with an edit that is to be verified, until the healer has them
        healing = healing or Healing(every_thread=False)
        self.healer = Healer(healing, engine, self._books, self._threads, self._view, self._observers.tell)

    @classmethod
    def from_pretrained(
        cls,
        model: str = "reference",
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_tokens: int = 65_536,
        page_size: int = 1,
        seed: int = 0,
        long_thread: str | BiLayer | None = None,
        **session: Any,
    ) -> KVRetractSession:
        """Load a model by name or directory (`kv-retract models`) into an embedded engine.

        Args:
            model: a registered name, or a directory in the format of transformers.
            device: `cpu` or `cuda`.
            dtype: `float32` or `bfloat16`.
            max_tokens: size of the KV pool, in tokens.
            page_size: tokens per page.
            seed: of seeded random models.
            long_thread: how threads beyond `BiLayer.local` tokens are kept: `bilayer`, or a `BiLayer` (ACRE).
            **session: see the class.

        Raises:
            UnsupportedModelError: the model cannot be edited correctly.
            UnknownNameError: neither a registered name nor a directory.
        """
        from .engine.loading import load_engine

        engine, tokenizer = load_engine(model, device, dtype, max_tokens, page_size, seed, long_thread)
        return cls(engine, Renderer(tokenizer), **session)

    def step(
        self,
        thread_id: str,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 frozen
        logits_processor: LogitsProcessor | None = None,
    ) -> StepResult:
        """Retract what the policies find, then answer the messages.

        Raises:
            MessageError: a message cannot be rendered.
            PolicyError: a policy failed.
            PoolExhaustedError: the thread does not fit into the pool.
            ThreadBusyError: the thread is streaming an answer that a new retraction would change.
        """
        *_, last = self.stream(thread_id, messages, tools=tools, sampling=sampling, logits_processor=logits_processor)
        assert last.result is not None, "the last delta carries the result"
        return last.result

    def stream(
        self,
        thread_id: str,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 frozen
        logits_processor: LogitsProcessor | None = None,
    ) -> Iterator[StepDelta]:
        """As `step`, in pieces. Closing the iterator stops decoding."""
        watch, ready = StepWatch(thread_id, self.engine.spec.name), partial(self._ready, thread_id, messages, tools)
        try:
            with self._threads.step():
                plan = self._take_back(thread_id, messages, tools)
                watch.retracted()
                with self._threads.streaming(thread_id):
                    for delta in stream_thread(self.engine, self.renderer, ready, plan, sampling, logits_processor):
                        watch.saw(delta)
                        if delta.result is not None:
                            self._threads.remember(thread_id, messages, tools, delta.result.message)
                        yield delta
        except Exception as error:
            watch.failed(error)
            raise
        finally:
            try:
                self._observers.tell(watch.event())
            finally:
                self._offer(thread_id)

    def plan(
        self,
        thread_id: str,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        proposals: Sequence[Retraction] | None = None,
    ) -> RetractionPlan:
        """Return what `retract` would do now, every hop of a cascade with its evidence; changes nothing.

        Raises as `retract`, but for ThreadBusyError.
        """
        with self._threads.lock:
            return self._plan(thread_id, messages, tools, proposals)[0]

    def retract(
        self,
        thread_id: str,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        proposals: Sequence[Retraction] | None = None,
        actor: str | None = None,
    ) -> RetractionPlan:
        """Take back what the policies find (or `proposals`, given by the caller), before the next step.

        Idempotent: called again with the same messages it changes nothing.

        Args:
            thread_id: label of the thread.
            messages: all of its messages.
            tools: as in the step.
            proposals: instead of asking the policies.
            actor: who decided, for the audit log; by default `policy`, or `caller` where proposals are given.

        Raises:
            SpanError: a proposal of the caller's names a place that is not there.
            PolicyError: a policy failed, and `on_policy_failure` is `raise`.
            ThreadBusyError: the thread is streaming an answer and there is something to retract.
        """
        with self._threads.step():
            try:
                return self._take_back(thread_id, messages, tools, proposals, actor)
            finally:
                self._offer(thread_id)

    def undo(self, thread_id: str, retraction_id: str, *, actor: str = "caller") -> tuple[RetractionRecord, ...]:
        """Revoke a retraction, and what its cascade brought: the next step reads the originals again (DESIGN D12).

        The policies that found it do not take the same characters back again. Works after a restart too, where the
        ledger, or the checkpointed state, has the record. Undoing twice changes nothing.

        Returns:
            The records that were revoked now.

        Raises:
            LedgerError: the thread has no such retraction.
            ThreadBusyError: the thread is streaming an answer.
        """
        with self._threads.lock:
            return self._books.undo(thread_id, retraction_id, actor)

    def waiting(
        self, thread_id: str, messages: Sequence[Message], *, tools: Tools | None = None
    ) -> tuple[Waiting, ...]:
        """Return what waits under `require_approval` and would change something; `retract(proposals=...)` approves."""
        with self._threads.lock:
            context = context_of(thread_id, messages, self._view(thread_id, messages, tools))
            proposed = {id: p for policy in approvals_in(self.policies) for id, p in policy.waiting(context).items()}
            plans = {id: self._plan(thread_id, messages, tools, [p])[0] for id, p in proposed.items()}
        return tuple(Waiting(id=id, proposal=proposed[id], plan=plan) for id, plan in plans.items() if plan.spans)

    def key(
        self,
        thread_id: str,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> ThreadKey:
        """Return what the engine would be asked for: the rendered thread with its retractions applied."""
        with self._threads.lock:
            return self._view(thread_id, messages, tools, add_generation_prompt).key

    def policy_failures(self, thread_id: str) -> tuple[PolicyFailure, ...]:
        """Return which policies gave nothing before the newest step of a thread, because they were late or failed."""
        return self._failures.get(thread_id, ())

    def history(self, thread_id: str) -> list[RetractionRecord]:
        """Return what was retracted in a thread, in order, and why."""
        return list(self.ledger.records(thread_id))

    def last_erase(self, thread_id: str) -> EraseResult | None:
        """Return what the newest `retract` of a thread did to the cache and cost; None where it had nothing to do."""
        return self._last_erase.get(thread_id)

    def fork(self, source: str, target: str) -> None:
        """Let a new thread begin with the retractions of another; their common prefix is shared in the cache anyway."""
        self.ledger.fork(source, target)

    def restore(self, thread_id: str, records: Sequence[RetractionRecord]) -> None:
        """Merge retractions that were checkpointed elsewhere, as by the LangGraph middleware. Idempotent."""
        self.ledger.add(thread_id, records)

    def close(self) -> None:
        """See the class. Closing twice is harmless; answers that are streaming may go on."""
        self._closed = True
        self.healer.close()
        try:
            self._observers.close()
        finally:
            if self._owns_ledger:
                self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _view(
        self, thread_id: str, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = True
    ) -> ThreadView:
        return view_thread(
            self.engine, self.renderer, self.ledger.records(thread_id), messages,
            tools=tools, add_generation_prompt=add_generation_prompt, extra_key=self.extra_key,
        )  # fmt: skip

    def _plan(
        self,
        thread_id: str,
        messages: Sequence[Message],
        tools: Tools | None,
        proposals: Sequence[Retraction] | None,
        *,
        told: bool = False,
    ) -> tuple[RetractionPlan, ThreadView, Sequence[RetractionRecord]]:
        view = self._view(thread_id, messages, tools)
        known = standing(self.ledger.records(thread_id), messages)
        if proposals is None:
            proposals, failures = self._asker.ask(self.policies, context_of(thread_id, messages, view))
            if told:
                self._fail(thread_id, failures)
        plan = plan_for(
            view, proposals, known,
            thread_id=thread_id, engine=self.engine, eraser=self.eraser, planner=self.planner, lineage=self.lineage,
            notify=self.notify,
        )  # fmt: skip
        return plan, view, known

    def _take_back(
        self,
        thread_id: str,
        messages: Sequence[Message],
        tools: Tools | None,
        proposals: Sequence[Retraction] | None = None,
        actor: str | None = None,
    ) -> RetractionPlan:
        with self._threads.lock:
            self._threads.remember(thread_id, messages, tools)  # stops a heal of what it read before
            plan, view, known = self._plan(thread_id, messages, tools, proposals, told=True)
            self._last_erase.pop(thread_id, None)
            if plan.spans:
                self._books.record(plan, messages, known, actor or ("policy" if proposals is None else "caller"))
                if any(span.verify for span in plan.spans):
                    self._drawn.add(thread_id)
                self._erase(view, plan, known)
            return plan

    def _ready(self, thread_id: str, messages: Sequence[Message], tools: Tools | None) -> ThreadView:
        """Return what is about to be answered; what is no longer cached of it is rebuilt exactly, so say so."""
        with self._threads.lock:
            view = self._view(thread_id, messages, tools)
            self._books.set_status(thread_id, {r.retraction_id: r.status for r in view.records}, "session", "cold")
            return view

    def _fail(self, thread_id: str, failures: tuple[PolicyFailure, ...]) -> None:
        self._failures.pop(thread_id, None)
        if failures:
            self._failures[thread_id] = failures
            silent = tuple(replace(failure, message="") for failure in failures)
            self._observers.tell(PoliciesFailed(thread_id=thread_id, failures=silent))

    def _erase(self, view: ThreadView, plan: RetractionPlan, known: Sequence[RetractionRecord]) -> None:
        if any(span.record.guarantee is Guarantee.EXACT for span in plan.spans):
            self._threads.forbid(plan.thread_id)
        erased = apply_plan(self.engine, self.eraser, view, plan, known)
        self._last_erase[plan.thread_id] = erased
        ids = tuple(span.record.retraction_id for span in plan.spans)
        self._observers.tell(Erased(thread_id=plan.thread_id, retraction_ids=ids, result=erased))
        steered = {span.record.retraction_id: Status.EXACT for span in plan.spans if not span.exact}
        if erased.exact:
            self._books.set_status(plan.thread_id, steered, "session", "no room")

    def _offer(self, thread_id: str) -> None:
        """Hand a thread to the healer where something of it is steered and it may be healed."""
        if self._closed:
            return
        drawn = thread_id in self._drawn
        self._drawn.discard(thread_id)
        wanted = drawn or self.healer.healing.every_thread or self.healer.wants(thread_id)
        if wanted and any(r.status is Status.STEERED for r in self.ledger.records(thread_id)):
            self.healer.offer(thread_id, first=drawn)
        else:
            self._threads.forget(thread_id)
