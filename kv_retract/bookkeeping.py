"""Changes of retraction records, each told to the observers before the ledger is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .errors import LedgerError, ThreadBusyError
from .events import Decided, Observers, StatusChanges, Why
from .ledger.ledger import Ledger
from .spans import text_of
from .threads import ThreadTable
from .types import Divergence, Message, RetractionPlan, RetractionRecord, Status


class Bookkeeper:
    """Writes what is decided: to the observers first, since an audit log must be able to stop it, then to the ledger.

    Its methods are called under the lock of the threads.
    """

    def __init__(self, ledger: Ledger, observers: Observers, threads: ThreadTable) -> None:
        self._ledger, self._observers, self._threads = ledger, observers, threads

    def record(
        self, plan: RetractionPlan, messages: Sequence[Message], known: Sequence[RetractionRecord], actor: str
    ) -> None:
        """Write the records of a plan.

        Args:
            plan: with at least one span.
            messages: of the thread.
            known: records that stand in the messages, revoked ones too.
            actor: who decided.

        Raises:
            ThreadBusyError: the thread is streaming an answer.
        """
        self.check_idle(plan.thread_id, "retract")
        records = {span.record.retraction_id: span.record for span in plan.spans}
        digests = {id: _digest(text_of(record.span, messages)) for id, record in records.items()}
        self._observers.tell(Decided(thread_id=plan.thread_id, actor=actor, plan=plan, digests=digests))
        self._ledger.add(plan.thread_id, records.values())
        # A record that was revoked and is made again keeps its id; adding it once more changes nothing.
        revoked = {r.retraction_id for r in known if r.status is Status.REVOKED} & records.keys()
        self.set_status(plan.thread_id, {id: records[id].status for id in revoked}, actor, "redone")

    def set_status(
        self,
        thread_id: str,
        statuses: Mapping[str, Status],
        actor: str,
        why: Why,
        divergence: Divergence | None = None,
    ) -> tuple[RetractionRecord, ...]:
        """Change the statuses that differ; return the records that changed, as they are now.

        What the session and its healer do by themselves makes steered records exact, and touches no others: another
        process may have undone one meanwhile.
        """
        if not statuses:
            return ()
        known = {r.retraction_id: r for r in self._ledger.records(thread_id)}
        only = None if why in ("undone", "redone") else Status.STEERED
        changed = tuple(
            replace(known[i], status=status)
            for i, status in statuses.items()
            if known[i].status is not status and (only is None or known[i].status is only)
        )
        for record in changed:
            self._observers.tell(
                StatusChanges(
                    thread_id=thread_id,
                    actor=actor,
                    retraction_id=record.retraction_id,
                    before=known[record.retraction_id].status,
                    after=record.status,
                    why=why,
                    divergence=divergence,
                )
            )
        if changed:
            self._ledger.set_status(thread_id, {r.retraction_id: r.status for r in changed}, only=only)
            self._threads.touch(thread_id)
        return changed

    def undo(self, thread_id: str, retraction_id: str, actor: str) -> tuple[RetractionRecord, ...]:
        """Revoke a retraction and what its cascade brought; return what was not revoked before.

        Raises:
            LedgerError: the thread has no such retraction.
            ThreadBusyError: the thread is streaming an answer.
        """
        records = self._ledger.records(thread_id)
        if not any(r.retraction_id == retraction_id for r in records):
            raise LedgerError(
                f"thread {thread_id!r} has no retraction {retraction_id!r} among its {len(records)}; "
                "see KVRetractSession.history"
            )
        standing = {r.retraction_id: r for r in records if r.status is not Status.REVOKED}
        mine = derived = {retraction_id} & standing.keys()
        while derived:  # not through what was revoked before: what was derived from that went then, or was made again
            derived = {
                i
                for i, r in standing.items()
                if i not in mine and mine & {*r.derived_from} and not (standing.keys() - mine) & {*r.derived_from}
            }
            mine = mine | derived
        self.check_idle(thread_id, "undo")
        return self.set_status(thread_id, {i: Status.REVOKED for i in standing if i in mine}, actor, "undone")

    def check_idle(self, thread_id: str, what: str) -> None:
        """Raise ThreadBusyError where the thread is streaming an answer."""
        if self._threads.is_streaming(thread_id):
            raise ThreadBusyError(
                f"thread {thread_id!r} is streaming an answer; finish or close the stream, then {what}"
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
