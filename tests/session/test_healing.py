"""Steer now, heal later: exact when whole, harmless when stopped, fair, bounded (DESIGN D5)."""

import threading
import time

import numpy as np
import pytest

from kv_retract import (
    Guarantee,
    KVRetractSession,
    Message,
    Planner,
    RetractionPolicy,
    SamplingParams,
    Status,
)
from kv_retract.errors import PoolExhaustedError
from kv_retract.events import Diverged, Healed, StatusChanges
from kv_retract.healing import Healing
from kv_retract.testing.plain import plain_logits
from kv_retract.testing.spy import prefilled_texts

from .watching import Notes, of_message

SHORT = SamplingParams(max_tokens=6)
BY_HAND = Healing(background=False, chunk_tokens=16)


def thread(n=9, name="x"):
    messages = [Message("system", "You are a helpful agent.")]
    for i in range(1, n):
        role = "user" if i % 2 else "assistant"
        messages.append(Message(role, f"{name}: item {i} costs {i * 37} and is on the list. marker-{i}-{name}"))
    return messages


@pytest.fixture(scope="module", params=[1, 16], ids=["page1", "page16"])
def loaded(request):
    return KVRetractSession.from_pretrained("random", max_tokens=8192, page_size=request.param)


@pytest.fixture
def open_session(loaded, request):
    opened = []

    def make(**kw):
        notes = Notes()
        kw = {"healing": BY_HAND, "planner": Planner(exact_suffix=0), "observers": [notes], **kw}
        session = KVRetractSession(loaded.engine, loaded.renderer, extra_key=request.node.name, **kw)
        session.notes = notes
        opened.append(session)
        return session

    yield make
    for session in opened:
        session.close()
    loaded.engine.check_integrity()


def steered(session, name="t", at=2, messages=None):
    """A thread that has answered on a steered cache; returns its messages, the answer included."""
    messages = messages or thread(name=name)
    session.engine.extend(session.key(name, messages))
    plan = session.retract(name, messages, proposals=[of_message(at)])
    assert [span.exact for span in plan.spans] == [False]
    answer = session.step(name, messages, sampling=SHORT).message
    return [*messages, answer]


def fresh_logits(session, name, messages):
    """What a prefill of the thread without its retracted spans says next, computed without a cache."""
    key = session.key(name, messages)
    assert np.all(key.ids >= 0)
    return plain_logits(session.engine.model, key.ids)[-1]


@pytest.mark.parametrize("eraser", ["mask", "none", "shift", "repair", "selective", "in_place", "erratum"])
def test_a_healed_thread_answers_as_a_fresh_prefill_without_the_span(open_session, eraser):
    session = open_session(eraser=eraser)
    messages = [*steered(session), Message("user", "and now?")]
    assert session.healer.pending() == 1
    tokens = session.healer.run()
    assert session.healer.pending() == 0
    assert [r.status for r in session.history("t")] == [Status.EXACT]
    key = session.key("t", messages)
    cached = session.engine.cached(key)
    with prefilled_texts(session) as texts:
        logits = session.engine.extend(key).logits[-1]
    assert "marker-2-t" not in "".join(texts)
    assert float((logits - fresh_logits(session, "t", messages)).abs().max()) < 1e-4
    [healed] = session.notes.of(Healed)
    assert healed.tokens == tokens > 0
    assert healed.divergence.positions > 0 and healed.divergence.kl >= 0
    # What the heal prefilled is what the step finds.
    assert cached > len(session.key("t", messages[:-1], add_generation_prompt=False)) - 16
    [change] = session.notes.of(StatusChanges)
    assert (change.actor, change.why, change.divergence) == ("healer", "healed", healed.divergence)


def test_the_measured_divergence_is_that_of_the_two_caches(open_session):
    session = open_session(eraser="mask")
    messages = steered(session)
    session.healer.run()
    [healed] = session.notes.of(Healed)
    n = healed.divergence.positions
    # The steered cache is gone, so the same edit is made once more in another namespace.
    twin = KVRetractSession(
        session.engine, session.renderer, extra_key=session.extra_key + "'", eraser="mask", planner=session.planner
    )
    steered(twin)
    rows = []
    for one in (session, twin):
        prompt = len(one.key("t", messages[:-1]))
        key = one.key("t", messages, add_generation_prompt=False).cut(prompt + n - 1)
        rows.append(one.engine.extend(key, num_last=n).logits.log_softmax(-1))
    exact, edited = rows
    kl = float((exact.exp() * (exact - edited)).sum(-1).mean())
    assert kl > 1e-6
    assert healed.divergence.kl == pytest.approx(kl, rel=1e-3)
    assert healed.divergence.top1 == pytest.approx(float((exact.argmax(-1) == edited.argmax(-1)).float().mean()))


