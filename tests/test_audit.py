"""The audit log: nothing decided is missing, nothing is changed unseen, nothing of a thread stands in it."""

import dataclasses
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import sqlite3
import stat
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_retract import Guarantee, KVRetractSession, Message, Planner, Retraction, SamplingParams, SpanRef, Status
from kv_retract import events as events_module
from kv_retract.audit import AuditLog, file, read, verify
from kv_retract.audit.chain import chained, from_line, to_line
from kv_retract.errors import AuditError, PolicyError
from kv_retract.events import Decided, Diverged, Erased, Event, Healed, PoliciesFailed, StatusChanges, Stepped
from kv_retract.healing import Healing
from kv_retract.policies.asking import PolicyFailure
from kv_retract.policies.base import RetractionPolicy
from kv_retract.types import (
    Cascade,
    Divergence,
    Dropped,
    EraseResult,
    Evidence,
    Hop,
    PlannedSpan,
    RetractionPlan,
    RetractionRecord,
    Scope,
)

FORK = multiprocessing.get_context("fork")


def change(number, **kw):
    fields = {"thread_id": "t", "actor": "ann", "retraction_id": f"{number:016x}", "why": "undone"}
    return StatusChanges(**{**fields, "before": Status.STEERED, "after": Status.REVOKED, **kw})


def decided(**kw):
    record = RetractionRecord(
        retraction_id="aa", span=SpanRef(3, start=2, end=9), window_size=1, window_digest="d", policy="secret",
        reason="a key", guarantee=Guarantee.EXACT, scope=Scope.THREAD, status=Status.EXACT, eraser_id="mask",
        notice="withdrawn", derived_from=("bb",),
    )  # fmt: skip
    span = PlannedSpan(record=record, start=10, end=15, exact=True, why_exact="guarantee")
    evidence = Evidence(kind="value", source=SpanRef(1), target=SpanRef(3, start=2, end=9), weight=7.0)
    hop = Hop(kind="quote", source=SpanRef(1), target=SpanRef(3), evidence=(evidence,))
    dropped = Dropped(span=SpanRef(0), policy="expired", why="protected")
    plan = RetractionPlan(thread_id="t", spans=(span,), hops=(hop,), dropped=(dropped,))
    return Decided(**{"thread_id": "t", "actor": "policy", "plan": plan, "digests": {"aa": "5e"}, **kw})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit ?#%é.jsonl"


@pytest.fixture
def filled(path):
    log = AuditLog(path)
    for number in range(5):
        log.on_event(change(number))
    return path


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


# -- entries --------------------------------------------------------------------------------------------------------


def test_a_decision_is_written_in_full(path):
    AuditLog(path).on_event(decided(at="2025-01-01T00:00:00.000+00:00"))
    (entry,) = read(path)
    assert entry == {
        "seq": 1,
        "prev": json.loads(lines_of(path)[0])["hash"],
        "hash": entry["hash"],
        "at": "2025-01-01T00:00:00.000+00:00",
        "event": "decided",
        "thread_id": "t",
        "actor": "policy",
        "num_dropped": 1,
        "spans": [
            {
                "retraction_id": "aa",
                "span": {"message": 3, "part": "content", "call": 0, "start": 2, "end": 9},
                "digest": "5e",
                "tokens": 5,
                "policy": "secret",
                "reason": "a key",
                "guarantee": "exact",
                "scope": "thread",
                "status": "exact",
                "eraser_id": "mask",
                "why_exact": "guarantee",
                "verify": False,
                "derived_from": ["bb"],
            }
        ],
        "hops": [
            {
                "kind": "quote",
                "source": {"message": 1, "part": "content", "call": 0, "start": 0, "end": None},
                "target": {"message": 3, "part": "content", "call": 0, "start": 0, "end": None},
                "evidence": [
                    {
                        "kind": "value",
                        "source": {"message": 1, "part": "content", "call": 0, "start": 0, "end": None},
                        "target": {"message": 3, "part": "content", "call": 0, "start": 2, "end": 9},
                        "weight": 7.0,
                    }
                ],
            }
        ],
    }
    body = {name: value for name, value in entry.items() if name != "hash"}
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(plain.encode()).hexdigest() == entry["hash"], "anybody can check it without kv-retract"


