"""Undo: a retraction is revoked, also after a restart, with what its cascade brought (DESIGN D12)."""

import pytest

from kv_retract import (
    Guarantee,
    KVRetractSession,
    Message,
    Planner,
    Retraction,
    RetractionPolicy,
    SamplingParams,
    SpanRef,
    Status,
)
from kv_retract.errors import LedgerError, PoolExhaustedError, ThreadBusyError
from kv_retract.events import Decided, Erased, StatusChanges, Stepped
from kv_retract.testing.plain import plain_logits

from .watching import Notes, of_message

SHORT = SamplingParams(max_tokens=4)


class Finds(RetractionPolicy):
    """Finds one message, always."""

    name = "finds"

    def propose(self, ctx):
        return [Retraction(span=SpanRef(2), policy="finds", reason="test")] if len(ctx.messages) > 2 else []


def thread(n=8):
    messages = [Message("system", "You are a helpful agent.")]
    for i in range(1, n):
        messages.append(Message("user" if i % 2 else "assistant", f"item {i} costs {i * 37} and is listed. marker-{i}"))
    return messages


@pytest.fixture(scope="module")
def loaded():
    return KVRetractSession.from_pretrained("random", max_tokens=4096)


def session_on(loaded, name, **kw):
    return KVRetractSession(loaded.engine, loaded.renderer, extra_key=name, planner=Planner(exact_suffix=0), **kw)


def logits(session, name, messages):
    return session.engine.extend(session.key(name, messages)).logits[-1]


@pytest.mark.parametrize("guarantee", list(Guarantee))
def test_after_undo_the_next_step_reads_the_original(loaded, guarantee, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2, guarantee=guarantee)])
    [record] = session.history("t")
    assert [r.retraction_id for r in session.undo("t", record.retraction_id)] == [record.retraction_id]
    assert session.history("t")[0].status is Status.REVOKED
    ids = session.key("t", messages).ids
    assert "marker-2" in session.renderer.decode(ids.tolist())
    assert float((logits(session, "t", messages) - plain_logits(session.engine.model, ids)[-1]).abs().max()) < 1e-4
    assert session.undo("t", record.retraction_id) == ()
    session.engine.check_integrity()


def test_undo_holds_after_a_restart_and_against_the_policy_that_found_it(loaded, request, tmp_path):
    name, file, messages = request.node.name, tmp_path / "ledger.sqlite", thread()
    with session_on(loaded, name, policies=[Finds()], ledger=file) as session:
        session.step("t", messages, sampling=SHORT)
        [record] = session.history("t")
        assert record.policy == "finds"
    with session_on(loaded, name, policies=[Finds()], ledger=file) as session:
        session.undo("t", record.retraction_id, actor="alice")
    with session_on(loaded, name, policies=[Finds()], ledger=file) as session:
        step = session.step("t", [*messages, Message("user", "and now?")], sampling=SHORT)
        assert not step.plan.spans and not step.retraction_ids
        assert [d.why for d in step.plan.dropped] == ["revoked earlier"]


def test_what_a_caller_takes_back_again_is_taken_back(loaded, request):
    session = session_on(loaded, request.node.name, observers=[notes := Notes(required=True)])
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    [record] = session.history("t")
    session.undo("t", record.retraction_id)
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)], actor="bob")
    [again] = session.history("t")
    assert again.retraction_id == record.retraction_id and again.status is Status.STEERED
    assert "marker-2" not in session.renderer.decode([i for i in session.key("t", messages).ids.tolist() if i >= 0])
    told = [(e.why, e.before, e.after, e.actor) for e in notes.events if isinstance(e, StatusChanges)]
    assert told == [
        ("undone", Status.STEERED, Status.REVOKED, "caller"), ("redone", Status.REVOKED, Status.STEERED, "bob"),
    ]  # fmt: skip


