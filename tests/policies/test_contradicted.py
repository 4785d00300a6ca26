import json
import time
from pathlib import Path

import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies.base import POLICIES, PolicyContext
from kv_retract.policies.contradicted import ContradictedValue
from kv_retract.testing.policies import PolicyConformance
from kv_retract.trace import Trace, read_traces
from kv_retract.types import Guarantee, Message, SpanRef, ToolCall

TAU_BENCH = Path(__file__).parents[3] / "shared" / "data" / "tau_bench" / "airline_trajectories.jsonl"
FLIGHT = {"flight_number": "HAT069", "price": 100}


class TestContradictedConformance(PolicyConformance):
    results = (
        '{"item_id": 1, "price": 5, "unit": "kg"}',
        '{"item_id": 1, "price": 6, "unit": "kg"}',
        '{"item_id": 2, "price": 5.0, "lines": [{"line_id": 1, "count": 3}, {"line_id": 1, "count": 4}]}',
        '{"item_id": 2, "price": "a price of many words", "lines": [{"line_id": 1, "count": 3}]}',
        '[{"id": 7, "state": "open"}, {"id": 7, "state": "open"}]',
        '{"id": 7, "state": null, "broken": ',
        "Error: x",
        "",
    )

    @pytest.fixture(params=[False, True], ids=["value", "whole"])
    def policy(self, request):
        return ContradictedValue(whole=request.param, same_call=request.param)

    @pytest.fixture
    def thread(self):
        parts = (("get_item", self.results[0]), ("update_item", self.results[1]))
        return [
            message
            for number, (tool, result) in enumerate(parts)
            for message in (
                Message("assistant", tool_calls=(ToolCall(f"c{number}", tool, "{}"),)),
                Message("tool", result, tool_call_id=f"c{number}"),
            )
        ]


def taken(policy, context):
    """Return the message and the text of every span that goes."""
    return [
        (r.span.message, context.messages[r.span.message].content[r.span.start : r.span.end])
        for r in policy.propose(context)
    ]


def pair(threads, older, newer, **parameters):
    """Return what goes where two tools answer like this."""
    return taken(
        ContradictedValue(**parameters), threads.ctx(threads.call("find", {}, older), threads.call("look", {}, newer))
    )


def test_the_older_value_goes_to_the_letter(threads):
    t = threads
    context = t.ctx(
        t.call("search_flights", {"to": "SEA"}, '[{"flight_number":"HAT069", "price" : 1.0e2 , "seats": 3}]'),
        t.call("get_flight", {"flight_number": "HAT069"}, FLIGHT | {"price": 90}),
    )
    [retraction] = ContradictedValue().propose(context)
    assert context.messages[1].content[retraction.span.start : retraction.span.end] == "1.0e2"
    assert retraction.reason == "get_flight in message 3 gives another value of price"
    assert retraction.guarantee is Guarantee.STEERED


def test_the_same_tool_with_other_arguments(threads):
    t = threads
    context = t.ctx(
        t.call("search_flights", {"to": "SEA"}, [FLIGHT]),
        t.call("search_flights", {"from": "JFK"}, [FLIGHT | {"price": 90}]),
    )
    assert taken(ContradictedValue(), context) == [(1, "100")]


def test_the_whole_result_goes_where_asked(threads):
    policy = ContradictedValue(whole=True, guarantee="exact")
    older, newer = FLIGHT | {"gate": "A"}, {"flight_number": "HAT069", "price": 90, "gate": "B"}
    context = threads.ctx(threads.call("find", {}, older), threads.call("look", {}, newer))
    [retraction] = policy.propose(context)
    assert retraction.span == SpanRef(1) and retraction.guarantee is Guarantee.EXACT


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (12, 12.0), ("Open", "open"), ("at  noon", "at noon"), (None, 5), (5, None), ("12", 12), (True, 1), (0, False),
        ([1], [2]), ("x" * 90, "y" * 90), (float("nan"), float("nan")),
    ],
)  # fmt: skip
def test_what_is_no_disagreement(threads, older, newer):
    assert pair(threads, {"item_id": 1, "a": older}, {"item_id": 1, "a": newer}) == []


@pytest.mark.parametrize(("older", "newer"), [(12, 13), ("open", "closed"), (True, False), (2**60, 2**60 + 1)])
def test_what_is_one(threads, older, newer):
    assert pair(threads, {"item_id": 1, "a": older}, {"item_id": 1, "a": newer}) == [(1, json.dumps(older))]


def test_a_missing_key_contradicts_nothing(threads):
    assert pair(threads, FLIGHT, {"flight_number": "HAT069"}) == []
    assert pair(threads, FLIGHT, {"flight_number": "HAT070", "price": 90}) == []
    assert pair(threads, {"price": 100}, {"price": 90}) == [], "nobody knows what has this price"


def test_the_same_call_is_left_to_superseded_unless_asked(threads):
    t = threads
    context = t.ctx(
        t.call("get_flight", {"n": 1, "m": 2}, FLIGHT), t.call("get_flight", '{"m":2,"n":1}', FLIGHT | {"price": 90})
    )
    assert taken(ContradictedValue(), context) == []
    assert taken(ContradictedValue(same_call=True), context) == [(1, "100")]


