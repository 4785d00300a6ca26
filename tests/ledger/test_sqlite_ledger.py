"""The SQLite ledger: what is acknowledged stays, and a damaged file is neither used nor touched."""

import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import pytest

from kv_retract.errors import LedgerError
from kv_retract.ledger.ledger import SqliteLedger
from kv_retract.types import Guarantee, RetractionRecord, Scope, SpanRef, Status


def record(number, **kw):
    fields = {
        "retraction_id": f"{number:016x}",
        "span": SpanRef(number),
        "window_size": 1,
        "window_digest": hashlib.sha256(str(number).encode()).hexdigest(),
        "policy": "explicit",
        "reason": "stale",
        "guarantee": Guarantee.STEERED,
        "scope": Scope.BRANCH,
        "status": Status.STEERED,
        "eraser_id": "mask",
    }
    return RetractionRecord(**{**fields, **kw})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger ?#%é.sqlite"


@pytest.fixture
def filled(path):
    """A closed file of several pages."""
    with SqliteLedger(path) as ledger:
        ledger.add("t", [record(i) for i in range(60)])
        ledger.set_status("t", {record(3).retraction_id: Status.EXACT})
    return path


def test_everything_is_there_after_reopening(filled):
    with SqliteLedger(str(filled)) as ledger:
        records = ledger.records("t")
        assert len(records) == 60 and records[3] == record(3, status=Status.EXACT) and records[4] == record(4)
        ledger.fork("t", "u")
        ledger.set_status("u", {record(4).retraction_id: Status.REVOKED})
    with SqliteLedger(filled) as ledger:
        assert ledger.records("u")[4].status is Status.REVOKED
        assert ledger.records("t")[4].status is Status.STEERED


def test_the_file_is_a_durable_log(filled):
    with SqliteLedger(filled) as ledger:
        ledger.set_status("t", {record(3).retraction_id: Status.STEERED})
        with sqlite3.connect(filled) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            kinds = db.execute(
                "SELECT kind, data FROM changes WHERE retraction_id = ? ORDER BY seq", [record(3).retraction_id]
            )
            assert [data if kind == "status" else kind for kind, data in kinds] == ["add", "exact", "steered"]
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_setting_the_same_status_writes_nothing(filled):
    with SqliteLedger(filled) as ledger, sqlite3.connect(filled) as db:
        before = db.execute("SELECT count(*) FROM changes").fetchone()
        ledger.set_status("t", {record(3).retraction_id: Status.EXACT})
        ledger.add("t", [record(i) for i in range(60)])
        assert db.execute("SELECT count(*) FROM changes").fetchone() == before


ADDS_FOREVER = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, sys.argv[2])
    from test_sqlite_ledger import SqliteLedger, Status, record
    ledger = SqliteLedger(sys.argv[1])
    number = 0
    while True:
        ledger.add("t", [record(2 * number), record(2 * number + 1)])
        ledger.set_status("t", {record(2 * number).retraction_id: Status.EXACT})
        print(number, flush=True)
        number += 1
    """
)


@pytest.mark.parametrize("acknowledged", [1, 7, 25])
def test_what_was_acknowledged_survives_a_kill(path, acknowledged):
    child = subprocess.Popen(
        [sys.executable, "-c", ADDS_FOREVER, str(path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True
    )
    seen = [int(child.stdout.readline()) for _ in range(acknowledged)]
    child.send_signal(signal.SIGKILL)
    seen += [int(line) for line in child.stdout.read().split()]
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    with SqliteLedger(path) as ledger:
        records = ledger.records("t")
        assert len(records) % 2 == 0, "an addition is atomic"
        assert len(records) >= 2 * len(seen)
        assert all(
            r.status is (Status.STEERED if i % 2 else Status.EXACT) for i, r in enumerate(records[: 2 * len(seen)])
        )
        ledger.add("t", [record(10**6)])
        assert len(ledger.records("t")) == len(records) + 1


def add_some(path, worker, barrier):
    barrier.wait()
    with SqliteLedger(path) as ledger:
        for number in range(25):
            ledger.add("t", [record(number), record(1000 * worker + number)])


def test_two_processes_create_and_fill_one_file(path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=add_some, args=[path, worker, barrier]) for worker in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    with SqliteLedger(path) as ledger:
        ids = [r.retraction_id for r in ledger.records("t")]
    assert len(ids) == len(set(ids)) == 25 + 50
    assert [p.name for p in path.parent.iterdir()] == [path.name], "drafts are cleaned up"


def test_a_forked_child_may_go_on_using_the_ledger(path):
    with SqliteLedger(path) as ledger:
        ledger.add("t", [record(1)])

        def child():
            ledger.add("t", [record(2)])
            ledger.close()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        ledger.add("t", [record(3)])
        assert [r.span.message for r in ledger.records("t")] == [1, 2, 3]


def test_one_process_sees_what_the_other_wrote(path):
    with SqliteLedger(path) as one, SqliteLedger(path) as two:
        one.add("t", [record(1)])
        two.set_status("t", {record(1).retraction_id: Status.REVOKED})
        assert one.records("t")[0].status is Status.REVOKED


ADDS_ONE = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, sys.argv[2])
    from test_sqlite_ledger import SqliteLedger, record
    with SqliteLedger(sys.argv[1]) as ledger:
        ledger.add("t", [record(int(sys.argv[3]))])
    """
)


