import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies import POLICIES, ToolErrorRecovered
from kv_retract.types import Guarantee, SpanRef


def test_repaired_error_is_retracted_and_open_error_is_not(threads):
    t = threads
    context = t.ctx(
        t.user("Book it"),
        t.call("book", {"pay": "a"}, "Error: payment method not found"),
        t.call("search", {"q": "x"}, "Error: timeout"),
        t.call("book", {"pay": "b"}, {"id": "R1"}),
    )
    [retraction] = ToolErrorRecovered().propose(context)
    assert retraction.span == SpanRef(2)
    assert retraction.policy == "tool_error"
    assert "payment" not in retraction.reason


def test_success_before_the_failure_repairs_nothing(threads):
    t = threads
    context = t.ctx(t.call("book", {}, "R1"), t.call("book", {}, "Error: sold out"))
    assert t.proposed(ToolErrorRecovered(), context) == []


def test_all_failures_of_a_tool_are_repaired_by_one_success(threads):
    t = threads
    context = t.ctx(t.call("book", {}, "Error: a"), t.call("book", {}, "Error: b"), t.call("book", {}, "done"))
    assert t.proposed(ToolErrorRecovered(), context) == [1, 3]


@pytest.mark.parametrize(
    ("content", "failed"),
    [
        ("Error: no seats", True),
        ("  error: no seats", True),
        ("ERROR no seats", True),
        ("ValueError: bad id", True),
        ("Traceback (most recent call last):\n  File", True),
        ('{"error": "not found"}', True),
        ('{"status": "error", "detail": "x"}', True),
        ('{"success": false}', True),
        ('{"isError": true, "content": []}', True),
        ('{"error": null, "rows": [1]}', False),
        ('{"status": "cancelled", "errors": []}', False),
        ('{"rows": [{"error": "in a log line"}]}', False),
        ('[{"error": "a list is not a result object"}]', False),
        ('{"error": "cut off', False),
        ("No errors found", False),
        ("Errors: 0 of 12 tests", False),
        ("", False),
    ],
)
def test_what_counts_as_an_error(threads, content, failed):
    t = threads
    context = t.ctx(t.call("run", {}, content), t.call("run", {}, "fine"))
    assert t.proposed(ToolErrorRecovered(), context) == ([1] if failed else [])


def test_same_arguments_narrows_what_repairs(threads):
    t = threads
    context = t.ctx(
        t.call("update", {"id": "A", "x": 1}, "Error: bad"),
        t.call("update", {"id": "B", "x": 1}, "ok"),
    )
    assert t.proposed(ToolErrorRecovered(), context) == [1]
    assert t.proposed(ToolErrorRecovered(same_arguments=("id",)), context) == []
    repaired = t.ctx(context.messages, t.call("update", {"id": "A", "x": 2}, "ok"))
    assert t.proposed(ToolErrorRecovered(same_arguments=("id",)), repaired) == [1]


def test_failed_call_goes_too_on_request(threads):
    t = threads
    context = t.ctx(t.call("book", {}, "Error: a"), t.call("book", {}, "done"))
    spans = [r.span for r in ToolErrorRecovered(include_call=True).propose(context)]
    assert spans == [SpanRef(0, "tool_call", 0), SpanRef(1)]


def test_exclude_guarantee_and_custom_pattern(threads):
    t = threads
    context = t.ctx(t.call("pay", {}, "Declined"), t.call("pay", {}, "paid"))
    assert t.proposed(ToolErrorRecovered(), context) == []
    policy = POLICIES.create("tool_error", error_pattern="Declined", guarantee="exact")
    assert [r.guarantee for r in policy.propose(context)] == [Guarantee.EXACT]
    assert t.proposed(ToolErrorRecovered(error_pattern="Declined", exclude=("p*",)), context) == []


def test_malformed_pattern_is_named(threads):
    with pytest.raises(PolicyError, match=r"'\(unclosed'"):
        ToolErrorRecovered(error_pattern="(unclosed").propose(threads.ctx(threads.user("x")))


def test_ids_used_twice_belong_to_the_newest_call(threads):
    t = threads
    context = t.ctx(
        t.call("book", {}, "Error: a", id="same"),
        t.call("cancel", {}, "done", id="same"),
        t.call("book", {}, "done", id="same"),
    )
    assert t.proposed(ToolErrorRecovered(), context) == [1]


def test_results_without_ids_and_names_are_paired_in_order(threads):
    t = threads
    context = t.ctx(t.call("book", {}, "Error: a", with_id=False), t.call("book", {}, "done", with_id=False))
    assert t.proposed(ToolErrorRecovered(), context) == [1]


def test_orphaned_result_without_a_name_is_left_alone(threads):
    t = threads
    orphan = t.call("book", {}, "Error: a", with_id=False)[1:]
    assert t.proposed(ToolErrorRecovered(), t.ctx(orphan, t.call("book", {}, "done"))) == []
