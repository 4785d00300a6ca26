"""Disks, files, clocks and neighbours that fail: one clear error, nothing acknowledged lost, nothing retracted read."""

import itertools
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from kv_retract import Guarantee, KVRetractSession, Message, Planner, Retraction, SamplingParams, SpanRef, Status
from kv_retract.audit import AuditLog, read, verify
from kv_retract.errors import AuditError, KVRetractError, LedgerError
from kv_retract.healing import Healing
from kv_retract.ledger.ledger import SqliteLedger, record_for
from kv_retract.policies import Expired
from kv_retract.testing.spy import prefilled_texts

ONE = SamplingParams(max_tokens=1)
BY_HAND = Healing(background=False, chunk_tokens=16)


def thread(n=9):
    messages = [Message("system", "You are an agent.")]
    for i in range(1, n):
        messages.append(Message("user" if i % 2 else "assistant", f"item {i} costs {i * 37} <m{i}>"))
    return messages


def take_back(*messages, **kw):
    return [Retraction(**{"span": SpanRef(i), "policy": "explicit", "reason": "stale", **kw}) for i in messages]


@pytest.fixture(scope="module")
def loaded():
    return KVRetractSession.from_pretrained("random", max_tokens=4096)


@pytest.fixture
def open_session(loaded, tmp_path, request):
    """Open sessions on the files of the test, each with a cold cache of its own, as in a process of its own."""
    opened = []

    def make(folder=tmp_path, **kw):
        session = KVRetractSession(
            loaded.engine, loaded.renderer, extra_key=f"{request.node.name}/{len(opened)}",
            planner=Planner(exact_suffix=0), ledger=folder / "ledger.sqlite",
            observers=[AuditLog(folder / "audit.jsonl")], **{"healing": BY_HAND, **kw},
        )  # fmt: skip
        opened.append(session)
        return session

    yield make
    for session in opened:
        session.close()
    loaded.engine.check_integrity()


def reads(session, messages=None, thread_id="t"):
    """Take a step; return the numbers of the messages that the model may look at, none of the others was prefilled."""
    messages = messages or thread()
    with prefilled_texts(session) as texts:
        session.step(thread_id, messages, sampling=ONE)
    key = session.renderer.decode([int(i) for i in session.key(thread_id, messages).ids if i >= 0])
    read_now = {i for i in range(1, len(messages)) if f"<m{i}>" in key}
    assert {i for i in range(1, len(messages)) if f"<m{i}>" in "".join(texts)} <= read_now
    return read_now


def statuses(session, thread_id="t"):
    return {r.span.message: r.status for r in session.history(thread_id)}


