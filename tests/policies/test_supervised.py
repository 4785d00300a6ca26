"""Dry runs and approvals."""

import json
import logging
from dataclasses import replace

import pytest

from kv_retract.errors import PolicyError, SpanError
from kv_retract.policies import POLICIES, Explicit, PolicyContext, ToolErrorRecovered
from kv_retract.policies.overlaps import proposal_id
from kv_retract.policies.supervised import DryRun, RequireApproval
from kv_retract.testing.policies import PolicyConformance
from kv_retract.types import Message, Retraction, SpanRef, ToolCall

SECRET = "the value is 4711"
THREAD = (Message("user", "hello"), Message("assistant", SECRET), Message("user", "go on"))
INNER = Explicit(match=SECRET)


def context(messages=THREAD):
    return PolicyContext(thread_id="t", messages=messages)


def test_a_dry_run_proposes_nothing_and_reports_the_same_id_again(caplog):
    seen = []
    policy = DryRun(policy=INNER, on_proposal=lambda *call: seen.append(call))
    with caplog.at_level(logging.INFO):
        assert policy.propose(context()) == []
        assert policy.propose(context()) == []
    [retraction] = INNER.propose(context())
    assert seen == [("t", proposal_id(retraction, THREAD), retraction)] * 2
    assert len({id for _, id, _ in seen}) == 1
    assert "explicit" in caplog.text and proposal_id(retraction, THREAD) in caplog.text
    assert "4711" not in caplog.text


def test_a_dry_run_without_a_callback_only_logs(caplog):
    with caplog.at_level(logging.INFO):
        assert DryRun(policy={"name": "explicit", "match": SECRET}).propose(context()) == []
    assert "dry run" in caplog.text


def test_what_the_callback_raises_is_not_hidden():
    def broken(*_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        DryRun(policy=INNER, on_proposal=broken).propose(context())


def test_nothing_is_proposed_before_it_is_approved():
    policy = RequireApproval(policy=INNER)
    assert policy.propose(context()) == []
    [(id, retraction)] = policy.waiting(context()).items()
    approved = replace(policy, approved=[id])
    assert approved.propose(context()) == [retraction]
    assert retraction.policy == "explicit"
    assert approved.waiting(context()) == {}


def test_a_predicate_is_asked_with_thread_and_proposal():
    asked = []

    def approved(thread_id, retraction):
        asked.append((thread_id, retraction.span))
        return retraction.span.message == 1

    policy = RequireApproval(policy=Explicit(spans=[SpanRef(0), SpanRef(1)]), approved=approved)
    assert [r.span.message for r in policy.propose(context())] == [1]
    assert asked == [("t", SpanRef(0)), ("t", SpanRef(1))]
    assert [r.span.message for r in policy.waiting(context()).values()] == [0]


def test_approvals_are_plain_data():
    [id] = RequireApproval(policy=INNER).waiting(context())
    spec = {"policy": {"name": "explicit", "match": SECRET}, "approved": [id]}
    policy = POLICIES.create("require_approval", **json.loads(json.dumps(spec)))
    assert len(policy.propose(context())) == 1
    with pytest.raises(PolicyError, match="a list of ids or a predicate"):
        RequireApproval(policy=INNER, approved=id)


def of(span, policy="p", **fields):
    return Retraction(span=span, policy=policy, reason="r", **fields)


def test_an_id_survives_pruning_and_tells_spans_apart():
    first = proposal_id(of(SpanRef(1)), THREAD)
    assert len(first) == 16 and int(first, 16) >= 0
    assert proposal_id(of(SpanRef(0)), THREAD[1:]) == first, "older messages are pruned"
    assert proposal_id(of(SpanRef(1), confidence=0.3), THREAD) == first, "the confidence is no part of it"
    call = Message("assistant", SECRET, (ToolCall("a", "f", SECRET),))
    others = {
        proposal_id(of(SpanRef(1), policy="q"), THREAD),
        proposal_id(of(SpanRef(1, start=1)), THREAD),
        proposal_id(of(SpanRef(1, end=3)), THREAD),
        proposal_id(of(SpanRef(0)), THREAD),
        proposal_id(of(SpanRef(0, "tool_call")), [call]),
        proposal_id(of(SpanRef(0)), [call]),
    }
    assert len(others | {first}) == 7


def test_an_edited_message_needs_a_new_approval():
    [id] = RequireApproval(policy=INNER).waiting(context())
    edited = (THREAD[0], Message("assistant", f"{SECRET}!"), THREAD[2])
    assert RequireApproval(policy=INNER, approved=[id]).propose(context(edited)) == []


def test_a_whole_part_has_one_id_however_its_end_is_written():
    whole, spelled = SpanRef(1), SpanRef(1, end=len(SECRET))
    assert proposal_id(of(whole), THREAD) == proposal_id(of(spelled), THREAD)


def test_a_whole_call_is_not_the_range_of_its_arguments():
    messages = [Message("assistant", tool_calls=(ToolCall("a", "f", "{}"),))]
    whole, arguments = SpanRef(0, "tool_call"), SpanRef(0, "tool_call", 0, 0, 2)
    assert proposal_id(of(whole), messages) != proposal_id(of(arguments), messages)


def test_a_proposal_outside_of_the_messages_has_no_id():
    with pytest.raises(SpanError):
        proposal_id(of(SpanRef(7)), THREAD)


class TestRequireApproval(PolicyConformance):
    time_limit = 0.15  # with that of the policy that it asks

    @pytest.fixture
    def policy(self):
        return RequireApproval(policy=ToolErrorRecovered(), approved=approve_all)

    @pytest.fixture
    def thread(self):
        call = ToolCall("c", "run", "{}")
        results = (Message("tool", text, tool_call_id="c") for text in ("Error: no such file", "done"))
        return [message for result in results for message in (Message("assistant", tool_calls=(call,)), result)]

    def check(self, policy, messages, proposals):
        assert {r.policy for r in proposals} <= policy.finders()
        super().check(policy, messages, [replace(r, policy=policy.name) for r in proposals])


class TestDryRun(TestRequireApproval):
    @pytest.fixture
    def policy(self):
        return DryRun(policy=ToolErrorRecovered())

    def test_it_proposes_something_in_the_example(self, policy, thread):
        assert policy.propose(PolicyContext(thread_id="t", messages=thread)) == []


def approve_all(thread_id, retraction):
    return True
