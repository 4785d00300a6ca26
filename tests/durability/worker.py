"""Processes that use a real session until they are killed; `Nursery` in conftest.py starts this file as a program.

The program loads the model once and forks a process for every life. The lives of one folder follow each other on the
same ledger and the same audit log, as a restarted agent would. A life first compares what it finds with what lives
before it have acknowledged in a journal, then goes on with random operations.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from journal import ONE, Journal, assert_unread, check, check_records, messages_of

import kv_retract
from kv_retract import Guarantee, KVRetractSession, Planner, Retraction, SpanRef, Status
from kv_retract.audit import AuditLog, verify
from kv_retract.engine.hf import HFEngine
from kv_retract.healing import Healing
from kv_retract.testing.spy import prefilled_texts

MOST_THREADS, MOST_MESSAGES, MOST_OPERATIONS = 3, 9, 300

MOST_SECONDS = 120
"""A process that lives longer hangs, and is ended as a failure."""

_PACKAGE = os.path.dirname(kv_retract.__file__) + os.sep
WRITE_PATH = ("ledger/sqlite.py", "ledger/base.py", "audit/", "bookkeeping.py", "session.py", "healing.py")
"""Where lines are counted: what decides about retractions, and writes them down."""


def open_session(loaded, folder, **kw):
    """A session with a cold cache of its own: what a restarted process has."""
    engine = HFEngine(loaded.engine.model, max_tokens=2048, name="random")
    return KVRetractSession(
        engine, loaded.renderer, planner=Planner(exact_suffix=0), ledger=folder / "ledger.sqlite",
        healing=Healing(background=False, chunk_tokens=16), observers=[AuditLog(folder / "audit.jsonl")], **kw,
    )  # fmt: skip


# -- one life -------------------------------------------------------------------------------------------------------


class Life:
    """Random operations on a checked session, each announced to the journal and acknowledged when it has returned."""

    def __init__(self, session, journal, folder, rng, killer):
        self.session, self.journal, self.folder, self.rng, self.killer = session, journal, folder, rng, killer

    def go_on(self):
        operations = [self.grow, self.step, self.retract, self.retract, self.retract, self.undo, self.undo, self.heal,
                      self.fork]  # fmt: skip
        if not self.journal.threads:
            self.journal.write(threads={"t0": list(range(1, 7))})
        for _ in range(MOST_OPERATIONS):
            thread = self.rng.choice(sorted(self.journal.threads))
            operation = self.rng.choice(operations)
            with prefilled_texts(self.session) as texts, self.killer:
                operation(thread)
            if self.journal.flying:
                self.acknowledge()
            gone = self.gone_everywhere() if operation == self.heal else self.journal.standing(thread)
            assert_unread(gone, texts, thread)
        raise AssertionError(f"still alive after {MOST_OPERATIONS} operations")

    def gone_everywhere(self):
        """Numbers of the messages that are retracted in every thread that holds them."""
        threads = self.journal.threads
        return {n for t in threads for n in self.journal.standing(t)} - {
            n for t, numbers in threads.items() for n in numbers if n not in self.journal.standing(t)
        }

    def acknowledge(self):
        found = {t: {r.retraction_id: r.status for r in self.session.history(t)} for t in self.journal.threads}
        for thread in found:
            check_records(thread, found[thread], self.journal, returned=True)
        self.journal.acknowledge(verify(self.folder / "audit.jsonl").head, found)

    def grow(self, thread):
        numbers = self.journal.threads[thread]
        if len(numbers) < MOST_MESSAGES:
            newest = max(n for those in self.journal.threads.values() for n in those)
            self.journal.write(threads={thread: [*numbers, newest + 1]})

    def step(self, thread):
        self.journal.begin("step", thread)
        result = self.session.step(thread, messages_of(self.journal.threads[thread]), sampling=ONE)
        assert {self.journal.spans[i] for i in result.retraction_ids} == self.journal.standing(thread)

    def retract(self, thread):
        numbers = self.journal.threads[thread]
        left = [i for i, n in enumerate(numbers[:-2], start=1) if n not in self.journal.standing(thread)]
        if not left:
            return
        chosen = sorted(self.rng.sample(left, min(len(left), self.rng.randint(1, 3))))
        guarantee = self.rng.choice([Guarantee.STEERED, Guarantee.STEERED, Guarantee.EXACT])
        cascade = self.rng.random() < 0.5
        proposals = [
            Retraction(
                span=SpanRef(i), policy="explicit", reason="stale", guarantee=guarantee,
                derived_from=(SpanRef(chosen[0]),) if cascade and i != chosen[0] else (),
            )
            for i in chosen
        ]  # fmt: skip
        messages = messages_of(numbers)
        spans = self.session.plan(thread, messages, proposals=proposals).spans
        planned = {s.record.retraction_id: numbers[s.record.span.message - 1] for s in spans}
        assert len(planned) == len(chosen)
        self.journal.begin("retract", thread, planned)
        plan = self.session.retract(thread, messages, proposals=proposals)
        assert {s.record.retraction_id for s in plan.spans} == planned.keys()

    def undo(self, thread):
        records = self.session.history(thread)
        gone = {r.retraction_id for r in records if r.status is Status.REVOKED}
        if len(gone) == len(records):
            return
        root = self.rng.choice([r.retraction_id for r in records if r.retraction_id not in gone])
        mine, more = {root}, True
        while more:  # what was derived from what goes, where none of its origins is left
            more = (
                {r.retraction_id for r in records if mine & {*r.derived_from} and {*r.derived_from} <= gone | mine}
                - mine
                - gone
            )
            mine |= more
        self.journal.begin("undo", thread, {i: self.journal.spans[i] for i in mine})
        undone = self.session.undo(thread, root)
        assert {r.retraction_id for r in undone} == mine
        assert {r.status for r in undone} == {Status.REVOKED}

    def heal(self, thread):
        self.journal.begin("heal", thread)
        self.session.healer.run(self.rng.choice([16, 64, None]))

    def fork(self, thread):
        if len(self.journal.threads) < MOST_THREADS:
            new = f"t{len(self.journal.threads)}"
            spans = {i: self.journal.spans[i] for i in self.journal.statuses.get(thread, {})}
            self.journal.write(threads={new: self.journal.threads[thread]})
            self.journal.begin("fork", new, spans, source=thread)
            self.session.fork(thread, new)


class Killer:
    """Kills its own process at the `at`-th step of the write path; 0: never.

    A step is a line of Python that is about to run, or an instruction of SQLite's virtual machine, many of which make a
    line. A context manager: steps are counted within its blocks.
    """

    def __init__(self, at, journal):
        self.at, self.journal, self.counting = at, journal, False

    def __enter__(self):
        if self.at:
            self.counting = True
            sys.settrace(self._called)

    def __exit__(self, *_):
        self.counting = False
        sys.settrace(None)

    def watch(self, connection):
        """Count what a connection does."""
        if self.at:
            connection.set_progress_handler(lambda: self._count("SQLite"), 1)

    def _called(self, frame, event, arg):
        file = frame.f_code.co_filename
        return self._line if file.startswith(_PACKAGE) and file[len(_PACKAGE) :].startswith(WRITE_PATH) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self._count(f"{frame.f_code.co_filename[len(_PACKAGE) :]}:{frame.f_lineno}")
        return self._line

    def _count(self, place):
        if self.counting:
            self.at -= 1
            if not self.at:
                self.journal.write(killed=place)
                os.kill(os.getpid(), signal.SIGKILL)
        return 0  # SQLite goes on


def live(loaded, order, checked):
    """Open the files, check them, tell `checked`, and go on until killed; with `last` only check.

    Steps are counted from the first operation on, with `opening` also while the files are opened.
    """
    folder = Path(order["folder"])
    journal = Journal(folder / "journal.jsonl")
    killer = Killer(order.get("at", 0), journal)
    with killer if order.get("opening") else nullcontext():
        session = open_session(loaded, folder)
    killer.watch(session.ledger._connection)
    check(session, journal, folder)
    os.write(checked, b".")
    if order.get("last"):
        session.close()
    else:
        Life(session, journal, folder, random.Random(order["seed"]), killer).go_on()


# -- two processes at once ------------------------------------------------------------------------------------------


def live_in_pairs(loaded, folder, rounds):
    """Two processes take back other messages of one thread at once, in every round, and in the end the same one."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    partner = context.Process(target=take_back_together, args=[loaded, folder, rounds, 1, barrier])
    partner.start()
    take_back_together(loaded, folder, rounds, 0, barrier)
    partner.join(60)
    assert partner.exitcode == 0