def test_undo_takes_back_the_cascade_too(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    derived = of_message(4, derived_from=(SpanRef(2),))
    session.retract("t", messages, proposals=[of_message(2), derived, of_message(6)])
    root, quote, other = session.history("t")
    assert quote.derived_from == (root.retraction_id,) and other.derived_from == ()
    undone = session.undo("t", root.retraction_id)
    assert {r.retraction_id for r in undone} == {root.retraction_id, quote.retraction_id}
    assert {r.span.message: r.status for r in session.history("t")} == {
        2: Status.REVOKED, 4: Status.REVOKED, 6: Status.STEERED,
    }  # fmt: skip


def test_undo_of_what_was_derived_leaves_the_rest(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2), of_message(4, derived_from=(SpanRef(2),))])
    root, quote = session.history("t")
    session.undo("t", quote.retraction_id)
    assert [r.status for r in session.history("t")] == [Status.STEERED, Status.REVOKED]


@pytest.mark.parametrize("undone_next", [2, 4])
def test_what_was_taken_back_again_for_itself_stays_when_its_old_origins_are_undone(loaded, request, undone_next):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2), of_message(4, derived_from=(SpanRef(2),))])
    ids = {r.span.message: r.retraction_id for r in session.history("t")}
    session.undo("t", ids[4])
    session.retract("t", messages, proposals=[of_message(4), of_message(6, derived_from=(SpanRef(4),))])
    assert {r.span.message for r in session.undo("t", ids[4])} == {4, 6}
    session.retract("t", messages, proposals=[of_message(6)])
    undone = session.undo("t", ids[undone_next])
    assert {r.span.message for r in undone} == {undone_next} - {4}
    assert {r.span.message for r in session.history("t") if r.status is not Status.REVOKED} == {2, 6} - {undone_next}