def test_a_write_in_between(threads):
    t = threads
    read = t.call("get_order", {"order_id": 1}, {"order_id": 1, "state": "open"})
    write = t.call("cancel_order", {"order_id": 1}, {"order_id": 1, "state": "cancelled"})
    again = t.call("get_order", {"order_id": 1}, {"order_id": 1, "state": "cancelled"})
    assert taken(ContradictedValue(), t.ctx(read, write)) == [(1, '"open"')]
    assert taken(ContradictedValue(), t.ctx(read, write, again)) == [(1, '"open"')]


def test_a_failed_result_says_nothing(threads):
    t = threads
    failed = t.call("look", {}, FLIGHT | {"price": 90, "error": "stale"})
    assert taken(ContradictedValue(), t.ctx(t.call("find", {}, FLIGHT), failed)) == []
    assert taken(ContradictedValue(), t.ctx(failed, t.call("find", {}, FLIGHT))) == []


def test_all_that_said_the_older_value_and_nothing_else(threads):
    t = threads
    prices = (5, 5, 6, 5)
    context = t.ctx(*(t.call(f"tool_{n}", {}, FLIGHT | {"price": price}) for n, price in enumerate(prices)))
    assert taken(ContradictedValue(), context) == [(1, "5"), (3, "5"), (5, "6")]


def test_every_place_in_the_older_result(threads):
    older = {"best": FLIGHT, "all": [FLIGHT, {"flight_number": "HAT070", "price": 80}]}
    newer = [FLIGHT | {"price": 90}]
    assert pair(threads, older, newer) == [(1, "100"), (1, "100")]


def test_what_one_result_says_in_two_ways_is_no_fact(threads):
    payments = [{"payment_id": "card", "amount": 10}, {"payment_id": "card", "amount": -4}]
    one = {"order_id": 1, "payments": payments[:1]}
    two = {"order_id": 1, "payments": payments}
    other = {"order_id": 1, "payments": [{"payment_id": "card", "amount": 7}]}
    assert pair(threads, one, two) == [] and pair(threads, two, other) == []
    assert pair(threads, one, other) == [(1, "10")]


def test_nested_objects_without_a_key_belong_to_the_object_around(threads):
    older = {"item_id": 1, "prices": {"small": 1, "large": 2}, "stock": {"large": 2}}
    newer = {"item_id": 1, "prices": {"small": 1, "large": 3}}
    assert pair(threads, older, newer) == [(1, "2")]
    assert pair(threads, older, newer, compare=("prices.large",)) == [(1, "2")]
    assert pair(threads, older, newer, compare=("prices.small",)) == []
    assert pair(threads, older, newer, ignore=("large",)) == []


def test_items_of_a_list_without_a_key_say_nothing(threads):
    older, newer = ({"item_id": 1, "owners": [{"name": name, "home": {"town": name}}]} for name in ("Ann", "Bo"))
    assert pair(threads, older, newer) == []


def test_a_line_of_an_order_is_another_in_another_order(threads):
    older, newer = ({"order_id": n, "lines": [{"product_id": 7, "count": n}]} for n in (1, 2))
    assert pair(threads, older, newer) == []
    assert pair(threads, older, newer, inherit=False) == [(1, "1")]
    same = {"order_id": 1, "lines": [{"product_id": 7, "count": 5}]}
    assert pair(threads, older, same) == [(1, "1")]


def test_the_call_says_whose_lines_these_are(threads):
    t = threads
    context = t.ctx(
        *(t.call("get_lines", {"order_id": n}, [{"product_id": 7, "count": n}]) for n in (1, 2)),
        t.call("set_line", {"order_id": 2, "note": "x"}, [{"product_id": 7, "count": 3}]),
    )
    assert taken(ContradictedValue(), context) == [(3, "2")]


def test_a_result_may_repeat_whom_it_was_asked_about(threads):
    t = threads
    order = {"order_id": 1, "user_id": "U", "state": "open"}
    context = t.ctx(
        t.call("list_orders", {"user_id": "U"}, [order]),
        t.call("pay_order", {"order_id": 1, "payment_id": "P"}, order | {"state": "paid"}),
    )
    assert taken(ContradictedValue(), context) == [(1, '"open"')]


@pytest.mark.parametrize("where", ["object", "argument", "around"])
def test_qualifiers_must_agree(threads, where):
    t = threads

    def said(day, price):
        flight = {"flight_number": "HAT069", "price": price}
        result = {
            "object": flight | {"date": day},
            "argument": flight,
            "around": {"trip_id": 1, "date": day, "f": flight},
        }
        return t.call("search", {"date": day, "n": price} if where == "argument" else {"n": price}, result[where])

    assert taken(ContradictedValue(), t.ctx(said("Mon", 1), said("Tue", 2))) == []
    assert taken(ContradictedValue(), t.ctx(said("Mon", 1), said("Mon", 2))) == [(1, "1")]