def test_every_event_but_a_step_has_an_entry(path):
    near, far = Divergence(kl=0.25, top1=0.5, positions=4), Divergence(kl=math.inf, top1=math.nan, positions=4)
    told = {
        Decided: (decided(), {}),
        Erased: (
            Erased(thread_id="t", retraction_ids=("a", "b"), result=EraseResult(eraser_id="mask", tokens_erased=5)),
            {"event": "erased", "retraction_ids": ["a", "b"]},
        ),
        StatusChanges: (
            change(1, actor="healer", why="healed", after=Status.EXACT, divergence=near),
            {
                "event": "status_changes", "actor": "healer", "retraction_id": f"{1:016x}", "before": "steered",
                "after": "exact", "why": "healed", "divergence": {"kl": 0.25, "top1": 0.5, "positions": 4},
            },
        ),
        Healed: (
            Healed(thread_id="t", retraction_ids=("a",), tokens=40, waited_s=1.5, divergence=None),
            {"event": "healed", "retraction_ids": ["a"], "tokens": 40, "waited_s": 1.5, "divergence": None},
        ),
        Diverged: (
            Diverged(thread_id="t", retraction_ids=("a",), divergence=far, threshold=math.inf),
            {"event": "diverged", "divergence": {"kl": "inf", "top1": "nan", "positions": 4}, "threshold": "inf"},
        ),
        PoliciesFailed: (
            PoliciesFailed(thread_id="t", failures=(PolicyFailure(policy="p", kind="late", message="quoted"),)),
            {"event": "policies_failed", "failures": [{"policy": "p", "kind": "late"}]},
        ),
    }  # fmt: skip
    kinds = {v for v in vars(events_module).values() if isinstance(v, type) and issubclass(v, Event)}
    assert told.keys() == kinds - {Event, Stepped}, "a new event needs an entry, or to be left out on purpose"
    log = AuditLog(path)
    log.on_event(Stepped(thread_id="t", model="m", retract_ms=1.0, first_token_ms=None, total_ms=2.0))
    for event, _ in told.values():
        log.on_event(event)
    entries = list(read(path))
    for entry, (event, expected) in zip(entries, told.values(), strict=True):
        assert entry["at"] == event.at and entry["thread_id"] == "t"
        assert {name: entry[name] for name in expected} == expected
    assert entries[1]["cost"]["tokens_erased"] == 5 and entries[1]["cost"].keys() == {
        field.name for field in dataclasses.fields(EraseResult)
    }
    assert "quoted" not in path.read_text() and "withdrawn" not in path.read_text()


@pytest.mark.parametrize("name", ["日本\n\r\u2028", "\ud800", "\ud83d\ude00", "x" * 50_000])
def test_any_text_may_name_threads_and_actors(path, name):
    log = AuditLog(path)
    for number in range(3):
        log.on_event(change(number, thread_id=name, actor=name))
    assert verify(path).entries == 3 and len(lines_of(path)) == 4
    assert {e["actor"].encode("utf-16", "surrogatepass") for e in read(path)} == {
        name.encode("utf-16", "surrogatepass")
    }


def test_what_is_no_json_is_refused_and_not_written(filled):
    before = filled.read_bytes()
    with pytest.raises(AuditError, match="'status_changes' cannot be written as JSON.*plain text"):
        AuditLog(filled).on_event(change(9, actor=object()))
    assert filled.read_bytes() == before


# -- verification ---------------------------------------------------------------------------------------------------