def test_a_step_cancels_a_heal_without_harm_and_the_rest_goes_on_from_there(open_session):
    session = open_session()
    messages = steered(session)
    first = session.healer.run(max_tokens=16)
    assert first > 0 and session.healer.pending() == 1
    assert session.history("t")[0].status is Status.STEERED
    messages = [*messages, Message("user", "go on, please")]
    with prefilled_texts(session) as texts:
        step = session.step("t", messages, sampling=SHORT)
    assert "marker-2-t" not in "".join(texts)
    assert session.history("t")[0].status is Status.STEERED
    assert step.num_cached_tokens > 0.7 * step.num_prompt_tokens  # the steered path still answers
    rest = session.healer.run()
    assert session.history("t")[0].status is Status.EXACT
    # Nothing is prefilled twice, but for what a page or the last token of a chunk needs.
    key = session.key("t", [*messages, step.message], add_generation_prompt=False)
    assert first + rest <= len(key) + 32
    messages = [*messages, step.message, Message("user", "and?")]
    logits = session.engine.extend(session.key("t", messages)).logits[-1]
    assert float((logits - fresh_logits(session, "t", messages)).abs().max()) < 1e-4


def test_threads_take_turns_a_chunk_each(open_session):
    session = open_session()
    for name in "abc":
        steered(session, name)
    order = []
    prefill = session.engine.prefill

    def spy(key):
        order.append(session.renderer.decode([int(i) for i in key.ids if i >= 0]))
        return prefill(key)

    session.engine.prefill = spy
    try:
        session.healer.run()
    finally:
        del session.engine.prefill
    names = [next((n for n in "abc" if f"{n}: item" in text), "?") for text in order]
    turns = [names[i : i + 3] for i in range(0, 6, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns), names
    assert all(session.history(name)[0].status is Status.EXACT for name in "abc")


def test_unfinished_heals_hold_no_more_than_they_may(open_session):
    session = open_session(healing=Healing(background=False, chunk_tokens=16, most_tokens=200))
    for name in "abcd":
        steered(session, name)
    before, most = session.engine.tokens_in_use(), 0
    while session.healer.run(max_tokens=1):
        most = max(most, session.engine.tokens_in_use())
    suffix = len(session.key("a", thread(name="a")))
    assert all(session.history(name)[0].status is Status.EXACT for name in "abcd")
    assert most - before <= max(200, suffix) + 64


def test_the_steered_path_is_given_back_by_the_swap(open_session):
    session = open_session()
    messages = steered(session)
    session.healer.run()
    held = session.engine.tokens_in_use()
    session.engine.purge(session.key("t", messages, add_generation_prompt=False), 0)
    # Besides the exact path nothing of the thread is left but what other tests' namespaces hold.
    exact = len(session.key("t", messages, add_generation_prompt=False))
    assert held - session.engine.tokens_in_use() <= exact + 2 * 16


def test_a_thread_that_is_streaming_is_not_swapped(open_session):
    session = open_session()
    messages = [*steered(session), Message("user", "go on")]
    stream = session.stream("t", messages, sampling=SamplingParams(max_tokens=40))
    next(stream)
    session.healer.offer("t")
    session.healer.run()
    assert session.history("t")[0].status is Status.STEERED
    for _ in stream:
        pass
    assert session.healer.pending() == 1  # offered anew at the end of the step
    session.healer.run()
    assert session.history("t")[0].status is Status.EXACT


def test_in_the_background_it_heals_when_nothing_else_is_at_work(open_session):
    session = open_session(healing=Healing(chunk_tokens=32))
    messages = steered(session)
    assert session.healer.wait(20)
    assert session.history("t")[0].status is Status.EXACT
    messages = [*messages, Message("user", "and?")]
    logits = session.engine.extend(session.key("t", messages)).logits[-1]
    assert float((logits - fresh_logits(session, "t", messages)).abs().max()) < 1e-4
    worker = session.healer._worker
    session.close()
    assert not worker.is_alive()


def test_while_a_step_is_at_work_the_background_waits_for_its_patience(open_session):
    session = open_session(healing=Healing(chunk_tokens=16, patience_s=0.3))
    other = thread(name="other")
    stream = session.stream("other", other, sampling=SamplingParams(max_tokens=400))
    next(stream)
    began = time.monotonic()
    steered(session)
    while session.history("t")[0].status is Status.STEERED and time.monotonic() - began < 30:
        time.sleep(0.01)
    took = time.monotonic() - began
    stream.close()
    chunks = -(-session.notes.of(Healed)[0].tokens // 16)
    assert 0.3 * (chunks - 1) < took < 30


def test_the_budget_bounds_tokens_per_second(open_session):
    session = open_session(healing=Healing(chunk_tokens=16, tokens_per_second=400))
    began = time.monotonic()
    steered(session)
    began = time.monotonic()
    assert session.healer.wait(30)
    [healed] = session.notes.of(Healed)
    assert time.monotonic() - began >= (healed.tokens - 32) / 400 * 0.9


def test_only_drawn_edits_are_verified_and_a_divergence_is_told(open_session):
    class Half(RetractionPolicy):
        name = "half"

        def propose(self, ctx):
            return [of_message(2, policy="half")] if len(ctx.messages) > 7 else []

    session = open_session(
        policies=[Half(verify=0.5)], healing=Healing(every_thread=False, background=False, threshold=0.0), eraser="none"
    )
    names = [f"v{i}" for i in range(24)]
    for name in names:
        messages = thread(7, name)
        session.step(name, messages, sampling=SHORT)
        session.step(name, [*messages, Message("assistant", "ok"), Message("user", "so?")], sampling=SHORT)
    drawn = session.healer.pending()
    assert 4 <= drawn <= 20
    session.healer.run()
    exact = [name for name in names if session.history(name)[0].status is Status.EXACT]
    assert len(exact) == drawn == len(session.notes.of(Healed))
    told = session.notes.of(Diverged)
    assert len(told) == sum(event.divergence.kl > 0 for event in session.notes.of(Healed)) > 0
    assert all(event.threshold == 0.0 for event in told)


def test_secrets_do_not_wait(open_session):
    session = open_session()
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2, guarantee=Guarantee.EXACT)])
    assert session.history("t")[0].status is Status.EXACT
    assert session.healer.pending() == 0


