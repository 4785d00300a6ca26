"""The contract of ledgers, kept by every implementation."""

import dataclasses
import threading

import pytest

from kv_retract.errors import LedgerError
from kv_retract.ledger.ledger import MemoryLedger, SqliteLedger
from kv_retract.types import Guarantee, RetractionRecord, Scope, SpanRef, Status


def record(number, **kw):
    fields = {
        "retraction_id": f"{number:016x}",
        "span": SpanRef(number, "tool_call", 1, 2, None),
        "window_size": 2,
        "window_digest": "d" * 64,
        "policy": "explicit",
        "reason": "stale \ud800 \0 'quoted' 😀",
        "guarantee": Guarantee.EXACT,
        "scope": Scope.THREAD,
        "status": Status.STEERED,
        "eraser_id": "repair(w=8)",
        "closes_gap": True,
        "notice": "withdrawn",
        "created_at": "2025-01-01T00:00:00+00:00",
        "span_tokens": 12,
    }
    return RetractionRecord(**{**fields, **kw})


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request, tmp_path):
    with MemoryLedger() if request.param == "memory" else SqliteLedger(tmp_path / "ledger.sqlite") as made:
        yield made


def test_records_come_back_as_they_were_added_in_order(ledger):
    ledger.add("t", [record(2), record(1)])
    ledger.add("t", iter([record(3)]))
    assert ledger.records("t") == (record(2), record(1), record(3))
    assert ledger.records("other") == ()


def test_adding_again_changes_nothing(ledger):
    ledger.add("t", [record(1), record(1, reason="second")])
    ledger.set_status("t", {record(1).retraction_id: Status.EXACT})
    ledger.add("t", [record(1, reason="third"), record(2)])
    assert ledger.records("t") == (record(1, status=Status.EXACT), record(2))


def test_adding_is_all_or_nothing(ledger):
    def broken():
        yield record(1)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ledger.add("t", broken())
    assert ledger.records("t") == () and ledger.threads() == []
    ledger.add("t", [record(2)])
    assert ledger.records("t") == (record(2),)


def test_a_status_changes_in_place_and_unknown_ids_change_nothing(ledger):
    ledger.add("t", [record(1), record(2)])
    one, two = record(1).retraction_id, record(2).retraction_id
    ledger.set_status("t", {one: Status.EXACT, two: Status.REVOKED})
    ledger.set_status("t", {two: Status.STEERED})
    want = (record(1, status=Status.EXACT), record(2))
    assert ledger.records("t") == want
    with pytest.raises(LedgerError, match="'t' has no retraction 'nobody'"):
        ledger.set_status("t", {one: Status.REVOKED, "nobody": Status.EXACT})
    with pytest.raises(ValueError, match="sideways"):
        ledger.set_status("t", {one: Status.REVOKED, two: "sideways"})
    assert ledger.records("t") == want
    ledger.set_status("u", {})
    assert ledger.threads() == ["t"]


def test_a_fork_copies_and_then_goes_its_own_way(ledger):
    ledger.add("t", [record(1), record(2)])
    ledger.set_status("t", {record(1).retraction_id: Status.REVOKED})
    ledger.fork("t", "u")
    ledger.fork("t", "u")
    assert ledger.records("u") == ledger.records("t") == (record(1, status=Status.REVOKED), record(2))
    ledger.add("u", [record(3)])
    ledger.set_status("t", {record(2).retraction_id: Status.EXACT})
    assert len(ledger.records("t")) == 2 and ledger.records("u")[1] == record(2)
    with pytest.raises(LedgerError, match="cannot fork 't' into 'u': it has 3 other retractions"):
        ledger.fork("t", "u")
    ledger.fork("empty", "fresh")
    ledger.fork("t", "t")
    with pytest.raises(LedgerError, match="cannot fork 'empty'"):
        ledger.fork("empty", "t")
    assert ledger.threads() == ["t", "u"]


def test_thread_ids_are_any_text(ledger):
    for name in ("", "b\0c", "b", "Ü 😀", "'; DROP TABLE changes; --", "B"):
        ledger.add(name, [record(1)])
    ledger.add("nothing", [])
    assert ledger.threads() == sorted(["", "b\0c", "b", "Ü 😀", "'; DROP TABLE changes; --", "B"])


def test_threads_of_python_add_at_once(ledger):
    errors = []

    def work(worker):
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


def test_records_are_values(ledger):
    mine = [record(1)]
    ledger.add("t", mine)
    mine.append(record(2))
    got = ledger.records("t")
    ledger.add("t", [record(3)])
    assert got == (record(1),)
    assert dataclasses.replace(got[0], status=Status.EXACT) not in ledger.records("t")
