"""What callers of a session remember of it, and what must hold of its files whenever it is started again."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing

from kv_retract import Message, SamplingParams, Status
from kv_retract.audit import read, verify
from kv_retract.testing.plain import plain_logits
from kv_retract.testing.spy import prefilled_texts

ONE = SamplingParams(max_tokens=1)
LATER = {
    Status.STEERED: {Status.STEERED, Status.EXACT},
    Status.EXACT: {Status.EXACT},
    Status.REVOKED: {Status.REVOKED},
}
"""What a status may be after a restart: a cold cache makes a steered thread exact."""


def marker(number):
    """Stands in one message of a folder, and in its copies in forks."""
    return f"<m{number}>"


def messages_of(numbers):
    """A thread whose messages hold these markers."""
    said = [Message("system", "You are an agent.")]
    for i, number in enumerate(numbers, start=1):
        said.append(Message("user" if i % 2 else "assistant", f"item {number} costs {number * 37} {marker(number)}"))
    return said


class Journal:
    """The memory of the callers of a session, folded from a file to which every life adds lines.

    Attributes:
        threads: numbers of the messages of each thread, apart from the system prompt.
        statuses: by thread and `retraction_id`: acknowledged by a call that returned, or seen after a restart.
        spans: number of the message that each retraction takes back.
        forks: source of each thread that is a fork.
        flying: the operation that began and did not return.
        head: newest known head of the audit log.
    """

    def __init__(self, path):
        # A kill loses nothing that was given to the system, so the journal needs no fsync.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.threads, self.statuses, self.spans, self.forks = {}, {}, {}, {}
        self.flying, self.head = None, None
        for line in path.read_text().splitlines():
            self._fold(json.loads(line))

    def write(self, **entry):
        os.write(self._file, json.dumps(entry).encode() + b"\n")
        self._fold(entry)

    def begin(self, what, thread, spans=(), **more):
        """An operation is about to be called, which changes the retractions `spans`, if any."""
        self.write(begin=what, thread=thread, spans=dict(spans), **more)

    def acknowledge(self, head, statuses):
        """The operation returned, and said so."""
        self.write(done={t: {i: str(s) for i, s in found.items()} for t, found in statuses.items()}, head=head)

    def standing(self, thread):
        """Numbers of the messages that are retracted."""
        return {self.spans[i] for i, s in self.statuses.get(thread, {}).items() if s is not Status.REVOKED}

    def _fold(self, entry):
        self.threads.update(entry.get("threads", {}))
        if "begin" in entry:
            self.flying = entry
            self.spans.update(entry["spans"])
            if "source" in entry:
                self.forks[entry["thread"]] = entry["source"]
        if "done" in entry:
            self.flying, self.head = None, entry["head"]
            for thread, found in entry["done"].items():
                self.statuses.setdefault(thread, {}).update({i: Status(s) for i, s in found.items()})


def check(session, journal, folder):
    """Compare everything with what was acknowledged; settles what was in flight when the life before was killed."""
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = db.execute("SELECT thread_id, retraction_id, kind, data FROM changes ORDER BY seq").fetchall()
    head = check_audit(folder, rows, journal)
    found = {t: {r.retraction_id: r.status for r in session.history(t)} for t in session.ledger.threads()}
    assert found.keys() <= journal.threads.keys()
    for thread in journal.threads:
        check_records(thread, found.get(thread, {}), journal)
        for record in session.history(thread):
            assert journal.threads[thread][record.span.message - 1] == journal.spans[record.retraction_id]
    journal.acknowledge(head, found)
    for thread in journal.threads:
        check_step(session, thread, journal)
    session.engine.check_integrity()


def check_records(thread, found, journal, *, returned=False):
    """Nothing acknowledged is lost, nothing else is there, and what was in flight took effect wholly or not at all.

    Args:
        thread: its records are compared.
        found: status by `retraction_id`.
        journal: what was acknowledged before.
        returned: whether the operation in flight has returned, and so must have taken effect.
    """
    was, flying = journal.statuses.get(thread, {}), {}
    if journal.flying and journal.flying["thread"] == thread:
        flying = journal.flying["spans"]
    for id in was.keys() - flying.keys():
        assert found.get(id) in LATER[was[id]], f"{thread}: {id} was {was[id]}, is {found.get(id)}"
    assert found.keys() <= was.keys() | flying.keys(), thread
    # Retractions that are new and those that were revoked before are two changes of the ledger.
    for group in (flying.keys() & was.keys(), flying.keys() - was.keys()):
        done = {found.get(id) in _wanted(id, journal) for id in group}
        assert len(done) <= 1, f"{thread}: {journal.flying} took effect in part: {found}"
        assert True in done or not group or not returned, f"{thread}: {journal.flying} returned, but {found}"
        if done == {False}:
            before = {id: LATER[was[id]] if id in was else {None} for id in group}
            assert all(found.get(id) in before[id] for id in group), f"{thread}: {journal.flying} left {found}"


def _wanted(id, journal):
    """What the operation in flight makes of a retraction."""
    match journal.flying["begin"]:
        case "undo":
            return {Status.REVOKED}
        case "fork":
            return LATER[journal.statuses[journal.flying["source"]][id]]
    return LATER[Status.STEERED]


def check_audit(folder, rows, journal):
    """The log is whole, holds the newest head that was seen, and tells every change of the ledger in order."""
    path = folder / "audit.jsonl"
    head = verify(path, head=journal.head).head
    told, decided_in = {}, {}
    for entry in read(path):
        for span in entry.get("spans", ()):
            told.setdefault((entry["thread_id"], span["retraction_id"]), []).append(("add", span["status"]))
            decided_in[span["retraction_id"]] = entry["thread_id"]
        if entry["event"] == "status_changes":
            told.setdefault((entry["thread_id"], entry["retraction_id"]), []).append(("status", entry["after"]))
    left = {place: iter(changes) for place, changes in told.items()}
    for thread, id, kind, data in rows:
        change = (kind, json.loads(data)["status"] if kind == "add" else data)
        if kind == "add" and thread in journal.forks and decided_in.get(id) != thread:
            assert id in decided_in, f"{id} was copied into {thread}, but was never decided"
            continue
        assert change in left.get((thread, id), ()), f"the audit log misses {change} of {id} in {thread}"
    return head


def check_step(session, thread, journal):
    """The next answer has read what stands and nothing else, and is distributed as after a plain forward pass."""
    messages, gone = messages_of(journal.threads[thread]), journal.standing(thread)
    with prefilled_texts(session) as texts:
        session.step(thread, messages, sampling=ONE)
    assert_unread(gone, texts, thread)
    key = session.key(thread, messages)
    read_again = session.renderer.decode([int(i) for i in key.ids if i >= 0])
    assert {n for n in journal.threads[thread] if marker(n) not in read_again} == gone, thread
    if (key.ids >= 0).all():
        got, want = session.engine.extend(key).logits[-1], plain_logits(session.engine.model, key.ids)[-1]
        assert float((got - want).abs().max()) < 1e-3, f"{thread} does not answer as without its spans"
    else:
        assert Status.STEERED in journal.statuses[thread].values(), f"{thread} is exact, but its key has tombstones"


def assert_unread(gone, texts, thread):
    seen = "".join(texts)
    assert not [n for n in gone if marker(n) in seen], f"{thread}: a retracted text was prefilled"
