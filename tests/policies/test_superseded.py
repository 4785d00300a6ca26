import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies import SupersededToolResult
from kv_retract.policies.writers import TAU_BENCH_AIRLINE
from kv_retract.types import SpanRef


def test_newer_result_of_the_same_call_replaces_the_older(threads):
    t = threads
    context = t.ctx(
        t.call("get_weather", {"city": "Oslo", "unit": "C"}, {"degrees": 10}),
        t.call("get_weather", '{ "unit":"C", "city" : "Oslo" }', {"degrees": 12}),
        t.call("get_weather", {"city": "Bergen", "unit": "C"}, {"degrees": 9}),
    )
    [retraction] = SupersededToolResult().propose(context)
    assert retraction.span == SpanRef(1)
    assert "10" not in retraction.reason and "message 3" in retraction.reason


def test_equal_result_stays_until_it_changes(threads):
    t = threads
    twice = t.ctx(t.call("get_price", {"sku": 1}, "5"), t.call("get_price", {"sku": 1}, "5"))
    assert t.proposed(SupersededToolResult(), twice) == []
    assert t.proposed(SupersededToolResult(only_changed=False), twice) == [1]
    changed = t.ctx(twice.messages, t.call("get_price", {"sku": 1}, "6"))
    assert t.proposed(SupersededToolResult(), changed) == [1, 3]


def test_failed_result_neither_replaces_nor_is_replaced(threads):
    t = threads
    context = t.ctx(
        t.call("get_price", {"sku": 1}, "Error: busy"),
        t.call("get_price", {"sku": 1}, "5"),
        t.call("get_price", {"sku": 1}, "Error: busy"),
    )
    assert t.proposed(SupersededToolResult(), context) == []


def test_repeating_an_action_replaces_nothing(threads):
    t = threads
    context = t.ctx(t.call("book_flight", {"to": "Oslo"}, "R1"), t.call("book_flight", {"to": "Oslo"}, "R2"))
    assert t.proposed(SupersededToolResult(), context) == []
    assert t.proposed(SupersededToolResult(readers=("book_*",)), context) == [1]


def test_chosen_key_arguments(threads):
    t = threads
    context = t.ctx(
        t.call("get_quote", {"sku": 1, "request": "a"}, "5"), t.call("get_quote", {"sku": 1, "request": "b"}, "6")
    )
    assert t.proposed(SupersededToolResult(), context) == []
    assert t.proposed(SupersededToolResult(same_arguments={"get_*": ("sku",)}), context) == [1]


def test_malformed_arguments_are_compared_as_text(threads):
    t = threads
    context = t.ctx(t.call("get_x", '{"a": 1', "5"), t.call("get_x", '{"a": 1', "6"), t.call("get_x", '{"a": 2', "7"))
    assert t.proposed(SupersededToolResult(), context) == [1]


@pytest.mark.parametrize("writer", ["cancel_reservation", "update_reservation_flights", "update_reservation_baggages"])
@pytest.mark.parametrize("policy", [SupersededToolResult(), SupersededToolResult(writers=TAU_BENCH_AIRLINE)])
def test_write_makes_earlier_reads_of_its_entity_stale(threads, writer, policy):
    t = threads
    context = t.ctx(
        t.call("get_reservation_details", {"reservation_id": "A"}, "A1"),
        t.call("get_reservation_details", {"reservation_id": "B"}, "B1"),
        t.call("get_user_details", {"user_id": "U"}, "U1"),
        t.call(writer, {"reservation_id": "A", "payment_id": "P"}, "A2"),
        t.call("get_reservation_details", {"reservation_id": "A"}, "A2"),
    )
    assert t.proposed(policy, context) == [1]


def test_failed_write_changes_nothing(threads):
    t = threads
    context = t.ctx(
        t.call("get_order_details", {"order_id": "A"}, "A1"),
        t.call("cancel_pending_order", {"order_id": "A"}, "Error: already shipped"),
    )
    assert t.proposed(SupersededToolResult(), context) == []
    done = t.ctx(context.messages, t.call("cancel_pending_order", {"order_id": "A"}, "cancelled"))
    assert t.proposed(SupersededToolResult(), done) == [1]


def test_writer_of_another_noun_is_not_a_writer(threads):
    t = threads
    context = t.ctx(
        t.call("get_user_details", {"user_id": "U"}, "U1"),
        t.call("cancel_reservation", {"user_id": "U", "reservation_id": "A"}, "done"),
    )
    assert t.proposed(SupersededToolResult(), context) == []
    assert t.proposed(SupersededToolResult(writers={"get_user*": ("cancel_*",)}), context) == [1]


def test_every_key_that_both_have_must_agree(threads):
    t = threads
    policy = SupersededToolResult(writers={"get_item": ("set_item",)})
    context = t.ctx(
        t.call("get_item", {"user_id": "U", "item_id": 1}, "a"),
        t.call("get_item", {"user_id": "U", "item_id": 2}, "b"),
        t.call("set_item", {"user_id": "U", "item_id": 2}, "done"),
    )
    assert t.proposed(policy, context) == [3]
    everything = t.ctx(context.messages, t.call("set_item", {"user_id": "U"}, "done"))
    assert t.proposed(policy, everything) == [1, 3]


def test_values_that_say_nothing_name_no_entity(threads):
    t = threads
    context = t.ctx(t.call("get_item", {"item_id": None}, "a"), t.call("update_item", {"item_id": None}, "b"))
    assert t.proposed(SupersededToolResult(), context) == []


def test_file_view_stays_until_the_file_is_read_after_the_edit(threads):
    t = threads
    before = (
        t.call("read_file", {"path": "a.py"}, "x = 1"),
        t.call("read_file", {"path": "b.py"}, "y = 1"),
        t.call("write_file", {"path": "a.py", "text": "x = 2"}, "written"),
    )
    assert t.proposed(SupersededToolResult(), t.ctx(*before)) == []
    other = t.call("read_file", {"path": "b.py"}, "y = 1")
    assert t.proposed(SupersededToolResult(), t.ctx(*before, other)) == []
    same = t.call("read_file", {"path": "a.py"}, "x = 2")
    assert t.proposed(SupersededToolResult(), t.ctx(*before, other, same)) == [1]


def test_proposals_do_not_change_as_the_thread_grows(threads):
    t = threads
    parts = [
        t.call("get_item", {"item_id": 1}, "a"),
        t.call("get_item", {"item_id": 1}, "b"),
        t.call("update_item", {"item_id": 1}, "ok"),
        t.call("get_item", {"item_id": 1}, "c"),
        t.call("update_item", {"item_id": 1}, "ok"),
    ]
    seen = []
    for length in range(len(parts) + 1):
        proposals = SupersededToolResult().propose(t.ctx(*parts[:length]))
        assert [r for r in proposals if r.span in {s.span for s in seen}] == seen
        seen = proposals
    assert [r.span.message for r in seen] == [1, 3, 7]


@pytest.mark.parametrize("writers", [{"get_*": "cancel_*"}, {"get_x": ("cancel_{entity}",)}])
def test_malformed_writers_are_named(threads, writers):
    with pytest.raises(PolicyError, match="get_"):
        SupersededToolResult(writers=writers).propose(threads.ctx(threads.user("x")))