def another_process_adds(path, number):
    """Not by a fork: it shares nothing with this process, and closes the file as the last one it knows of."""
    subprocess.run([sys.executable, "-c", ADDS_ONE, str(path), os.path.dirname(__file__), str(number)], check=True)


def as_another_process_sees_it(path):
    code = (
        ADDS_ONE[: ADDS_ONE.index("with")] + "print([r.span.message for r in SqliteLedger(sys.argv[1]).records('t')])"
    )
    command = [sys.executable, "-c", code, str(path), os.path.dirname(__file__)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("opened_and_closed", [False, True])
def test_opening_the_file_twice_keeps_other_processes_from_discarding_the_log(path, opened_and_closed):
    """Locks are the process's: giving them up by closing the file once more would lose what is added later."""
    with SqliteLedger(path) as first:
        first.add("t", [record(1)])
        second = SqliteLedger(path)
        if opened_and_closed:
            second.close()
        another_process_adds(path, 2)
        first.add("t", [record(3)])
        assert as_another_process_sees_it(path) == [1, 2, 3]
        second.close()


def test_a_refused_opening_gives_up_no_locks(filled):
    with SqliteLedger(filled) as first:
        first.add("u", [record(1)])
        with sqlite3.connect(filled) as db:
            db.execute("PRAGMA user_version = 2")
        db.close()
        with pytest.raises(LedgerError, match="version 2"):
            SqliteLedger(filled)
        with sqlite3.connect(filled) as db:
            db.execute("PRAGMA user_version = 1")
        db.close()
        another_process_adds(filled, 100)
        first.add("t", [record(101)])
        assert as_another_process_sees_it(filled) == [*range(60), 100, 101]


def test_a_forked_child_holds_locks_of_its_own(path):
    context = multiprocessing.get_context("fork")
    added, closed = context.Event(), context.Event()
    ledger = SqliteLedger(path)
    ledger.add("t", [record(1)])

    def child():
        ledger.add("t", [record(2)])
        added.set()
        assert closed.wait(60)
        ledger.add("t", [record(4)])

    process = context.Process(target=child)
    process.start()
    assert added.wait(60)
    ledger.close()
    another_process_adds(path, 3)
    closed.set()
    process.join(60)
    assert process.exitcode == 0
    assert as_another_process_sees_it(path) == [1, 2, 3, 4]


def test_forks_while_other_threads_write_and_open(path):
    """No child inherits a lock or a transaction of a thread that it does not have."""
    stop, errors = threading.Event(), []

    def write(worker):
        try:
            number = 1000 * worker
            while not stop.is_set():
                ledger.add("t", [record(number)])
                SqliteLedger(path).close()
                number += 1
        except Exception as error:
            errors.append(error)

    with SqliteLedger(path) as ledger:
        threads = [threading.Thread(target=write, args=[worker]) for worker in (1, 2)]
        for thread in threads:
            thread.start()
        children = [
            multiprocessing.get_context("fork").Process(target=lambda n=n: ledger.add("t", [record(n)]))
            for n in range(8)
        ]
        try:
            for child in children:
                child.start()
            for child in children:
                child.join(60)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not errors
        assert [child.exitcode for child in children] == [0] * 8
        mine = [r.span.message for r in ledger.records("t")]
    assert {n for n in mine if n < 1000} == set(range(8))
    assert as_another_process_sees_it(path) == mine


def test_records_may_come_from_code_that_forks(path):
    with SqliteLedger(path) as ledger:

        def made():
            yield record(1)
            process = multiprocessing.get_context("fork").Process(target=lambda: ledger.add("t", [record(2)]))
            process.start()
            process.join(60)
            assert process.exitcode == 0
            yield record(3)

        ledger.add("t", made())
        assert [r.span.message for r in ledger.records("t")] == [2, 1, 3]


# -- damage -------------------------------------------------------------------------------------------------------


def refused(path, says):
    """Opening raises, names the file and the remedy, and leaves the bytes alone."""
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=says) as caught:
        SqliteLedger(path)
    assert path.name in str(caught.value)
    assert any(word in str(caught.value) for word in ("name another file", "restore", "use the version"))
    assert path.read_bytes() == before
    beside = {p.name.removeprefix(path.name): p.stat().st_size for p in path.parent.iterdir()}
    assert beside.keys() <= {"", "-wal", "-shm"} and not beside.get("-wal"), "SQLite's own files, and nothing in them"


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(filled, keep):
    data = filled.read_bytes()
    filled.write_bytes(data[: int(len(data) * keep)])
    refused(filled, "corrupt|empty|not a ledger|another program")


