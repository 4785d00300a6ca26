"""Conformance suite of ledgers: durable retraction state, by thread."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from ..errors import LedgerError
from ..ledger.base import Ledger
from ..types import Guarantee, RetractionRecord, Scope, SpanRef, Status

THREAD_IDS = ("", "b\0c", "b", "Ü 😀", "'; DROP TABLE changes; --", "B")
"""Text that a ledger must be able to name a thread by."""


def record(number: int, **changes: Any) -> RetractionRecord:
    """Return a record with every field set; its id is made from the number."""
    made = RetractionRecord(
        retraction_id=f"{number:016x}",
        span=SpanRef(number, "tool_call", 1, 2, None),
        window_size=2,
        window_digest="d" * 64,
        policy="explicit",
        reason="stale \ud800 \0 'quoted' 😀",
        guarantee=Guarantee.EXACT,
        scope=Scope.THREAD,
        status=Status.STEERED,
        eraser_id="repair(w=8)",
        closes_gap=True,
        notice="withdrawn",
        created_at="2025-01-01T00:00:00+00:00",
        span_tokens=12,
    )
    return dataclasses.replace(made, **changes)


class LedgerConformance:
    """Subclass it and provide the fixture `make_ledger`: a function that opens a ledger, empty the first time.

    Set `durable` where calling it again, after closing or beside an open ledger, opens the same records.
    """

    durable: ClassVar[bool] = False
    """Whether records outlive the object that holds them."""

    @pytest.fixture
    def make_ledger(self) -> Callable[[], Ledger]:
        """Return what opens a ledger of this test."""
        raise NotImplementedError("give the suite a fixture `make_ledger`")

    @pytest.fixture
    def ledger(self, make_ledger: Callable[[], Ledger]) -> Iterator[Ledger]:
        """Return an empty ledger, closed after the test."""
        with make_ledger() as ledger:
            yield ledger

    def test_records_come_back_as_they_were_added_in_order(self, ledger: Ledger) -> None:
        """Every field, any iterable, nothing for a thread that is not there."""
        ledger.add("t", [record(2), record(1)])
        ledger.add("t", iter([record(3)]))
        assert ledger.records("t") == (record(2), record(1), record(3))
        assert ledger.records("other") == ()

    def test_adding_again_changes_nothing(self, ledger: Ledger) -> None:
        """A known id stays as it is, with the status it has by now."""
        ledger.add("t", [record(1), record(1, reason="second")])
        ledger.set_status("t", {record(1).retraction_id: Status.EXACT})
        ledger.add("t", [record(1, reason="third"), record(2)])
        assert ledger.records("t") == (record(1, status=Status.EXACT), record(2))

    def test_adding_is_all_or_nothing(self, ledger: Ledger) -> None:
        """Where the caller's iterable raises, nothing was added and the ledger still works."""

        def broken() -> Iterator[RetractionRecord]:
            yield record(1)
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            ledger.add("t", broken())
        assert ledger.records("t") == () and ledger.threads() == []
        ledger.add("t", [record(2)])
        assert ledger.records("t") == (record(2),)

    def test_a_status_changes_in_place(self, ledger: Ledger) -> None:
        """The newest status counts; the order stays; no statuses, no thread."""
        ledger.add("t", [record(1), record(2)])
        one, two = record(1).retraction_id, record(2).retraction_id
        ledger.set_status("t", {one: Status.EXACT, two: Status.REVOKED})
        ledger.set_status("t", {two: Status.STEERED})
        assert ledger.records("t") == (record(1, status=Status.EXACT), record(2))
        ledger.set_status("u", {})
        assert ledger.threads() == ["t"]

    def test_a_status_may_be_changed_only_where_it_still_is_what_it_was(self, ledger: Ledger) -> None:
        """Compare and set: what another process has decided meanwhile stands."""
        ledger.add("t", [record(1), record(2)])
        ledger.set_status("t", {record(1).retraction_id: Status.REVOKED})
        both = {record(n).retraction_id: Status.EXACT for n in (1, 2)}
        ledger.set_status("t", both, only=Status.STEERED)
        assert ledger.records("t") == (record(1, status=Status.REVOKED), record(2, status=Status.EXACT))

    def test_a_wrong_status_changes_nothing(self, ledger: Ledger) -> None:
        """All or none: an unknown id or status leaves also the others as they were."""
        ledger.add("t", [record(1), record(2)])
        one, two = record(1).retraction_id, record(2).retraction_id
        with pytest.raises(LedgerError):
            ledger.set_status("t", {one: Status.REVOKED, "nobody": Status.EXACT})
        sideways: Any = "sideways"
        with pytest.raises(ValueError):
            ledger.set_status("t", {one: Status.REVOKED, two: sideways})
        assert ledger.records("t") == (record(1), record(2))

    def test_a_fork_copies_and_then_goes_its_own_way(self, ledger: Ledger) -> None:
        """Forking again is harmless; later changes on either side stay there."""
        ledger.add("t", [record(1), record(2)])
        ledger.set_status("t", {record(1).retraction_id: Status.REVOKED})
        ledger.fork("t", "u")
        ledger.fork("t", "u")
        assert ledger.records("u") == ledger.records("t") == (record(1, status=Status.REVOKED), record(2))
        ledger.add("u", [record(3)])
        ledger.set_status("t", {record(2).retraction_id: Status.EXACT})
        assert len(ledger.records("t")) == 2 and ledger.records("u")[1] == record(2)

    def test_a_fork_into_other_records_is_refused(self, ledger: Ledger) -> None:
        """Whatever the source holds; forking nothing, or a thread into itself, is harmless."""
        ledger.add("t", [record(1)])
        ledger.add("u", [record(1), record(2)])
        for source in ("t", "empty"):
            with pytest.raises(LedgerError):
                ledger.fork(source, "u")
        ledger.fork("empty", "fresh")
        ledger.fork("t", "t")
        assert ledger.threads() == ["t", "u"]
        assert ledger.records("t") == (record(1),) and ledger.records("u") == (record(1), record(2))

    def test_thread_ids_are_any_text(self, ledger: Ledger) -> None:
        """Each names a thread of its own; a thread without records is not listed."""
        for number, name in enumerate(THREAD_IDS):
            ledger.add(name, [record(number)])
        ledger.add("nothing", [])
        assert ledger.threads() == sorted(THREAD_IDS)
        assert [ledger.records(name) for name in THREAD_IDS] == [(record(n),) for n in range(len(THREAD_IDS))]

    def test_python_threads_add_at_once(self, ledger: Ledger) -> None:
        """Nothing is lost, nothing is there twice."""
        errors: list[Exception] = []

        def work(worker: int) -> None:
            try:
                for number in range(20):
                    ledger.add("t", [record(number), record(100 + 20 * worker + number)])
                    ledger.records("t")
            except Exception as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=[i]) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors
        ids = [r.retraction_id for r in ledger.records("t")]
        assert len(ids) == len(set(ids)) == 20 + 80

    def test_records_are_values(self, ledger: Ledger) -> None:
        """What was handed in or out does not change with the ledger, nor the ledger with it."""
        mine = [record(1)]
        ledger.add("t", mine)
        mine.append(record(2))
        got = ledger.records("t")
        ledger.add("t", [record(3)])
        assert got == (record(1),)
        assert ledger.records("t") == (record(1), record(3))

    def test_closing_twice_is_harmless(self, make_ledger: Callable[[], Ledger]) -> None:
        """Also after the `with` block has closed it."""
        with make_ledger() as ledger:
            ledger.add("t", [record(1)])
        ledger.close()

    def test_records_outlive_a_durable_ledger(self, make_ledger: Callable[[], Ledger]) -> None:
        """A change is done when the call returns: beside the ledger that made it, and after it is closed."""
        if not self.durable:
            pytest.skip("the ledger does not say that it is durable")
        with make_ledger() as ledger:
            ledger.add("t", [record(1), record(2)])
            ledger.set_status("t", {record(1).retraction_id: Status.REVOKED})
            with make_ledger() as beside:
                assert beside.records("t") == ledger.records("t")
                beside.fork("t", "u")
            assert ledger.threads() == ["t", "u"]
        with make_ledger() as again:
            assert again.records("u") == again.records("t") == (record(1, status=Status.REVOKED), record(2))
