"""Conformance suite of policies: what holds for every one of them, on threads as models write them.

Needs `hypothesis`, which draws the threads and shrinks one that breaks the contract: `pip install hypothesis`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as given_values
from hypothesis import strategies as st

from ..policies.base import PolicyContext, RetractionPolicy
from ..spans import check_span
from ..types import Guarantee, Message, Retraction, RetractionRecord, Scope, Status, ToolCall


def given(test: Callable[..., None]) -> Callable[..., None]:
    """Draw values for a test of a suite: `data` is drawn from, fixtures come from pytest."""
    # A policy keeps no state, so examples may share it; and every subclass runs the same test.
    shared = [HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
    return settings(deadline=None, suppress_health_check=shared)(given_values(data=st.data())(test))


class PolicyConformance:
    """Subclass it and provide the fixtures `policy` and `thread`: messages in which the policy proposes something.

    Threads are drawn from `tools`, `arguments`, `results` and `texts`; add what your policy looks for.
    """

    tools: ClassVar[Sequence[str]] = ("get_item", "update_item", "open", "edit", "run")
    """Names of the tools that are called."""
    arguments: ClassVar[Sequence[str]] = ('{"item_id": 1}', '{"item_id": 2}', '{"path": "a"}', "{broken", "[]", "")
    """Arguments as models write them."""
    results: ClassVar[Sequence[str]] = ("a", "b", "a long result of 7 words", "Error: x", '{"error": "x"}', "")
    """Contents of tool messages."""
    texts: ClassVar[Sequence[str]] = ("hello", "")
    """Contents of other messages."""
    may_raise: ClassVar[tuple[type[Exception], ...]] = ()
    """What `propose` may raise for messages that lack what the policy was told to find."""
    keeps_proposing: ClassVar[bool] = True
    """Whether a longer thread never takes a proposal away. False for a policy that may change its mind."""
    time_limit: ClassVar[float | None] = 0.05
    """Seconds for 2000 messages, since `propose` is called before every step. None: do not measure."""

    @pytest.fixture
    def policy(self) -> RetractionPolicy:
        """Return the policy under test."""
        raise NotImplementedError("give the suite a fixture `policy`")

    @pytest.fixture
    def thread(self) -> Sequence[Message]:
        """Return messages in which the policy proposes something."""
        raise NotImplementedError("give the suite a fixture `thread`: messages in which the policy finds something")

    @cached_property
    def threads(self) -> st.SearchStrategy[list[Message]]:
        """Threads as models write them: ids used twice, orphaned results, dangling calls, empty messages."""
        ids = st.sampled_from(["c1", "c2", "c3"])
        calls = st.builds(ToolCall, ids, st.sampled_from(self.tools), st.sampled_from(self.arguments))
        texts = st.sampled_from(self.texts)
        results = st.builds(
            lambda text, id: Message("tool", text, tool_call_id=id), st.sampled_from(self.results), st.none() | ids
        )
        turns = st.builds(
            lambda text, calls: Message("assistant", text, tuple(calls)), texts, st.lists(calls, min_size=1, max_size=2)
        )
        pairs = st.tuples(calls, st.sampled_from(self.results)).map(
            lambda pair: [Message("assistant", "", (pair[0],)), Message("tool", pair[1], tool_call_id=pair[0].id)]
        )
        one = st.one_of(st.builds(Message, st.just("user"), texts), turns, results).map(lambda message: [message])
        return st.lists(one | pairs, max_size=20).map(lambda parts: [message for part in parts for message in part])

    def propose(
        self, policy: RetractionPolicy, messages: Sequence[Message], records: Sequence[RetractionRecord] = ()
    ) -> list[Retraction]:
        """Return the proposals; none where the policy raises what it may."""
        try:
            return policy.propose(PolicyContext(thread_id="t", messages=messages, records=records))
        except self.may_raise:
            return []

    def check(self, policy: RetractionPolicy, messages: Sequence[Message], proposals: Sequence[Retraction]) -> None:
        """Check that every proposal is well formed and lies in the messages."""
        spans = [r.span for r in proposals]
        assert len(set(spans)) == len(spans), "proposed a span twice"
        for retraction in proposals:
            check_span(retraction.span, messages)
            assert retraction.policy == policy.name
            assert retraction.reason and len(retraction.reason.splitlines()) == 1, "the reason is one line for people"
            text = retracted_text(retraction, messages)
            assert len(text) < 8 or text not in retraction.reason, "the reason repeats the retracted text"
            assert isinstance(retraction.guarantee, Guarantee)
            assert retraction.scope is None or isinstance(retraction.scope, Scope)
            assert 0 <= retraction.confidence <= 1
            json.dumps(dataclasses.asdict(retraction))

    def test_it_is_a_dataclass_with_a_name(self, policy: RetractionPolicy) -> None:
        """The name is the class's; the fields are all there is, so that a copy of them is the same policy."""
        assert isinstance(type(policy).name, str) and policy.name
        assert dataclasses.is_dataclass(policy)
        assert dataclasses.replace(policy) == policy
        assert all(f.kw_only for f in dataclasses.fields(policy)), "parameters are given by keyword"

    def test_it_proposes_something_in_the_example(self, policy: RetractionPolicy, thread: Sequence[Message]) -> None:
        """Without this, a policy that never proposes would pass."""
        proposals = policy.propose(PolicyContext(thread_id="t", messages=thread))
        assert proposals
        self.check(policy, thread, proposals)

    def test_nothing_is_proposed_where_nothing_was_said(self, policy: RetractionPolicy) -> None:
        """An empty thread is a thread."""
        assert self.propose(policy, []) == []

    @given
    def test_proposals_are_well_formed(self, policy: RetractionPolicy, data: st.DataObject) -> None:
        """Each once, inside of the messages, with a name and a reason that does not repeat the text."""
        thread = data.draw(self.threads)
        self.check(policy, thread, self.propose(policy, thread))

    @given
    def test_proposals_depend_on_the_messages_only(
        self, policy: RetractionPolicy, thread: Sequence[Message], data: st.DataObject
    ) -> None:
        """The same again for a retry, after another thread, from a copy of the policy; the messages stay."""
        drawn = data.draw(self.threads)
        before = list(drawn)
        first = self.propose(policy, drawn)
        assert self.propose(policy, tuple(drawn)) == first, "a retry proposes something else"
        self.propose(policy, thread)
        assert self.propose(policy, drawn) == first, "another thread was remembered"
        assert self.propose(copy.deepcopy(policy), drawn) == first
        assert drawn == before, "the messages were changed"

    @given
    def test_what_is_retracted_already_may_be_proposed_again(
        self, policy: RetractionPolicy, data: st.DataObject
    ) -> None:
        """Records do no harm: what is proposed beside them is well formed and among what was proposed before."""
        thread = data.draw(self.threads)
        first = self.propose(policy, thread)
        again = self.propose(policy, thread, [recorded(r, n) for n, r in enumerate(first)])
        self.check(policy, thread, again)
        assert {r.span for r in again} <= {r.span for r in first}

    @given
    def test_what_was_proposed_stays_proposed(self, policy: RetractionPolicy, data: st.DataObject) -> None:
        """A policy that only looks back takes nothing back when the thread grows."""
        if not self.keeps_proposing:
            pytest.skip("the policy says that it may change its mind")
        thread, more = data.draw(self.threads), data.draw(self.threads)
        short = self.propose(policy, thread)
        long = self.propose(policy, [*thread, Message("user", "."), *more])
        assert {r.span for r in short} <= {r.span for r in long}

    @pytest.mark.parametrize("kind", ["one entity", "many entities", "nothing written", "one big message"])
    def test_two_thousand_messages_take_milliseconds(self, policy: RetractionPolicy, kind: str) -> None:
        """Also where everything is about one thing, or in one message: no time that grows with the square."""
        if self.time_limit is None:
            pytest.skip("the policy has no time limit")
        thread = []
        for i in range(1000):
            entity = 1 if kind == "one entity" else i
            tool = "update_item" if i % 3 == 0 and kind != "nothing written" else "get_item"
            call = ToolCall(f"c{i}", tool, f'{{"item_id": {entity}, "user_id": "U"}}')
            thread.append(Message("assistant", tool_calls=(call,)))
            thread.append(Message("tool", f"a value {i}", tool_call_id=f"c{i}", name=tool))
        if kind == "one big message":
            calls = tuple(call for message in thread[::2] for call in message.tool_calls)
            thread = [Message("assistant", tool_calls=calls), *thread[1::2]]
        limit = self.time_limit * (1 if sys.gettrace() is None else 10)  # debuggers and coverage slow every line down
        seconds: list[float] = []
        while len(seconds) < 5 and min(seconds, default=limit) >= limit:
            begin = time.perf_counter()
            self.propose(policy, thread)
            seconds.append(time.perf_counter() - begin)
        assert min(seconds) < limit, "too slow for something that is called before every step"


def retracted_text(retraction: Retraction, messages: Sequence[Message]) -> str:
    """Return the characters that a proposal takes back."""
    span = retraction.span
    message = messages[span.message]
    text = message.content if span.part == "content" else message.tool_calls[span.call].arguments
    return text[span.start : span.end]


def recorded(retraction: Retraction, number: int) -> RetractionRecord:
    """Return the record that a ledger would keep of a proposal."""
    return RetractionRecord(
        retraction_id=f"{number:016x}",
        span=retraction.span,
        window_size=1,
        window_digest="d" * 64,
        policy=retraction.policy,
        reason=retraction.reason,
        guarantee=retraction.guarantee,
        scope=retraction.scope or Scope.BRANCH,
        status=Status.STEERED,
        eraser_id="mask",
    )