@pytest.mark.parametrize("page", [1, 2, 3, 5])
def test_overwritten_pages_are_refused(filled, page):
    data = bytearray(filled.read_bytes())
    data[4096 * page : 4096 * (page + 1)] = os.urandom(4096)
    filled.write_bytes(data)
    refused(filled, "corrupt")


@pytest.mark.parametrize(
    "content", [b"not a database at all", b'{"json": true}' * 500, b"\0" * 8192, b"SQLite format 3\0"]
)
def test_what_is_no_database_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "not a ledger|corrupt|another program")


def test_the_database_of_another_program_is_refused(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE cookies (name)")
    db.close()
    refused(path, "another program")


def test_a_newer_version_is_refused(filled):
    with sqlite3.connect(filled) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    refused(filled, "version 2, this kv-retract reads version 1")


@pytest.mark.parametrize("data", ["{", "{}", '{"retraction_id": "x", "new_field": 1}', "[]", "3"])
def test_a_damaged_record_is_reported_when_it_is_read(filled, data):
    with sqlite3.connect(filled) as db:
        db.execute("UPDATE changes SET data = ? WHERE seq = 7", [data])
    db.close()
    with SqliteLedger(filled) as ledger, pytest.raises(LedgerError, match="thread 't'.*restore it from a backup"):
        ledger.records("t")


def test_paths_that_cannot_be_opened(tmp_path):
    with pytest.raises(LedgerError, match="cannot be opened|cannot be used"):
        SqliteLedger(tmp_path)
    with pytest.raises(LedgerError, match="a folder that exists|its folder exists"):
        SqliteLedger(tmp_path / "missing" / "ledger.sqlite")
    assert not (tmp_path / "missing").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(filled):
    filled.chmod(0)
    with pytest.raises(LedgerError, match="cannot be opened"):
        SqliteLedger(filled)


def test_a_closed_ledger_says_so(path):
    ledger = SqliteLedger(path)
    ledger.close()
    ledger.close()
    for use in (lambda: ledger.records("t"), lambda: ledger.add("t", [record(1)]), ledger.threads):
        with pytest.raises(LedgerError, match="is closed; open a new"):
            use()


def test_a_blocked_file_is_reported_and_nothing_is_half_written(path, monkeypatch):
    monkeypatch.setattr("kv_retract.ledger.sqlite._BUSY_SECONDS", 0.05)
    with SqliteLedger(path) as ledger:
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked.*no other process"):
            ledger.add("t", [record(1)])
        blocker.execute("COMMIT")
        blocker.close()
        ledger.add("t", [record(2)])
        assert ledger.records("t") == (record(2),)


def test_a_thread_id_that_is_not_unicode_is_refused(path):
    with SqliteLedger(path) as ledger, pytest.raises(LedgerError, match="valid Unicode"):
        ledger.add("\ud800", [record(1)])