def test_an_unknown_retraction_and_a_streaming_thread_are_refused(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    with pytest.raises(LedgerError, match="'t' has no retraction 'nope' among its 0"):
        session.undo("t", "nope")
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    stream = session.stream("t", messages, sampling=SamplingParams(max_tokens=50))
    next(stream)
    with pytest.raises(ThreadBusyError, match="then undo"):
        session.undo("t", session.history("t")[0].retraction_id)
    stream.close()
    assert session.history("t")[0].status is Status.STEERED


def test_observers_are_told_in_order_and_before_the_ledger(loaded, request):
    session = session_on(loaded, request.node.name)
    notes = Notes(required=True)
    seen = []
    notes_on_event = notes.on_event
    notes.on_event = lambda event: (seen.append(len(session.history("t"))), notes_on_event(event))
    session = session_on(loaded, request.node.name, observers=[notes])
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    assert [type(e) for e in notes.events] == [Stepped, Decided, Erased]
    assert seen == [0, 0, 1]
    stepped, decided, erased = notes.events
    assert stepped.finish_reason == "length" and stepped.num_completion_tokens == 4
    assert 0 < stepped.first_token_ms <= stepped.total_ms
    assert list(decided.digests) == [session.history("t")[0].retraction_id] == list(erased.retraction_ids)
    assert erased.result == session.last_erase("t")
    assert decided.actor == "caller"
    assert "marker" not in repr(notes.events)


@pytest.mark.parametrize("kind", [Decided, StatusChanges])
def test_what_a_required_observer_refuses_does_not_happen(loaded, kind, request):
    notes = Notes(required=True)
    session = session_on(loaded, request.node.name, observers=[notes])
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    if kind is StatusChanges:
        session.retract("t", messages, proposals=[of_message(2)])
    before, key = session.history("t"), session.key("t", messages)
    notes.refuse = kind
    with pytest.raises(OSError, match="no space left"):
        if kind is Decided:
            session.retract("t", messages, proposals=[of_message(2)])
        else:
            session.undo("t", before[0].retraction_id)
    assert session.history("t") == before
    assert session.key("t", messages).ids.tolist() == key.ids.tolist()
    notes.refuse = ()
    session.step("t", messages, sampling=SHORT)


def test_an_observer_that_is_not_required_disturbs_nobody(loaded, request, caplog):
    notes = Notes(refuse=(Decided, Stepped))
    session = session_on(loaded, request.node.name, observers=[notes])
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    assert len(session.history("t")) == 1
    assert "observer Notes failed on Decided: OSError" in caplog.text


def test_a_step_that_is_closed_or_fails_says_so(loaded, request):
    session = session_on(loaded, request.node.name, observers=[notes := Notes(required=True)])
    stream = session.stream("t", thread(), sampling=SamplingParams(max_tokens=50))
    next(stream)
    stream.close()
    with pytest.raises(PoolExhaustedError):
        session.step("t", [Message("user", "word " * 9000)], sampling=SHORT)
    closed, failed = notes.events
    assert (closed.finish_reason, closed.error) == ("closed", "")
    assert (failed.finish_reason, failed.error, failed.first_token_ms) == ("error", "PoolExhaustedError", None)


def test_a_plan_shows_what_retract_would_do_and_changes_nothing(loaded, request):
    session = session_on(loaded, request.node.name, observers=[notes := Notes(required=True)])
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    notes.events.clear()
    plan = session.plan("t", messages, proposals=[of_message(2)])
    assert not session.history("t") and not notes.events
    done = session.retract("t", messages, proposals=[of_message(2)])
    assert [(s.start, s.end, s.exact) for s in plan.spans] == [(s.start, s.end, s.exact) for s in done.spans]


def test_what_waits_for_approval_is_listed_with_its_plan_until_it_is_decided(loaded, request):
    from kv_retract.policies import RequireApproval

    policy = RequireApproval(policy=Finds())
    session = session_on(loaded, request.node.name, policies=[policy])
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    assert not session.history("t")
    [waiting] = session.waiting("t", messages)
    assert waiting.proposal.policy == "finds" and len(waiting.plan.spans) == 1
    session.retract("t", messages, proposals=[waiting.proposal], actor="alice")
    assert session.waiting("t", messages) == ()
    [record] = session.history("t")
    session.undo("t", record.retraction_id)
    assert session.waiting("t", messages) == ()  # revoked: the policy may not take it back again


def test_a_cascade_of_two_roots_comes_back_with_the_last_of_them(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    quotes = [of_message(6, derived_from=(SpanRef(i),)) for i in (2, 4)]
    session.retract("t", messages, proposals=[of_message(2), of_message(4), *quotes])
    first, second, quote = session.history("t")
    assert quote.derived_from == (first.retraction_id, second.retraction_id)
    assert [r.retraction_id for r in session.undo("t", first.retraction_id)] == [first.retraction_id]
    assert {r.retraction_id for r in session.undo("t", second.retraction_id)} == {
        second.retraction_id, quote.retraction_id,
    }  # fmt: skip


def test_observers_and_ledger_are_closed_also_where_one_observer_fails(loaded, request, tmp_path):
    closed = []

    class Fails(Notes):
        def close(self):
            closed.append(self)
            raise OSError("cannot close")

    session = session_on(loaded, request.node.name, observers=[Fails(), Fails()], ledger=tmp_path / "l.sqlite")
    with pytest.raises(OSError, match="cannot close"):
        session.close()
    assert len(closed) == 2
    with pytest.raises(LedgerError, match="closed"):
        session.history("t")


def test_failures_of_policies_are_told_without_what_they_read(loaded, request):
    class Fails(RetractionPolicy):
        name = "fails"

        def propose(self, ctx):
            raise ValueError(ctx.messages[1].content)

    notes = Notes(required=True)
    session = session_on(loaded, request.node.name, policies=[Fails()], on_policy_failure="skip", observers=[notes])
    session.plan("t", thread())
    assert not notes.events and not session.policy_failures("t")
    session.step("t", thread(), sampling=SHORT)
    assert "marker-1" in session.policy_failures("t")[0].message
    assert notes.events[0].failures[0].policy == "fails" and "marker" not in repr(notes.events)
