"""A soak of healing: 50 threads, 500 retractions, every healed thread compared with a fresh prefill (DESIGN D5)."""

import random
import time

from kv_retract import KVRetractSession, Message, Planner, Retraction, SamplingParams, SpanRef, Status
from kv_retract.events import Healed
from kv_retract.healing import Healing
from kv_retract.testing.plain import plain_logits
from kv_retract.testing.spy import prefilled_texts

from .watching import Notes

THREADS, RETRACTIONS = 50, 500
BUDGET = 20_000
"""Tokens per second."""
SHORT = SamplingParams(max_tokens=2)


def test_every_thread_of_a_soak_becomes_exact_within_its_budget():
    rng, heals = random.Random(7), Notes()
    session = KVRetractSession.from_pretrained(
        "random", max_tokens=60_000, planner=Planner(exact_suffix=0), observers=[heals],
        healing=Healing(background=False, chunk_tokens=64),
    )  # fmt: skip
    engine, threads, gone = session.engine, {}, {}
    for i in range(THREADS):
        threads[f"t{i}"] = [Message("system", f"You are agent {i}.")]
        gone[f"t{i}"] = set()
    checked = retracted = 0
    most_held = 0
    with prefilled_texts(session) as texts:
        while retracted < RETRACTIONS:
            name = rng.choice(sorted(threads))
            messages = threads[name]
            for _ in range(3 if len(messages) > 3 else 6):
                n = len(messages)
                messages.append(Message("user" if n % 2 else "assistant", f"item {n} costs {n * 37}. <{name}-{n}>"))
            session.step(name, messages, sampling=SHORT)
            left = [i for i in range(1, len(messages) - 2) if i not in gone[name]]
            for at in rng.sample(left, min(len(left), rng.randint(1, 3), RETRACTIONS - retracted)):
                proposal = Retraction(span=SpanRef(at), policy="explicit", reason="soak")
                plan = session.retract(name, messages, proposals=[proposal])
                retracted += len(plan.spans)
                gone[name].add(at)
            texts.clear()
            session.step(name, messages, sampling=SHORT)
            # Healing gets a share of the time: what it does not finish now, it finishes later, in turns.
            before = len(heals.of(Healed))
            session.healer.run(max_tokens=rng.choice([0, 64, 64, 256, 1024]))
            assert not any(f"<{name}-{at}>" in "".join(texts) for at in gone[name])
            for event in heals.of(Healed)[before:]:
                check(session, event.thread_id, threads[event.thread_id])
                checked += 1
            most_held = max(most_held, engine.tokens_in_use())
            if len(heals.of(Healed)) % 10 == 0:
                engine.check_integrity()
        pending = session.healer.pending()
        before, began = len(heals.of(Healed)), time.monotonic()
        session.healer.run()
        assert session.healer.pending() == 0
        for event in heals.of(Healed)[before:]:
            check(session, event.thread_id, threads[event.thread_id])
            checked += 1
    engine.check_integrity()
    records = [record for name in threads for record in session.history(name)]
    assert len(records) == RETRACTIONS
    assert all(record.status is Status.EXACT for record in records)
    assert checked == len(heals.of(Healed)) >= THREADS / 2
    assert pending > 0, "some threads had to wait for the end"
    tokens = sum(event.tokens for event in heals.of(Healed))
    spent = time.monotonic() - began
    print(f"{checked} heals of {tokens} tokens checked, {pending} pending at the end, {spent:.1f} s for those")


def check(session, name, messages):
    """The next token of a healed thread is distributed as after a fresh prefill without the spans, to 1e-4."""
    key = session.key(name, messages)
    assert (key.ids >= 0).all()
    got = session.engine.extend(key).logits[-1].log_softmax(-1)
    want = plain_logits(session.engine.model, key.ids)[-1].log_softmax(-1)
    assert float((got - want).abs().max()) < 1e-4


def test_in_the_background_no_thread_exceeds_its_budget_per_second():
    heals = Notes()
    session = KVRetractSession.from_pretrained(
        "random", max_tokens=30_000, planner=Planner(exact_suffix=0), observers=[heals],
        healing=Healing(chunk_tokens=64, tokens_per_second=2000),
    )  # fmt: skip
    with session:
        began = time.monotonic()
        for i in range(12):
            messages = [Message("system", f"You are agent {i}.")]
            messages += [Message("user" if n % 2 else "assistant", f"item {n} costs {n * 37}.") for n in range(1, 12)]
            session.engine.extend(session.key(f"t{i}", messages))
            session.retract(f"t{i}", messages, proposals=[Retraction(span=SpanRef(2), policy="explicit", reason="x")])
        assert session.healer.wait(60)
        tokens, seconds = sum(event.tokens for event in heals.of(Healed)), time.monotonic() - began
        assert len(heals.of(Healed)) == 12
        assert tokens / seconds <= 2000 * 1.1 + 64 / seconds
        assert max(event.waited_s for event in heals.of(Healed)) <= tokens / 2000 * 3 + 10