@contextmanager
def room_for(size):
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder, *options):
    """Mount a file system on a folder; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# -- a full disk ----------------------------------------------------------------------------------------------------


def test_on_a_full_disk_the_ledger_takes_all_spans_of_a_plan_or_none(open_session, tmp_path):
    """The audit log still has room, so it says what was decided and could not be done."""
    session, everything = open_session(), set(range(1, 9))
    assert reads(session) == everything
    session.retract("t", thread(), proposals=take_back(2))
    with room_for((tmp_path / "ledger.sqlite-wal").stat().st_size):
        for _ in range(2):
            with pytest.raises(LedgerError, match=r"ledger\.sqlite' cannot be used: .*disk"):
                session.retract("t", thread(), proposals=take_back(4, 6))
        with pytest.raises(LedgerError, match="disk"):
            session.undo("t", session.history("t")[0].retraction_id)
        assert statuses(session) == {2: Status.STEERED}
        assert reads(session) == everything - {2}, "threads go on with what they had"
    assert reads(session) == everything - {2}
    session.retract("t", thread(), proposals=take_back(4, 6))
    assert reads(session) == everything - {2, 4, 6}
    session.close()
    assert statuses(open_session()).keys() == {2, 4, 6}
    assert [e["event"] for e in read(tmp_path / "audit.jsonl")] == [
        "decided", "erased", "decided", "decided", "status_changes", "decided", "erased",
    ]  # fmt: skip


def test_a_step_that_cannot_write_down_that_a_span_is_cold_reads_nothing(open_session, tmp_path):
    session = open_session()
    reads(session)
    session.retract("t", thread(), proposals=take_back(2))
    restarted = open_session()
    with room_for((tmp_path / "ledger.sqlite-wal").stat().st_size), prefilled_texts(restarted) as texts:
        with pytest.raises(LedgerError, match="disk"):
            restarted.step("t", thread(), sampling=ONE)
    assert not texts and statuses(restarted) == {2: Status.STEERED}
    assert reads(restarted) == set(range(1, 9)) - {2}
    assert statuses(restarted) == {2: Status.EXACT}


def test_a_heal_that_cannot_be_written_down_leaves_the_thread_steered(open_session, tmp_path):
    session = open_session()
    reads(session)
    session.retract("t", thread(), proposals=take_back(2))
    with room_for((tmp_path / "ledger.sqlite-wal").stat().st_size), pytest.raises(LedgerError, match="disk"):
        session.healer.run()
    assert statuses(session) == {2: Status.STEERED}
    assert reads(session) == set(range(1, 9)) - {2}, "and the step offers it to the healer again"
    session.healer.run()
    assert statuses(session) == {2: Status.EXACT}
    assert reads(session) == set(range(1, 9)) - {2}


def test_a_file_system_without_any_room(open_session, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=512k", "tmpfs") as disk:
        session = open_session(disk)
        reads(session)
        session.retract("t", thread(), proposals=take_back(2))
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        told = 0
        for at in (3, 4, 5, 6):  # the last page of a file may have room for a little more
            try:
                session.retract("t", thread(), proposals=take_back(at))
            except KVRetractError as error:
                told += 1
                assert isinstance(error, AuditError | LedgerError) and "disk is not full" in str(error)
        assert told
        acknowledged = statuses(session)
        assert reads(session) == set(range(1, 9)) - acknowledged.keys()
        session.close()
        filler.unlink()
        restarted = open_session(disk)
        assert statuses(restarted).keys() == acknowledged.keys()
        restarted.retract("t", thread(), proposals=take_back(3, 4, 5, 6))
        assert reads(restarted) == {1, 7, 8}
        verify(disk / "audit.jsonl")
        restarted.close()


# -- files that may not be written ----------------------------------------------------------------------------------


def test_on_a_read_only_file_system_no_session_is_opened(open_session, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    open_session(folder).close()
    with mounted(tmp_path / "mounted", "--bind", "-o", "ro", str(folder)) as read_only:
        with pytest.raises(LedgerError, match=r"ledger\.sqlite' cannot be (opened|used): .*written"):
            SqliteLedger(read_only / "ledger.sqlite")
        with pytest.raises(AuditError, match=r"cannot be written: Read-only file system"):
            AuditLog(read_only / "audit.jsonl")


def test_a_folder_in_the_place_of_the_log_of_changes(open_session, tmp_path):
    open_session().close()
    (tmp_path / "ledger.sqlite-wal").mkdir()
    with pytest.raises(LedgerError, match=r"ledger\.sqlite' cannot be used: .*can be read and written"):
        open_session()


def test_an_audit_log_that_becomes_immutable_stops_retractions(open_session, tmp_path):
    session, path = open_session(), tmp_path / "audit.jsonl"
    reads(session)
    if subprocess.run(["chattr", "+i", str(path)], capture_output=True).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        with pytest.raises(AuditError, match=r"audit\.jsonl' cannot be written: Operation not permitted"):
            session.retract("t", thread(), proposals=take_back(2))
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)
    assert statuses(session) == {} and reads(session) == set(range(1, 9))
    session.retract("t", thread(), proposals=take_back(2))
    assert reads(session) == set(range(1, 9)) - {2}


# -- files that are damaged while they are used ---------------------------------------------------------------------


def removed(path):
    path.rename(path.with_name("elsewhere"))
    return lambda: path.with_name("elsewhere").rename(path)


def replaced(path):
    put_back = removed(path)
    shutil.copy(path.with_name("elsewhere"), path)
    return put_back


@pytest.mark.parametrize("fault", [removed, replaced])
@pytest.mark.parametrize("name", ["ledger.sqlite", "ledger.sqlite-wal"])
def test_a_ledger_that_is_gone_takes_and_gives_nothing_until_it_is_back(open_session, tmp_path, fault, name):
    """SQLite would go on with the files it has open, and what it acknowledges would be gone at the next start."""
    session = open_session()
    reads(session)
    session.retract("t", thread(), proposals=take_back(2))
    put_back = fault(tmp_path / name)
    with prefilled_texts(session) as texts:
        for use in (
            lambda: session.retract("t", thread(), proposals=take_back(4)),
            lambda: session.step("t", thread(), sampling=ONE),
            lambda: session.fork("t", "u"),
        ):
            with pytest.raises(LedgerError, match="removed, replaced or cut while it was in use; put both back"):
                use()
    assert not texts
    put_back()
    session.retract("t", thread(), proposals=take_back(6))
    assert reads(session) == set(range(1, 9)) - {2, 6}
    assert statuses(open_session()).keys() == {2, 6}


def test_no_new_ledger_is_begun_beside_the_log_of_one_that_is_gone(open_session, tmp_path):
    session = open_session()
    reads(session)
    session.retract("t", thread(), proposals=take_back(2))
    put_back = removed(tmp_path / "ledger.sqlite")
    with pytest.raises(
        LedgerError, match=r"is gone, but 'ledger\.sqlite-wal' holds changes of it; put the ledger back"
    ):
        open_session()
    assert not (tmp_path / "ledger.sqlite").exists()
    put_back()
    assert statuses(open_session()) == {2: Status.STEERED}


def test_a_ledger_that_is_cut_while_it_is_in_use(open_session, tmp_path):
    session, path = open_session(), tmp_path / "ledger.sqlite"
    reads(session)
    session.retract("t", thread(), proposals=take_back(2))
    session.ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert statuses(session)
    os.truncate(path, 4096)  # opens nothing, so it takes no locks away
    with prefilled_texts(session) as texts:
        for use in (
            lambda: session.retract("t", thread(), proposals=take_back(4)),
            lambda: session.step("t", thread(), sampling=ONE),
        ):
            with pytest.raises(LedgerError, match="removed, replaced or cut"):
                use()
    assert not texts
    session.close()
    with pytest.raises(LedgerError, match="corrupt.*restore it from a backup"):
        open_session()


def test_a_cut_ledger_with_its_log_is_whole_or_refused(tmp_path):
    """After a kill the newest pages are in the log only; whatever is left of the file, nothing is lost unseen."""
    with SqliteLedger(tmp_path / "ledger.sqlite") as ledger:
        records = records_of_many(60)
        ledger.add("t", records[:50])
        ledger._connection.execute("PRAGMA wal_checkpoint(RESTART)")
        ledger.add("t", records[50:])
        size, opened = (tmp_path / "ledger.sqlite").stat().st_size, 0
        for keep in range(0, size + 1, 4096):
            copy = tmp_path / f"cut-{keep}"
            copy.mkdir()
            for name in ("ledger.sqlite", "ledger.sqlite-wal"):  # in another process: see SqliteLedger
                subprocess.run(["cp", str(tmp_path / name), str(copy)], check=True)
            os.truncate(copy / "ledger.sqlite", keep)
            try:
                found = SqliteLedger(copy / "ledger.sqlite")
            except LedgerError:
                continue
            with found:
                assert list(found.records("t")) == records
                opened += 1
        assert 0 < opened < size // 4096


def records_of_many(n):
    messages = [Message("user", f"item {i}") for i in range(n)]
    return [
        record_for(
            proposal, messages, thread_id="t", eraser_id="mask", closes_gap=False, shared=False, exact=False, now="",
            span_tokens=3,
        )
        for proposal in take_back(*range(n))
    ]  # fmt: skip


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_an_audit_log_that_is_cut_while_it_is_in_use_stops_retractions(open_session, tmp_path, keep):
    session, path = open_session(), tmp_path / "audit.jsonl"
    reads(session)
    for at in (2, 4):
        session.retract("t", thread(), proposals=take_back(at))
    head, size = verify(path).head, path.stat().st_size
    os.truncate(path, int(size * keep))
    for use in (
        lambda: session.retract("t", thread(), proposals=take_back(6)),
        lambda: session.undo("t", session.history("t")[0].retraction_id),
    ):
        with pytest.raises(AuditError, match="its end was cut off while it was in use|no audit log"):
            use()
    assert statuses(session) == {2: Status.STEERED, 4: Status.STEERED}
    assert reads(session) == set(range(1, 9)) - {2, 4}
    with pytest.raises(AuditError):
        verify(path, head=head)


# -- two sessions on one ledger and one audit log -------------------------------------------------------------------


def test_two_processes_take_back_at_once(nursery, tmp_path):
    """Both see what the other took back at their next step."""
    ended = nursery.order(folder=str(tmp_path), pair=6)
    assert ended["status"] == 0
    decided = [span["retraction_id"] for e in read(tmp_path / "audit.jsonl") for span in e.get("spans", ())]
    with SqliteLedger(tmp_path / "ledger.sqlite") as ledger:
        records = ledger.records("t")
    assert len(records) == 13
    assert set(decided) == {r.retraction_id for r in records}
    assert verify(tmp_path / "audit.jsonl").torn_bytes == 0


def test_what_one_session_undoes_the_healer_of_another_does_not_retract_again(open_session):
    one, other = open_session(), open_session()
    reads(one)
    one.retract("t", thread(), proposals=take_back(2, 4))
    one.healer.run(16)
    assert one.healer.pending() == 1
    first, _ = other.history("t")
    other.undo("t", first.retraction_id)
    one.healer.run()
    assert statuses(other) == {2: Status.REVOKED, 4: Status.EXACT}
    assert reads(one) == reads(other) == set(range(1, 9)) - {4}


def test_what_one_session_takes_back_another_reads_no_more_though_it_is_cached(open_session):
    one, other = open_session(), open_session()
    assert reads(one) == reads(other) == set(range(1, 9))
    one.retract("t", thread(), proposals=take_back(2))
    other.retract("t", thread(), proposals=take_back(4, guarantee=Guarantee.EXACT))
    assert reads(one) == reads(other) == set(range(1, 9)) - {2, 4}
    assert statuses(one) == statuses(other) == {2: Status.EXACT, 4: Status.EXACT}


# -- clocks ---------------------------------------------------------------------------------------------------------


class Clock(datetime):
    """A clock that is set back by a day between any two looks at it."""

    days = itertools.count(0, -1)

    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 5, 1, tzinfo=UTC) + timedelta(days=next(cls.days))


def set_clock(monkeypatch, clock):
    """Let every module of the package that looks at the time look at this clock."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "kv_retract" and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", clock)