def test_what_is_undone_or_taken_back_during_a_heal_holds(open_session):
    session = open_session()
    messages = steered(session)
    session.healer.run(max_tokens=16)
    [record] = session.history("t")
    session.undo("t", record.retraction_id)
    session.healer.run()
    assert session.history("t")[0].status is Status.REVOKED
    assert session.healer.pending() == 0
    session.retract("t", messages, proposals=[of_message(3)])
    session.healer.run(max_tokens=16)
    session.retract("t", messages, proposals=[of_message(5)])
    session.healer.run()
    assert {r.span.message: r.status for r in session.history("t")} == {
        2: Status.REVOKED, 3: Status.EXACT, 5: Status.EXACT,
    }  # fmt: skip
    messages = [*messages, Message("user", "and?")]
    logits = session.engine.extend(session.key("t", messages)).logits[-1]
    assert float((logits - fresh_logits(session, "t", messages)).abs().max()) < 1e-4


def test_without_room_a_thread_stays_steered_and_answers():
    session = KVRetractSession.from_pretrained(
        "random", max_tokens=420, planner=Planner(exact_suffix=0), healing=BY_HAND, observers=[notes := Notes()]
    )
    messages = steered(session, messages=thread(9))
    lease = session.engine.manager.lease(session.key("t", messages).ids)  # somebody uses the path
    try:
        room = session.engine.manager.pool.num_free
        blocked = session.engine.manager.alloc(room)
        session.healer.run()
        session.engine.manager.free(blocked)
    finally:
        session.engine.manager.release(lease)
    assert session.history("t")[0].status is Status.STEERED and not notes.of(Healed)
    session.step("t", [*messages, Message("user", "go on")], sampling=SHORT)
    session.healer.run()
    assert session.history("t")[0].status is Status.EXACT
    session.engine.check_integrity()


def test_a_failing_engine_ends_in_the_log_and_not_in_a_loop(open_session, monkeypatch, caplog):
    session = open_session(healing=Healing())
    monkeypatch.setattr(session.engine, "prefill", lambda key: (_ for _ in ()).throw(RuntimeError("marker-secret")))
    steered(session)
    assert session.healer.wait(20)
    session.healer.close()  # joins the worker, which logs after it has given the thread up
    assert "healing failed: RuntimeError" in caplog.text and "marker" not in caplog.text
    assert session.history("t")[0].status is Status.STEERED


