"""Slow, asynchronous and failing policies. Slow ones wait for an event that the test sets: nothing is timed closely."""

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from kv_retract.errors import PolicyError, SpanError
from kv_retract.policies import Explicit, PolicyContext, RetractionPolicy
from kv_retract.policies.asking import Asker, AsyncRetractionPolicy, PolicyFailure, ask_all
from kv_retract.policies.composed import AnyOf
from kv_retract.testing.policies import PolicyConformance
from kv_retract.types import Message, Retraction, SpanRef

SHORT, LONG = 0.05, 30.0
"""Seconds: a deadline that a waiting policy misses, and one that nothing here misses."""


def retraction(message, policy):
    return Retraction(span=SpanRef(message), policy=policy, reason="told so")


@dataclass(kw_only=True)
class Does(RetractionPolicy):
    """Calls `work`, then proposes one message."""

    name: ClassVar[str] = "does"
    message: int = 0
    work: Callable[[], object] = lambda: None
    calls: list = field(default_factory=list, compare=False)

    def propose(self, ctx):
        self.calls.append(threading.current_thread())
        self.work()
        return [retraction(self.message, self.name)]


@dataclass(kw_only=True)
class Awaits(AsyncRetractionPolicy):
    """Sleeps, then proposes one message."""

    name: ClassVar[str] = "awaits"
    seconds: float = 0
    ended: list = field(default_factory=list, compare=False)

    async def propose_async(self, ctx):
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.ended.append(threading.current_thread().ident)
        return [retraction(0, self.name)]


