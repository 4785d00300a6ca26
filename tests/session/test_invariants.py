"""Property test of the first invariant: whatever happens, a retracted text is never prefilled again (D1)."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kv_retract import (
    Guarantee,
    KVRetractSession,
    Message,
    Planner,
    Retraction,
    SamplingParams,
    Scope,
    SpanRef,
)
from kv_retract.testing.spy import prefilled_texts

ONE = SamplingParams(max_tokens=1)


class Threads(RuleBasedStateMachine):
    """Threads grow, fork, rewind, lose their cache and their process; texts are taken back in between.

    The model of the truth is small: per thread, the messages it holds and which of their markers were retracted in
    it (with what scope). Messages are unique, so a marker in a forward pass tells which message was prefilled.
    """

    shared: KVRetractSession
    eraser = "mask"

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.session = self.open()
        self.count = 0
        self.threads = {"t0": [Message("system", "You are an agent.")]}
        self.retracted = {"t0": {}}  # marker -> how many messages the thread must still hold for it to apply

    def open(self):
        return KVRetractSession(
            self.shared.engine, self.shared.renderer, eraser=self.eraser, ledger=self.path,
            planner=Planner(exact_suffix=0), extra_key=str(id(self)),
        )  # fmt: skip

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.threads)))

    @rule(data=st.data(), n=st.integers(1, 3))
    def grow(self, data, n):
        name = self.pick(data)
        for _ in range(n):
            self.count += 1
            role = ("user", "assistant", "tool")[self.count % 3]
            extra = {"tool_call_id": f"c{self.count}", "name": "look"} if role == "tool" else {}
            self.threads[name].append(Message(role, f"item {self.count} <m{self.count}>", **extra))

    @rule(data=st.data())
    def step(self, data):
        name = self.pick(data)
        self.check(name, self.threads[name])

    @rule(data=st.data(), exact=st.booleans(), scope=st.sampled_from([None, *Scope]))
    def retract(self, data, exact, scope):
        name = self.pick(data)
        messages = self.threads[name]
        if len(messages) < 2:
            return
        at = data.draw(st.integers(1, len(messages) - 1))
        guarantee = Guarantee.EXACT if exact else Guarantee.STEERED
        proposal = Retraction(span=SpanRef(at), policy="explicit", reason="x", guarantee=guarantee, scope=scope)
        with prefilled_texts(self.session) as texts:
            plan = self.session.retract(name, messages, proposals=[proposal])
        for span in plan.spans:
            whole = span.record.scope is Scope.THREAD
            self.retracted[name][messages[at].content] = at + 1 if whole else len(messages)
        self.assert_clean(name, messages, texts)

    @rule(data=st.data(), keep=st.integers(1, 6))
    def rewind_and_step(self, data, keep):
        name = self.pick(data)
        self.check(name, self.threads[name][:keep])

    @rule(data=st.data())
    def fork(self, data):
        name = self.pick(data)
        if len(self.threads) < 4:
            new = f"t{len(self.threads)}"
            self.session.fork(name, new)
            self.threads[new] = list(self.threads[name])
            self.retracted[new] = dict(self.retracted[name])

    @rule(data=st.data(), part=st.floats(0, 1))
    def lose_some_cache(self, data, part):
        name = self.pick(data)
        key = self.session.key(name, self.threads[name])
        self.session.engine.drop(key, int(part * (len(key) - 1)))

    @rule()
    def restart(self):
        self.session.ledger.close()
        self.session = self.open()

    def check(self, name, messages):
        with prefilled_texts(self.session) as texts:
            result = self.session.step(name, messages, sampling=ONE)
        self.assert_clean(name, messages, texts)
        applied = {m for m, need in self.retracted[name].items() if len(messages) >= need}
        assert len(result.retraction_ids) == len(applied & {m.content for m in messages})

    def assert_clean(self, name, messages, texts):
        seen = "".join(texts)
        for marker, need in self.retracted[name].items():
            if len(messages) >= need:
                assert marker.split()[-1] not in seen, f"{marker} was prefilled again in {name}"

    @invariant()
    def cache_is_whole(self):
        self.shared.engine.check_integrity()

    def teardown(self):
        if hasattr(self, "session"):
            self.session.ledger.close()
            self.folder.cleanup()


@pytest.mark.parametrize("eraser", ["mask", "shift", "repair"])
def test_retracted_text_is_never_prefilled_again(eraser):
    machine = type("Machine", (Threads,), {
        "shared": KVRetractSession.from_pretrained("random", max_tokens=700), "eraser": eraser,
    })  # fmt: skip
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