def test_the_object_knows_better_than_the_call_what_it_is_about(threads):
    t = threads
    flight = FLIGHT | {"date": "Tue"}
    context = t.ctx(
        t.call("search", {"date": "Mon", "days": 3}, [flight]),
        t.call("search", {"date": "Tue"}, [flight | {"price": 90}]),
    )
    assert taken(ContradictedValue(), context) == [(1, "100")]


def test_a_name_may_be_a_key_and_a_qualifier(threads):
    older, newer = ({"date": "Mon", "price": price} for price in (1, 2))
    assert pair(threads, older, newer) == []
    assert pair(threads, older, newer, keys=("date",)) == [(1, "1")]


def test_values_go_in_the_order_of_the_text(threads):
    t = threads
    context = t.ctx(
        t.call("find", {}, {"item_id": 1, "a": 1, "b": 2}),
        t.call("look", {}, {"item_id": 1, "b": 3}),
        t.call("look", {"n": 2}, {"item_id": 1, "a": 4}),
    )
    assert taken(ContradictedValue(), context) == [(1, "1"), (1, "2")]
    [retraction] = ContradictedValue(whole=True).propose(context)
    assert "message 3" in retraction.reason


def test_json_that_is_nested_too_deeply_says_nothing(threads):
    assert pair(threads, FLIGHT, "[" * 100_000 + "]" * 100_000) == []


def test_a_small_number_as_id_counts_in_its_place_only(threads):
    t = threads
    user, item = {"id": 1, "state": "on"}, {"id": 1, "state": "off"}
    assert pair(t, user, item) == [], "two tools may count two kinds of things"
    assert pair(t, {"id": "u-1f", "state": "on"}, {"id": "u-1f", "state": "off"}) == [(1, '"on"')]
    context = t.ctx(t.call("get_user", {"a": 1}, user), t.call("get_user", {"a": 2}, item))
    assert taken(ContradictedValue(), context) == [(1, '"on"')]
    assert pair(t, {"users": [user], "items": [item]}, {"users": [user]}) == []


def test_beside_an_id_other_keys_are_references(threads):
    assert pair(threads, {"id": "t1", "owner_id": 1, "state": "a"}, {"id": "t1", "owner_id": 2, "state": "b"}) == [
        (1, '"a"')
    ]


def test_what_is_meant_to_vary(threads):
    older, newer = ({"item_id": 1, "updated_at": f"2024-05-0{n}T00:00:00Z", "score": n, "size": n} for n in (1, 2))
    assert pair(threads, older, newer) == [(1, "1")]
    assert pair(threads, older, newer, ignore=("size", "*_at")) == [(1, "1")]
    assert pair(threads, older, newer, exclude=("loo*",)) == []
    assert pair(threads, older, newer, exclude=("fin*",)) == []


def test_a_reason_tells_no_key_that_may_be_data(threads):
    t = threads
    older, newer = ({"item_id": 1, "votes": {"ann@example.org": n}} for n in (1, 2))
    [retraction] = ContradictedValue().propose(t.ctx(t.call("find", {}, older), t.call("look", {}, newer)))
    assert "ann" not in retraction.reason


@pytest.mark.parametrize("parameters", [{"keys": ()}, {"keys": "*_id"}, {"compare": ()}, {"compare": "price"}])
def test_parameters_that_compare_nothing(parameters):
    with pytest.raises(PolicyError, match="expected a list of globs"):
        POLICIES.create("contradicted", **parameters)


def test_long_threads_of_json_take_milliseconds():
    thread = []
    for n in range(1000):
        result = {"item_id": n % 50, "name": "a name", "price": n % 7, "stock": {"here": n, "there": 0}, "open": True}
        thread.append(Message("assistant", tool_calls=(ToolCall(f"c{n}", "get_item", f'{{"n": {n}}}'),)))
        thread.append(Message("tool", json.dumps(result), tool_call_id=f"c{n}"))
    seconds = []
    for count in (1000, 2000):
        context, tries = PolicyContext(thread_id="t", messages=thread[:count]), []
        for _ in range(3):
            begin = time.process_time()  # of this process: others take turns on the same cores
            assert ContradictedValue().propose(context)
            tries.append(time.process_time() - begin)
        seconds.append(min(tries))
    assert seconds[1] < 4 * seconds[0] + 0.05, "the time grows faster than the messages"


def test_in_tau_bench_only_writes_contradict():
    """Prices of one flight differ between days, cabins and bookings; only an update changes them for a booking."""
    if not TAU_BENCH.exists():
        pytest.skip("the public data set tau_bench/airline_trajectories.jsonl is not beside this checkout")
    found = []
    for trace in read_traces(TAU_BENCH):
        assert isinstance(trace, Trace)
        context = PolicyContext(thread_id=trace.trace_id, messages=trace.messages)
        for retraction in ContradictedValue().propose(context):
            content = trace.messages[retraction.span.message].content
            assert content[retraction.span.start : retraction.span.end].isdigit()
            assert retraction.reason.startswith("update_reservation_")
            found.append(retraction)
    assert len(found) == 76