def take_back_together(loaded, folder, rounds, side, barrier):
    numbers = list(range(1, 2 * rounds + 5))
    with open_session(loaded, folder) as session:
        session.step("t", messages_of(numbers), sampling=ONE)
        for number in [*(2 * n + 1 + side for n in range(rounds)), 2 * rounds + 1]:
            gone = set(range(1, min(2 * ((number - 1) // 2) + 2, 2 * rounds + 1) + 1))
            barrier.wait(60)
            proposal = Retraction(span=SpanRef(number), policy="explicit", reason="stale")
            session.retract("t", messages_of(numbers), proposals=[proposal])
            barrier.wait(60)
            with prefilled_texts(session) as texts:
                result = session.step("t", messages_of(numbers), sampling=ONE)
            assert_unread(gone, texts, "t")
            assert len(result.retraction_ids) == len(gone)


# -- the program ----------------------------------------------------------------------------------------------------


def main():
    """Answer orders, a line of JSON each, with how the process that carried it out came to its end."""
    torch.set_num_threads(1)
    loaded = KVRetractSession.from_pretrained("random", max_tokens=16)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(carry_out(loaded, order)), flush=True)


def carry_out(loaded, order):
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(MOST_SECONDS)
        code = 1
        try:
            if "pair" in order:
                live_in_pairs(loaded, Path(order["folder"]), order["pair"])
            else:
                live(loaded, order, send)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(send)
    checked = bool(os.read(receive, 1))  # nothing comes where the process ended before
    os.close(receive)
    if checked and order.get("delay") is not None:
        time.sleep(order["delay"])
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"checked": checked, "killed": status == -signal.SIGKILL, "status": status}


if __name__ == "__main__":
    main()