def test_healing_and_steps_of_many_threads_at_once(loaded, open_session):
    session = open_session(healing=Healing(chunk_tokens=32, patience_s=0.05))
    errors = []

    def run(name):
        try:
            messages = thread(5, name)
            for turn in range(4):
                answer = session.step(name, messages, sampling=SHORT).message
                messages = [*messages, answer, Message("user", f"turn {turn} of {name}, go on")]
                session.retract(name, messages, proposals=[of_message(2 + turn)])
        except PoolExhaustedError:
            pass
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(f"w{i}",)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert session.healer.wait(60)
    for i in range(4):
        assert len(session.history(f"w{i}")) == 4
    loaded.engine.check_integrity()


@pytest.mark.parametrize(
    "wrong", [{"chunk_tokens": 0}, {"most_tokens": 0}, {"compare_tokens": -1}, {"tokens_per_second": 0}]
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Healing(**wrong)


def test_an_eviction_in_between_only_costs_the_prefill_again(open_session):
    session = open_session()
    messages = steered(session)
    session.healer.run(max_tokens=64)
    exact = session.healer._tasks["t"].exact
    session.engine.drop(exact, session.healer._tasks["t"].first)
    session.healer.run()
    assert session.history("t")[0].status is Status.EXACT
    messages = [*messages, Message("user", "and?")]
    logits = session.engine.extend(session.key("t", messages)).logits[-1]
    assert float((logits - fresh_logits(session, "t", messages)).abs().max()) < 1e-4


def test_many_threads_that_went_on_do_not_block_those_that_wait_for_room(open_session):
    session = open_session(healing=Healing(background=False, chunk_tokens=16, most_tokens=300))
    threads = {name: steered(session, name) for name in "abcd"}
    session.healer.run(max_tokens=40)
    for name, messages in threads.items():
        session.step(name, [*messages, Message("user", "go on")], sampling=SHORT)
    session.healer.run()
    assert all(session.history(name)[0].status is Status.EXACT for name in threads)
    assert session.healer.pending() == 0


def test_what_a_thread_read_is_let_go_of_once_nobody_heals_it(open_session):
    session = open_session()
    session.step("plain", thread(name="plain"), sampling=SHORT)
    steered(session)
    assert session._threads.latest("plain") is None and session._threads.latest("t") is not None
    session.healer.run()
    assert session._threads.latest("t") is None


def cached_secret(session, marker):
    """Whether any path of the session's namespace holds the marker's text."""
    index = session.engine.manager.index
    found, stack = [], [(node, ()) for node in [index._roots.get(session.extra_key)] if node is not None]
    while stack:
        node, before = stack.pop()
        ids = (*before, *(int(i) for i in node.ids))
        stack += [(child, ids) for child in node.children.values()]
        if not node.children:
            found.append(session.renderer.decode([i for i in ids if i >= 0]))
    return any(marker in text for text in found)


def test_an_exact_retraction_forgets_a_heal_that_is_half_done(open_session):
    session = open_session()
    messages = steered(session)
    session.healer.run(max_tokens=100)
    assert cached_secret(session, "marker-3-t")
    session.retract("t", messages, proposals=[of_message(3, guarantee=Guarantee.EXACT)])
    assert not cached_secret(session, "marker-3-t")
    session.healer.run()
    assert not cached_secret(session, "marker-3-t")


def test_an_exact_retraction_during_a_chunk_leaves_nothing_of_it(open_session):
    session = open_session()
    messages = steered(session)
    session.healer.run(max_tokens=60)
    prefill = session.engine.prefill

    def meanwhile(key):
        if session.history("t")[-1].guarantee is not Guarantee.EXACT:
            session.retract("t", messages, proposals=[of_message(3, guarantee=Guarantee.EXACT)])
        return prefill(key)

    session.engine.prefill = meanwhile
    try:
        session.healer.run()
    finally:
        del session.engine.prefill
    assert not cached_secret(session, "marker-3-t")


def test_an_exact_retraction_forgets_what_was_undone_before_it(open_session):
    session = open_session()
    messages = steered(session)
    session.undo("t", session.history("t")[0].retraction_id)
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(3, guarantee=Guarantee.EXACT)])
    assert not cached_secret(session, "marker-3-t")