def test_history_and_audit_log_keep_the_order_of_the_calls(open_session, tmp_path, monkeypatch):
    set_clock(monkeypatch, Clock)
    session = open_session()
    reads(session)
    for at in (6, 2, 4):
        session.retract("t", thread(), proposals=take_back(at))
    session.undo("t", session.history("t")[1].retraction_id)
    session.healer.run()
    assert [r.span.message for r in session.history("t")] == [6, 2, 4]
    times = [r.created_at for r in session.history("t")]
    assert times == sorted(times, reverse=True) and len(set(times)) == 3
    verified = verify(tmp_path / "audit.jsonl")
    assert verified.clock_steps > 0
    assert [e["spans"][0]["span"]["message"] for e in read(tmp_path / "audit.jsonl") if e["event"] == "decided"] == [
        6, 2, 4,
    ]  # fmt: skip
    assert reads(session) == set(range(1, 9)) - {6, 4}


@pytest.mark.parametrize("days", [-36_500, -1, 1, 2_550_000])
def test_what_expires_is_judged_by_the_clock_of_the_step(open_session, monkeypatch, days):
    class Set(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 5, 1, tzinfo=UTC) + timedelta(days=days)

    set_clock(monkeypatch, Set)
    result = Message("tool", '{"price": 42, "timestamp": "2026-05-01T00:00:00+00:00"}', name="look", tool_call_id="c1")
    messages = [*thread(2), result, *thread()[3:]]
    session = open_session(policies=[Expired(seconds={"look": 3600})])
    session.step("t", messages, sampling=ONE)
    assert statuses(session).keys() == ({2} if days > 0 else set())


def test_a_clock_that_steps_does_not_stall_the_healer(open_session, monkeypatch):
    times = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr("time.time", lambda: float(next(times)))
    session = open_session(healing=Healing(chunk_tokens=16, tokens_per_second=5_000, patience_s=0.05))
    reads(session)
    session.retract("t", thread(), proposals=take_back(2))
    assert session.healer.wait(30)
    assert statuses(session) == {2: Status.EXACT}
