"""One agent step, top to bottom. Read this first.

A session joins the parts: the renderer turns messages into token ids, the ledger knows what was taken back, policies
propose what to take back now, the planner decides, the engine edits its cache through an eraser and answers. The
order never varies: retractions are written to the ledger before the cache is touched, and a thread is only ever
shown to the engine with its retractions applied (DESIGN D1), so whatever is lost, the retracted text is not prefilled.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .answer import stream_answer
from .cache.base import ThreadKey
from .edits import apply_plan, facts_of
from .engine.base import Engine, LogitsProcessor
from .erasers import ERASERS, Eraser
from .errors import ColdTombstoneError, ThreadBusyError
from .ledger.ledger import Ledger, MemoryLedger, SqliteLedger, standing
from .ledger.render import Renderer
from .planner import Planner
from .policies.asking import Asker, OnFailure, PolicyFailure
from .policies.base import PolicyContext, RetractionPolicy
from .thread import ThreadView, Tools, default_notice, view_thread
from .types import (
    EraseResult,
    Message,
    Retraction,
    RetractionPlan,
    RetractionRecord,
    SamplingParams,
    Status,
    StepDelta,
    StepResult,
)


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
    ) -> None:
        self.engine, self.renderer = engine, renderer
        self.eraser = ERASERS.create(eraser) if isinstance(eraser, str) else eraser
        self.policies = tuple(policies)
        self._asker = Asker(deadline_s=policy_deadline_s, on_failure=on_policy_failure)
        self._failures: dict[str, tuple[PolicyFailure, ...]] = {}
        self.planner = planner or Planner()
        self.ledger = SqliteLedger(ledger) if isinstance(ledger, str | Path) else ledger or MemoryLedger()
        self.extra_key, self.notify = extra_key, notify
        self._lock = threading.RLock()
        self._streams: Counter[str] = Counter()
        self._last_erase: dict[str, EraseResult] = {}

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
            **session: see the class.

        Raises:
            UnsupportedModelError: the model cannot be edited correctly.
            UnknownNameError: neither a registered name nor a directory.
        """
        from .engine.hf import HFEngine
        from .engine.models import load_model

        loaded = load_model(model, device=device, dtype=dtype, seed=seed)
        engine = HFEngine(loaded.model, max_tokens=max_tokens, page_size=page_size, name=loaded.name)
        return cls(engine, Renderer(loaded.tokenizer), **session)

    # -- the step ---------------------------------------------------------------------------------------------------

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
        plan = self.retract(thread_id, messages, tools=tools)
        with self._streaming(thread_id):
            while True:
                with self._lock:
                    view = self._view(thread_id, messages, tools)
                    self._persist_cold(thread_id, view)
                try:
                    yield from stream_answer(self.engine, self.renderer, view, plan, sampling, logits_processor)
                    return
                except ColdTombstoneError:
                    continue  # another thread needed the room in between: now the span is left out

    def retract(
        self,
        thread_id: str,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        proposals: Sequence[Retraction] | None = None,
    ) -> RetractionPlan:
        """Take back what the policies find (or `proposals`, given by the caller), before the next step.

        Idempotent: called again with the same messages it changes nothing.

        Raises:
            SpanError: a proposal of the caller's names a place that is not there.
            PolicyError: a policy failed, and `on_policy_failure` is `raise`.
            ThreadBusyError: the thread is streaming an answer and there is something to retract.
        """
        with self._lock:
            view = self._view(thread_id, messages, tools)
            known = standing(self.ledger.records(thread_id), messages)
            if proposals is None:
                context = PolicyContext(
                    thread_id=thread_id, messages=messages, records=view.records, now=datetime.now(UTC)
                )
                proposals, failures = self._asker.ask(self.policies, context)
                self._failures.pop(thread_id, None)
                self._failures.update({thread_id: failures} if failures else {})
            plan = self.planner.plan(
                [self._with_notice(p, messages) for p in proposals],
                thread_id=thread_id,
                messages=messages,
                rendering=view.rendering,
                records=known,
                num_cached=view.token(view.cached),
                eraser=facts_of(self.eraser),
            )
            self._last_erase.pop(thread_id, None)
            if plan.spans:
                if self._streams[thread_id]:
                    raise ThreadBusyError(
                        f"thread {thread_id!r} is streaming an answer; finish or close the stream, then retract"
                    )
                self._record(thread_id, plan, known)
                self._erase(thread_id, view, plan)
            return plan

    def key(
        self,
        thread_id: str,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> ThreadKey:
        """Return what the engine would be asked for: the rendered thread with its retractions applied."""
        with self._lock:
            return self._view(thread_id, messages, tools, add_generation_prompt).key

    # -- state ------------------------------------------------------------------------------------------------------

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

    # -- parts of a step --------------------------------------------------------------------------------------------

    def _view(
        self, thread_id: str, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = True
    ) -> ThreadView:
        return view_thread(
            self.engine,
            self.renderer,
            self.ledger.records(thread_id),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            extra_key=self.extra_key,
        )

    def _persist_cold(self, thread_id: str, view: ThreadView) -> None:
        """A steered span that is no longer cached is about to be rebuilt exactly: say so in the ledger."""
        known = {r.retraction_id: r.status for r in self.ledger.records(thread_id)}
        flipped = {r.retraction_id: r.status for r in view.records if known[r.retraction_id] is not r.status}
        if flipped:
            self.ledger.set_status(thread_id, flipped)

    def _record(self, thread_id: str, plan: RetractionPlan, known: Sequence[RetractionRecord]) -> None:
        records = {span.record.retraction_id: span.record for span in plan.spans}
        self.ledger.add(thread_id, records.values())
        # A record that was revoked and is made again keeps its id; adding it once more changes nothing.
        revoked = [r.retraction_id for r in known if r.status is Status.REVOKED and r.retraction_id in records]
        if revoked:
            self.ledger.set_status(thread_id, {id: records[id].status for id in revoked})

    def _erase(self, thread_id: str, view: ThreadView, plan: RetractionPlan) -> None:
        erased = apply_plan(self.engine, self.eraser, view, plan)
        self._last_erase[thread_id] = erased
        steered = [s.record for s in plan.spans if not s.exact]
        if erased.exact and steered:
            self.ledger.set_status(thread_id, {record.retraction_id: Status.EXACT for record in steered})

    def _with_notice(self, proposal: Retraction, messages: Sequence[Message]) -> Retraction:
        if proposal.notice is not None or not (self.notify or self.eraser.needs_notice):
            return proposal
        return replace(proposal, notice=default_notice(proposal, messages))

    @contextmanager
    def _streaming(self, thread_id: str) -> Iterator[None]:
        with self._lock:
            self._streams[thread_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[thread_id] -= 1
                if not self._streams[thread_id]:
                    del self._streams[thread_id]