def test_what_is_taken_back_again_for_a_stronger_reason_is_another_retraction(open_session):
    session = open_session()
    messages = thread()
    session.engine.extend(session.key("t", messages))
    last = len(messages) - 1
    session.planner.protect_newest_user = False
    session.retract("t", messages, proposals=[of_message(last, policy="a")])
    session.undo("t", session.history("t")[0].retraction_id)
    secret = of_message(last, policy="secret", guarantee=Guarantee.EXACT)
    session.retract("t", messages, proposals=[secret])
    assert [(r.policy, r.status) for r in session.history("t")] == [("a", Status.REVOKED), ("secret", Status.EXACT)]
    again = [*messages, Message("assistant", "ok"), messages[last]]  # an equal message comes later
    read = session.renderer.decode([i for i in session.key("t", again).ids.tolist() if i >= 0])
    assert f"marker-{last}-x" not in read


def test_threads_that_evict_each_other_are_healed_one_after_the_other():
    session = KVRetractSession.from_pretrained(
        "random", max_tokens=2600, planner=Planner(exact_suffix=0), healing=Healing(background=False, chunk_tokens=64)
    )
    for name in "abc":
        steered(session, name, messages=thread(36, name))
    tokens = session.healer.run(max_tokens=20_000)
    assert session.healer.pending() == 0 and tokens < 8000
    session.engine.check_integrity()


def test_patience_begins_with_the_work_and_not_with_the_last_chunk(open_session):
    session = open_session(healing=Healing(chunk_tokens=16, patience_s=0.2))
    steered(session, "first")
    assert session.healer.wait(30)
    time.sleep(0.5)
    before = len(session.notes.of(Healed))
    stream = session.stream("busy", thread(name="busy"), sampling=SamplingParams(max_tokens=300))
    next(stream)
    steered(session, "t")
    calls, prefill = [], session.engine.prefill
    session.engine.prefill = lambda key: (calls.append(time.monotonic()), prefill(key))[1]
    began = time.monotonic()
    try:
        time.sleep(0.1)
        assert not calls or calls[0] - began > 0.05
    finally:
        del session.engine.prefill
        stream.close()
    assert session.healer.wait(30) and len(session.notes.of(Healed)) == before + 1


def test_a_ledger_that_fails_does_not_make_the_healer_spin(open_session, monkeypatch, caplog):
    session = open_session(healing=Healing(patience_s=0.1))
    monkeypatch.setattr(session.healer, "_view", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
    began = time.monotonic()
    steered(session)
    assert session.healer.wait(10) and time.monotonic() - began < 8, "whoever waits is told"
    session.healer.close()
    assert 1 <= caplog.text.count("healing failed") <= 3


def test_an_undo_while_the_divergence_is_measured_leaves_the_rest_to_be_healed(open_session):
    session = open_session()
    messages = thread()
    session.engine.extend(session.key("t", messages))
    session.retract("t", messages, proposals=[of_message(2), of_message(5)])
    session.step("t", messages, sampling=SHORT)
    undone, divergence = session.history("t")[1].retraction_id, session.engine.divergence
    session.engine.divergence = lambda *a: (session.undo("t", undone), divergence(*a))[1]
    try:
        session.healer.run()
    finally:
        del session.engine.divergence
    assert [r.status for r in session.history("t")] == [Status.EXACT, Status.REVOKED]


def test_a_thread_that_is_offered_while_it_is_planned_is_not_lost(open_session):
    session = open_session()
    session.engine.extend(session.key("t", messages := thread()))
    begin, done = session.healer._begin, []

    def late(thread_id):
        task = begin(thread_id)
        if not done:
            done.append(True)
            session.retract("t", messages, proposals=[of_message(2)])
        return task

    session.healer._begin = late
    session.healer.offer("t")
    session.healer.run()
    assert session.history("t")[0].status is Status.EXACT


def test_a_session_may_be_closed_while_it_streams(loaded, request, tmp_path):
    notes = Notes()
    session = KVRetractSession(
        loaded.engine, loaded.renderer, extra_key=request.node.name, ledger=tmp_path / "l.sqlite",
        healing=Healing(), observers=[notes],
    )  # fmt: skip
    stream = session.stream("t", thread(), sampling=SamplingParams(max_tokens=5))
    next(stream)
    session.close()
    for _ in stream:
        pass
    assert [event.finish_reason for event in notes.events] == ["length"]