def test_a_whole_log_is_verified(filled):
    entries = list(read(filled))
    found = verify(filled)
    assert [e["seq"] for e in entries] == [1, 2, 3, 4, 5]
    assert (found.entries, found.head, found.torn_bytes, found.clock_steps) == (5, entries[-1]["hash"], 0, 0)
    assert (found.first_at, found.last_at) == (entries[0]["at"], entries[-1]["at"])
    for line in lines_of(filled):
        assert verify(filled, head=json.loads(line)["hash"]) == found


def test_a_new_log_is_empty_and_for_its_owner_only(path):
    AuditLog(path)
    assert verify(path).entries == 0 and list(read(path)) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name], "drafts are cleaned up"


def test_a_clock_that_steps_is_counted_and_no_fault(path):
    log = AuditLog(path)
    for day in (3, 2, 2, 5, 4):
        log.on_event(change(day, at=f"2999-01-0{day}T00:00:00.000+00:00"))
    assert verify(path).clock_steps == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "log"
    log = AuditLog(path)
    for number in range(4):
        log.on_event(decided() if number == 2 else change(number))
    return path


def written(whole, data):
    changed = whole.with_name("changed")
    changed.write_bytes(data)
    return changed


@settings(max_examples=400)
@given(data=st.data())
def test_any_changed_byte_is_found(whole, data):
    content = bytearray(whole.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
    changed = written(whole, content)
    with pytest.raises(AuditError):
        verify(changed, head=verify(whole).head)
    if at == len(content) - 1:
        assert verify(changed).torn_bytes, "without its end the last line is an unfinished one"
    else:
        with pytest.raises(AuditError, match=r"line \d"):
            list(read(changed))


@settings(max_examples=200)
@given(data=st.data())
def test_lines_that_were_removed_repeated_or_moved_are_found(whole, data):
    lines = lines_of(whole)
    index = st.integers(0, len(lines) - 1)
    first, second = data.draw(index), data.draw(index)
    match data.draw(st.sampled_from(["remove", "repeat", "swap", "move", "cut the beginning"])):
        case "remove":
            changed = [line for i, line in enumerate(lines) if i != first]
        case "repeat":
            changed = [*lines[:second], lines[first], *lines[second:]]
        case "swap":
            changed = list(lines)
            changed[first], changed[second] = lines[second], lines[first]
        case "move":
            changed = [line for i, line in enumerate(lines) if i != first]
            changed.insert(second, lines[first])
        case _:
            changed = lines[first:]
    if changed == lines:
        return
    copy = written(whole, b"".join(changed))
    with pytest.raises(AuditError):
        verify(copy, head=verify(whole).head)
    if changed != lines[:-1]:
        with pytest.raises(AuditError):
            verify(copy)


@pytest.mark.parametrize("keep", range(1, 5))
def test_entries_cut_from_the_end_show_only_against_a_head(whole, keep):
    copy = written(whole, b"".join(lines_of(whole)[:keep]))
    assert verify(copy).entries == keep - 1
    with pytest.raises(AuditError, match="cut from its end"):
        verify(copy, head=verify(whole).head)


def test_an_entry_with_a_hash_of_its_own_breaks_the_chain(filled):
    lines = lines_of(filled)
    before, entry = json.loads(lines[2]), json.loads(lines[3])
    del entry["hash"]
    lines[3] = to_line(chained(before, {**entry, "actor": "nobody"}))
    filled.write_bytes(b"".join(lines))
    with pytest.raises(AuditError, match="line 5: entry 4 does not follow .* number 3.*lines before it are whole"):
        verify(filled)


@pytest.mark.parametrize("at", [0, 3])
def test_an_entry_that_counts_wrongly_breaks_the_chain(filled, at):
    lines = lines_of(filled)
    entry = json.loads(lines[at])
    fields = {name: value for name, value in entry.items() if name not in ("seq", "prev", "hash")}
    lines[at] = to_line(chained({"seq": 7, "hash": entry["prev"]}, fields))
    filled.write_bytes(b"".join(lines[: at + 1]))
    with pytest.raises(AuditError, match=f"line {at + 1}: entry 8 does not follow"):
        verify(filled)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"at":1e999}\n', "not JSON"),
        (b'{"at":NaN}\n', "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"\xff\n", "not JSON"),
        (b"\n", "not JSON"),
        (b"[]\n", "no entry"),
        (b'{"seq":true,"event":"","at":"","prev":"","hash":""}\n', "no entry"),
        (b'{"seq":6,"event":"","at":"","prev":""}\n', "no entry"),
        (b'{"seq":6,"event":"","at":"","prev":"","hash":""}\n', "canonical"),
        (b'{"at":"","event":"","hash":"","prev":"","seq":6}\n', "hash does not fit"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(filled, line, told):
    with pytest.raises(ValueError, match=told):
        from_line(line)
    filled.write_bytes(filled.read_bytes() + line)
    before = filled.read_bytes()
    with pytest.raises(AuditError, match=f"line 7: .*{told}"):
        verify(filled)
    with pytest.raises(AuditError, match=f"last line: .*{told}.*begin a new one"):
        AuditLog(filled)
    assert filled.read_bytes() == before


@pytest.mark.parametrize("head", ["", "abc", "A" * 64, "0" * 64])
def test_a_head_that_the_log_does_not_hold(filled, head):
    with pytest.raises(AuditError, match="none of its entries" if head == "0" * 64 else "64 hexadecimal digits"):
        verify(filled, head=head)


# -- interrupted writing --------------------------------------------------------------------------------------------


def test_an_unfinished_line_is_cut_off_and_noted(filled):
    content, last = filled.read_bytes(), lines_of(filled)[-1]
    for torn in {1, 2, len(last) - 1, len(last), *range(3, len(last), 13)}:
        filled.write_bytes(content[:-torn])
        left = len(last) - torn
        assert (verify(filled).torn_bytes, verify(filled).entries) == (left, 4)
        assert len(list(read(filled))) == 4
        log = AuditLog(filled)
        assert filled.read_bytes() == content[:-torn], "opening changes nothing"
        log.on_event(change(7))
        assert (verify(filled).torn_bytes, verify(filled).entries) == (0, 4 + bool(left) + 1)
        if left:
            recovered, entry = list(read(filled))[-2:]
            assert (recovered["event"], recovered["torn_bytes"]) == ("recovered", left)
            assert entry["retraction_id"] == f"{7:016x}"


def test_long_entries_are_found_behind_long_unfinished_lines(path):
    log = AuditLog(path)
    for size in (10, 5_000, 100_000, 10):
        log.on_event(change(1, actor="x" * size))
        with path.open("ab") as end:
            end.write(b"y" * size)
    log.on_event(change(2))
    assert [e["torn_bytes"] for e in read(path) if e["event"] == "recovered"] == [10, 5_000, 100_000, 10]
    assert verify(path).entries == 9


def appends_forever(path, acknowledged):
    log = AuditLog(path)
    number = 0
    while True:
        # Long enough for a kill to come in the middle of a write.
        log.on_event(change(number, actor="x" * 30_000))
        number += 1
        os.write(acknowledged, b".")


def test_what_was_acknowledged_survives_a_kill(path):
    total = 0
    for number in range(30):
        receive, send = os.pipe()
        process = FORK.Process(target=appends_forever, args=[path, send])
        process.start()
        os.close(send)
        seen = len(os.read(receive, 1))
        time.sleep(random.Random(number).uniform(0, 0.005))
        process.kill()
        process.join()
        while piece := os.read(receive, 4096):
            seen += len(piece)
        os.close(receive)
        entries = sum(entry["event"] == "status_changes" for entry in read(path))
        assert total + seen <= entries <= total + seen + 1
        AuditLog(path).on_event(change(number))
        assert verify(path).torn_bytes == 0
        total = entries + 1


# -- writers at once ------------------------------------------------------------------------------------------------


def append_many(log, count, barrier):
    barrier.wait()
    for number in range(count):
        log.on_event(change(number, actor=str(os.getpid())))


def test_four_processes_write_one_chain(path):
    barrier = FORK.Barrier(4)
    workers = [FORK.Process(target=lambda: append_many(AuditLog(path), 100, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0] * 4
    assert verify(path).entries == 400
    assert len({e["actor"] for e in read(path)}) == 4
    assert [p.name for p in path.parent.iterdir()] == [path.name], "all found the same new file"


def test_threads_and_forked_children_share_a_log(path):
    log, barrier = AuditLog(path), threading.Barrier(4)
    threads = [threading.Thread(target=append_many, args=[log, 50, barrier]) for _ in range(3)]
    for thread in threads:
        thread.start()
    barrier.wait()
    children = []
    for number in range(10):
        children.append(FORK.Process(target=lambda n=number: log.on_event(change(n, actor="child"))))
        children[-1].start()
    for child in children:
        child.join(60)
    for thread in threads:
        thread.join(60)
    assert [child.exitcode for child in children] == [0] * 10
    assert verify(path).entries == 160


def test_a_log_is_verified_while_it_grows(path):
    log, done = AuditLog(path), threading.Event()

    def grow():
        while not done.is_set():
            log.on_event(change(1, actor="x" * 20_000))

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        found = [verify(path)]
        while found[-1].entries < 20:
            found.append(verify(path))
    finally:
        done.set()
        writer.join()
    assert not any(f.torn_bytes for f in found), "a line that is being written is no torn one"
    assert verify(path, head=found[-1].head).entries >= found[-1].entries


def test_a_lock_that_is_not_given_back_is_told(filled, monkeypatch):
    log = AuditLog(filled)
    monkeypatch.setattr(file, "_LOCK_SECONDS", 0.05)
    with filled.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for use in (lambda: log.on_event(change(1)), lambda: verify(filled)):
            with pytest.raises(AuditError, match="locked for .* look for a process"):
                use()
    log.on_event(change(1))
    assert verify(filled).entries == 6


def test_entries_are_on_the_disk_when_the_call_returns(path, monkeypatch):
    synced, real = [], os.fsync

    def spy(descriptor):
        real(descriptor)
        at = os.fstat(descriptor)
        synced.append("folder" if stat.S_ISDIR(at.st_mode) else at.st_size)

    monkeypatch.setattr(os, "fsync", spy)
    log = AuditLog(path)
    assert synced == [path.stat().st_size, "folder"]
    log.on_event(change(1))
    assert synced[2:] == [path.stat().st_size]


# -- files that cannot be used --------------------------------------------------------------------------------------


@contextmanager
def room_for(size):
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("torn", [b"", b'{"actor":"a'])
@pytest.mark.parametrize("room", [0, 1, 100])
def test_on_a_full_disk_the_log_stays_as_it_is(filled, torn, room):
    content = filled.read_bytes() + torn
    filled.write_bytes(content)
    log = AuditLog(filled)
    with room_for(len(content) + room):
        with pytest.raises(AuditError, match="cannot be written: File too large.*disk is not full"):
            log.on_event(change(6, actor="x" * 1000))
    assert filled.read_bytes() == content
    log.on_event(change(6))
    assert verify(filled).entries == 6 + bool(torn)


def test_on_a_full_disk_no_log_is_begun(path):
    with room_for(20), pytest.raises(AuditError, match="File too large"):
        AuditLog(path)
    assert list(path.parent.iterdir()) == []


def test_what_is_no_audit_log_is_refused_and_left_as_it_is(path):
    database = path.with_name("other.sqlite")
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE t (x)")
    for content in (
        b"",
        b"hello\n",
        b"{}\n",
        b'{"format":"kv-retract audit"}\n',
        b"\0" * 10_000,
        database.read_bytes(),
    ):
        path.write_bytes(content)
        for use in (AuditLog, verify, lambda p: list(read(p))):
            with pytest.raises(AuditError, match="no audit log of kv-retract: name another file"):
                use(path)
        assert path.read_bytes() == content


def test_a_log_whose_beginning_is_gone_is_not_continued(filled):
    log = AuditLog(filled)
    filled.write_bytes(b"".join(lines_of(filled)[2:]))
    for use in (lambda: log.on_event(change(1)), lambda: verify(filled)):
        with pytest.raises(AuditError, match="begins with entry 2 .* cut off"):
            use()


def test_a_newer_version_is_refused(filled):
    lines = lines_of(filled)
    lines[0] = lines[0].replace(b'"version":1', b'"version":2')
    filled.write_bytes(b"".join(lines))
    for use in (AuditLog, verify):
        with pytest.raises(AuditError, match="has version 2, this kv-retract reads version 1: use .* newer one"):
            use(filled)


def test_places_that_hold_no_log(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, told in (
        (tmp_path, "directory|no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "link", "No such file"),
        ("/dev/full", "no regular file"),
    ):
        for use in (AuditLog, verify):
            with pytest.raises(AuditError, match=told):
                use(place)
    with pytest.raises(AuditError, match="'.*missing/log' cannot be written: .*folder that exists"):
        AuditLog(tmp_path / "missing" / "log")
    with pytest.raises(AuditError, match="cannot be read: No such file"):
        verify(path)


def test_a_log_that_is_gone_is_not_begun_anew(filled):
    log = AuditLog(filled)
    filled.unlink()
    with pytest.raises(AuditError, match="No such file"):
        log.on_event(change(1))
    assert not filled.exists()


def as_nobody(path, use, answer):
    os.setuid(65534)
    try:
        use(path)
    except AuditError as error:
        answer.send(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("use", [AuditLog, verify])
def test_a_log_without_permission(filled, use):
    for folder in list(filled.parents)[:3]:
        folder.chmod(0o755)
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=as_nobody, args=[filled, use, send])
    process.start()
    send.close()
    assert "Permission denied" in receive.recv()
    process.join()


# -- with a session -------------------------------------------------------------------------------------------------

SHORT = SamplingParams(max_tokens=2)
THREAD = [
    Message("system", "You are a helpful agent."),
    Message("user", "Please look up the code for me."),
    Message("assistant", "The code is marker-swordfish, as the list shows."),
    Message("user", "And what else is in the list? Take your time."),
    Message("assistant", "Nothing else of interest."),
    Message("user", "Fine."),
]


@pytest.fixture(scope="module")
def loaded():
    return KVRetractSession.from_pretrained("random", max_tokens=4096)


def session_on(loaded, path, name, **kw):
    return KVRetractSession(
        loaded.engine, loaded.renderer, planner=Planner(exact_suffix=0), extra_key=name,
        healing=Healing(background=False), observers=[AuditLog(path)], **kw,
    )  # fmt: skip


def take_back(index, **kw):
    return Retraction(span=SpanRef(index), policy="explicit", reason="it is stale", **kw)


def test_a_thread_is_told_in_order_and_without_its_text(loaded, path, request):
    class Quotes(RetractionPolicy):
        name = "quotes"

        def propose(self, ctx):
            raise ValueError(ctx.messages[2].content)

    session = session_on(loaded, path, request.node.name, policies=[Quotes()], on_policy_failure="skip", notify=True)
    session.step("t", THREAD, sampling=SHORT)
    plan = session.retract("t", THREAD, proposals=[take_back(2)], actor="ann")
    assert len(session.retract("t", THREAD, proposals=[take_back(2)]).spans) == 0, "which is no event"
    id = plan.spans[0].record.retraction_id
    session.undo("t", id, actor="bob")
    session.retract("t", THREAD, proposals=[take_back(2)], actor="cid")
    session.engine.purge(session.key("t", THREAD), 1)
    session.step("t", THREAD, sampling=SHORT)
    other = session.retract("t", THREAD, proposals=[take_back(4)]).spans[0].record.retraction_id
    session.step("t", THREAD, sampling=SHORT)
    session.healer.run()
    session.close()

    def told(entry):
        match entry["event"]:
            case "decided":
                return "decided", entry["actor"], *(s["retraction_id"] for s in entry["spans"])
            case "status_changes":
                return entry["why"], entry["actor"], entry["retraction_id"], entry["before"], entry["after"]
            case "policies_failed":
                return "failed", entry["failures"][0]["policy"]
            case name:
                return name, *entry["retraction_ids"]

    entries = list(read(path))
    assert [told(entry) for entry in entries if entry["event"] != "diverged"] == [
        ("failed", "quotes"),
        ("decided", "ann", id),
        ("erased", id),
        ("undone", "bob", id, "steered", "revoked"),
        ("decided", "cid", id),
        ("redone", "cid", id, "revoked", "steered"),
        ("erased", id),
        ("failed", "quotes"),
        ("cold", "session", id, "steered", "exact"),
        ("decided", "caller", other),
        ("erased", other),
        ("failed", "quotes"),
        ("healed", "healer", other, "steered", "exact"),
        ("healed", other),
    ]
    assert verify(path).entries == len(entries)
    (span,) = entries[1]["spans"]
    assert span["digest"] == hashlib.sha256(THREAD[2].content.encode()).hexdigest()
    assert (span["guarantee"], span["scope"], span["reason"]) == ("steered", "branch", "it is stale")
    assert entries[2]["cost"]["tokens_erased"] == plan.spans[0].end - plan.spans[0].start == span["tokens"]
    swap = next(e for e in entries if e.get("why") == "healed")
    assert swap["divergence"]["positions"] > 0 and swap["divergence"]["kl"] >= 0
    text = path.read_text()
    for message in THREAD:
        assert message.content not in text
    assert "swordfish" not in text


def test_a_cascade_is_told_with_its_evidence_and_without_its_text(loaded, path, request):
    messages = [
        *THREAD[:2],
        Message("tool", "The code of the box is swordfish-8841-XK.", tool_call_id="c", name="look"),
        Message("assistant", "So the code is swordfish-8841-XK."),
        THREAD[-1],
    ]
    session = session_on(loaded, path, request.node.name)
    session.retract("t", messages, proposals=[take_back(2, cascade=Cascade.QUOTED)])
    session.close()
    (first, second), hops = (next(read(path))[name] for name in ("spans", "hops"))
    assert second["derived_from"] == [first["retraction_id"]] and first["derived_from"] == []
    evidence = hops[0]["evidence"][0]
    for end in ("source", "target"):
        found = messages[evidence[end]["message"]].content[evidence[end]["start"] : evidence[end]["end"]]
        assert "swordfish-8841-XK" in found
    assert "swordfish" not in path.read_text()


def test_what_cannot_be_audited_is_not_done(loaded, path, request):
    session = session_on(loaded, path, request.node.name)
    session.step("t", THREAD, sampling=SHORT)
    ids, content = session.key("t", THREAD).ids, path.read_bytes()
    with room_for(len(content) + 10), pytest.raises(AuditError, match="File too large"):
        session.retract("t", THREAD, proposals=[take_back(2)])
    assert session.history("t") == [] and np.array_equal(session.key("t", THREAD).ids, ids)
    assert path.read_bytes() == content
    (span,) = session.retract("t", THREAD, proposals=[take_back(2)]).spans
    with room_for(path.stat().st_size), pytest.raises(AuditError):
        session.undo("t", span.record.retraction_id)
    assert session.history("t")[0].status is Status.STEERED
    assert [e["event"] for e in read(path)] == ["decided", "erased"]
    session.close()


def test_a_policy_that_raises_is_told_by_name_only(loaded, path, request):
    class Fails(RetractionPolicy):
        name = "fails"

        def propose(self, ctx):
            raise ValueError(ctx.messages[2].content)

    session = session_on(loaded, path, request.node.name, policies=[Fails()])
    with pytest.raises(PolicyError, match="swordfish"):
        session.retract("t", THREAD)
    assert "swordfish" not in path.read_text()
    session.close()