@pytest.fixture
def release():
    """An event for policies to wait for, set at the end so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def ctx(thread_id="t", messages=None):
    return PolicyContext(thread_id=thread_id, messages=[Message("user", "a")] * 3 if messages is None else messages)


def messages_of(asked):
    return [r.span.message for r in asked.proposals]


def kinds(asked):
    return [(f.policy, f.kind) for f in asked.failures]


def until(condition, seconds=LONG):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def fails():
    raise KeyError("a secret text")


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_without_a_deadline_everything_runs_in_the_callers_thread():
    policies = [Does(message=1), Does(message=0)]
    asked = ask_all(policies, ctx())
    assert (messages_of(asked), asked.failures) == ([1, 0], ())
    assert policies[0].calls == policies[1].calls == [threading.current_thread()]


def test_with_a_deadline_policies_run_at_once_and_keep_their_order():
    both = threading.Barrier(2, timeout=LONG)
    asked = ask_all([Does(message=2, work=both.wait), Does(message=1, work=both.wait)], ctx(), deadline_s=LONG)
    assert (messages_of(asked), asked.failures) == ([2, 1], ())


def test_a_late_policy_is_left_out_and_the_others_are_not(release, caplog):
    slow = Does(work=release.wait)
    begin = time.monotonic()
    asked = ask_all([slow, Awaits()], ctx(), deadline_s=0.5)
    assert time.monotonic() - begin < 10
    assert [r.policy for r in asked.proposals] == ["awaits"]
    assert asked.failures == (PolicyFailure(policy="does", kind="late", message="no answer within 0.5 s"),)
    assert [r.getMessage() for r in caplog.records] == ["policy 'does' is late: no answer within 0.5 s"]


def test_all_late_policies_share_one_deadline(release):
    begin = time.monotonic()
    asked = ask_all([Does(work=release.wait) for _ in range(10)], ctx(), deadline_s=0.3)
    assert len(asked.failures) == 10
    assert time.monotonic() - begin < 2, "ten deadlines one behind the other take 3 s"


def test_a_late_policy_is_not_started_again_until_it_ends(release, caplog):
    slow, asker = Does(work=release.wait), Asker(deadline_s=SHORT)
    for _ in range(4):
        assert kinds(asker.ask([slow], ctx())) == [("does", "late")]
    assert len(slow.calls) == 1
    assert len(caplog.records) == 1, "it is logged once"
    assert "still running" in asker.ask([slow], ctx()).failures[0].message
    release.set()
    until(lambda: not slow.calls[0].is_alive())
    asker.deadline_s = LONG
    assert messages_of(asker.ask([slow], ctx())) == [0], "it is asked anew"
    assert len(slow.calls) == 2


def test_what_a_late_policy_returns_is_never_used(release):
    slow, asker = Does(message=2, work=release.wait), Asker(deadline_s=SHORT)
    asked = asker.ask([slow], ctx())
    release.set()
    until(lambda: not slow.calls[0].is_alive())
    assert asked.proposals == []
    asker.deadline_s = LONG
    assert messages_of(asker.ask([Does(message=1)], ctx())) == [1]


def test_other_threads_and_other_policies_are_not_held_up(release):
    slow, asker = Does(work=release.wait), Asker(deadline_s=SHORT)
    asker.ask([slow], ctx("a"))
    assert kinds(asker.ask([slow], ctx("b"))) == [("does", "late")]
    assert len(slow.calls) == 2
    asker.deadline_s = LONG
    assert messages_of(asker.ask([Does(message=1)], ctx("a"))) == [1]


def test_workers_are_bounded(release):
    slow, asker = Does(work=release.wait), Asker(deadline_s=SHORT, most_workers=3)
    asked = [asker.ask([slow], ctx(f"thread {number}")) for number in range(6)]
    assert len(slow.calls) == 3
    assert all(kinds(a) == [("does", "late")] for a in asked)
    assert "3 workers are running already" in asked[-1].failures[0].message


def test_workers_do_not_keep_the_process_alive():
    policy = Does()
    ask_all([policy], ctx(), deadline_s=LONG)
    assert policy.calls[0].daemon


def test_a_late_policy_reads_the_messages_as_they_were(release):
    @dataclass(kw_only=True)
    class Counts(Does):
        def propose(self, ctx):
            super().propose(ctx)
            counted.append(len(ctx.messages))
            return []

    counted: list[int] = []
    messages = [Message("user", "a")]
    ask_all([Counts(work=release.wait)], ctx(messages=messages), deadline_s=SHORT)
    messages.clear()
    release.set()
    until(lambda: counted)
    assert counted == [1]


def test_an_instance_that_is_named_twice_is_asked_once():
    policy = Does()
    for deadline in (None, LONG):
        assert messages_of(ask_all([policy, policy], ctx(), deadline_s=deadline)) == [0]


def test_context_variables_reach_the_worker():
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("of the caller")
    seen = []
    ask_all([Does(work=lambda: seen.append(variable.get()))], ctx(), deadline_s=LONG)
    assert seen == ["of the caller"]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", [None, LONG])
def test_a_failing_policy_raises_by_default(deadline):
    with pytest.raises(PolicyError, match="policy 'does' failed on thread 't'.*KeyError"):
        ask_all([Does(work=fails)], ctx(), deadline_s=deadline)
    with pytest.raises(SpanError):
        ask_all([Explicit(match="nowhere")], ctx(), deadline_s=deadline)


@pytest.mark.parametrize("deadline", [None, LONG])
def test_a_failing_policy_can_be_skipped_but_not_in_silence(deadline, caplog):
    asked = ask_all([Does(work=fails), Does(message=1)], ctx(), deadline_s=deadline, on_failure="skip")
    assert messages_of(asked) == [1]
    [failure] = asked.failures
    assert (failure.policy, failure.kind) == ("does", "failed")
    assert "KeyError" in failure.message and "\n" not in failure.message
    assert [r.getMessage() for r in caplog.records] == ["policy 'does' failed and was left out: KeyError"]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("deadline", [None, LONG])
def test_what_is_no_proposal_is_a_failure(deadline):
    @dataclass(kw_only=True)
    class Wrong(Does):
        def propose(self, ctx):
            return ["text"]

    with pytest.raises(PolicyError, match="expected a list of Retraction"):
        ask_all([Wrong()], ctx(), deadline_s=deadline)


@pytest.mark.parametrize("deadline", [None, LONG])
def test_an_interrupt_is_never_skipped(deadline):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_all([Does(work=interrupted)], ctx(), deadline_s=deadline, on_failure="skip")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"deadline_s": 0}, "deadline_s above 0"),
        ({"deadline_s": float("nan")}, "deadline_s above 0"),
        ({"on_failure": "ignore"}, "'raise' or 'skip', got 'ignore'"),
        ({"most_workers": 0}, "most_workers of at least 1"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PolicyError, match=message):
        Asker(**parameters)


# -- asynchronous policies --------------------------------------------------------------------------------------------


def test_an_asynchronous_policy_is_a_policy():
    assert [r.policy for r in Awaits().propose(ctx())] == ["awaits"]
    assert len(AnyOf(policies=[Awaits(), Does(message=1)]).propose(ctx())) == 2


@pytest.mark.parametrize("deadline", [None, LONG])
async def test_it_also_runs_where_an_event_loop_runs_already(deadline):
    assert [r.policy for r in ask_all([Awaits()], ctx(), deadline_s=deadline).proposals] == ["awaits"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_is_cancelled_at_the_deadline(wrapped):
    policy, asker = Awaits(seconds=3600), Asker(deadline_s=SHORT)
    asked = asker.ask([AnyOf(policies=[policy]) if wrapped else policy], ctx())
    assert [kind for _, kind in kinds(asked)] == ["late"]
    until(lambda: policy.ended and policy.ended[0] not in {thread.ident for thread in threading.enumerate()})


def test_its_own_timeout_is_a_failure_and_not_late():
    @dataclass(kw_only=True)
    class TimesOut(Awaits):
        async def propose_async(self, ctx):
            raise TimeoutError("the service did not answer")

    asked = ask_all([TimesOut()], ctx(), deadline_s=LONG, on_failure="skip")
    assert kinds(asked) == [("awaits", "failed")]


@dataclass(kw_only=True)
class Answers(AsyncRetractionPolicy):
    """Proposes the first message of every thread."""

    name: ClassVar[str] = "answers"

    async def propose_async(self, ctx):
        await asyncio.sleep(0)
        return [retraction(0, self.name)] if ctx.messages else []


class TestAsyncPolicy(PolicyConformance):
    time_limit = None  # an event loop is set up for every call

    @pytest.fixture
    def policy(self):
        return Answers()

    @pytest.fixture
    def thread(self):
        return [Message("user", "hello")]
