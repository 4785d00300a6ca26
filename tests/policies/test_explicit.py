import pytest

from kv_retract.errors import PolicyError, SpanError
from kv_retract.policies import POLICIES, Explicit
from kv_retract.types import Guarantee, Scope, SpanRef


def test_spans_as_values_and_as_json(threads):
    context = threads.ctx(threads.user("my code is 1234"), threads.call("get_x", {"a": 1}, "abc"))
    policy = POLICIES.create("explicit", spans=[{"message": 0, "start": 11, "end": 15}, SpanRef(2)], guarantee="exact")
    retractions = policy.propose(context)
    assert [r.span for r in retractions] == [SpanRef(0, "content", 0, 11, 15), SpanRef(2)]
    assert {r.guarantee for r in retractions} == {Guarantee.EXACT}


def test_match_finds_every_occurrence_in_contents_and_arguments(threads):
    context = threads.ctx(threads.user("4321 and 4321"), threads.call("pay", {"card": "4321"}, "paid by 4321"))
    found = [r.span for r in Explicit(match="4321").propose(context)]
    assert found == [
        SpanRef(0, "content", 0, 0, 4),
        SpanRef(0, "content", 0, 9, 13),
        SpanRef(1, "tool_call", 0, 10, 14),
        SpanRef(2, "content", 0, 8, 12),
    ]
    for span in found:
        message = context.messages[span.message]
        text = message.content if span.part == "content" else message.tool_calls[span.call].arguments
        assert text[span.start : span.end] == "4321"
    assert [r.span for r in Explicit(match="4321", message=2).propose(context)] == found[3:]


def test_occurrences_do_not_overlap(threads):
    found = [r.span for r in Explicit(match="aa").propose(threads.ctx(threads.user("aaaaa")))]
    assert [(s.start, s.end) for s in found] == [(0, 2), (2, 4)]


def test_results_by_call_id(threads):
    context = threads.ctx(threads.call("get_x", {}, "a", id="c1"), threads.call("get_x", {}, "b", id="c2"))
    assert threads.proposed(Explicit(tool_call_ids=("c2",)), context) == [3]
    with pytest.raises(SpanError, match="'c3'"):
        Explicit(tool_call_ids=("c2", "c3")).propose(context)


def test_reason_scope_and_a_notice_that_is_said_once(threads):
    context = threads.ctx(threads.user("x x"))
    retractions = Explicit(match="x", notice="withdrawn", scope="thread", reason="asked to").propose(context)
    assert [r.notice for r in retractions] == ["withdrawn", None]
    assert {r.scope for r in retractions} == {Scope.THREAD}
    assert {r.reason for r in retractions} == {"asked to"}


@pytest.mark.parametrize(
    "span",
    [
        SpanRef(9),
        SpanRef(-1),
        SpanRef(0, start=2, end=1),
        SpanRef(0, end=99),
        SpanRef(0, start=-1),
        SpanRef(0, "tool_call", 0),
        SpanRef(0, "reasoning"),
        SpanRef("0"),
        SpanRef(0, start="1"),
        SpanRef(0, end=1.5),
    ],
)
def test_span_that_is_not_there(threads, span):
    with pytest.raises(SpanError, match="got"):
        Explicit(spans=(span,)).propose(threads.ctx(threads.user("hello")))


def test_text_that_is_not_there_is_not_repeated(threads):
    with pytest.raises(SpanError, match="6 characters") as error:
        Explicit(match="secret").propose(threads.ctx(threads.user("hello")))
    assert "secret" not in str(error.value)
    with pytest.raises(SpanError, match="message"):
        Explicit(match="hello", message=4).propose(threads.ctx(threads.user("hello")))


@pytest.mark.parametrize("parameters", [{}, {"match": ""}, {"spans": [SpanRef(0)], "message": 1}])
def test_parameters_that_name_nothing(parameters):
    with pytest.raises(PolicyError):
        Explicit(**parameters)


def test_malformed_mapping(threads):
    with pytest.raises(PolicyError, match="from"):
        Explicit(spans=({"message": 0, "from": 3},)).propose(threads.ctx(threads.user("hello")))
