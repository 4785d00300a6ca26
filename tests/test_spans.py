import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.errors import SpanError
from kv_retract.spans import check_span, clip, subtract, union
from kv_retract.types import Message, SpanRef, ToolCall

intervals = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: tuple(sorted(pair)))


def members(*pieces):
    return {i for start, end in pieces for i in range(start, end)}


@given(interval=intervals, covered=st.lists(intervals))
def test_subtract_is_set_difference_in_maximal_ordered_pieces(interval, covered):
    pieces = subtract(interval, covered)
    assert members(*pieces) == members(interval) - members(*covered)
    assert all(start < end for start, end in pieces)
    assert all(a[1] < b[0] for a, b in zip(pieces, pieces[1:], strict=False))


@given(pieces=st.lists(intervals))
def test_union_keeps_every_member_once(pieces):
    joined = union(pieces)
    assert members(*joined) == members(*pieces)
    assert all(start < end for start, end in joined)
    assert all(a[1] <= b[0] for a, b in zip(joined, joined[1:], strict=False))


@given(interval=intervals, pieces=st.lists(intervals))
def test_clip_is_the_first_free_piece(interval, pieces):
    taken = union(pieces)
    free = subtract(interval, taken)
    start, end = clip(interval, taken)
    assert [(start, end)] == free[:1] if free else start == end == interval[0]


def test_check_span_returns_the_length_of_the_part():
    messages = [Message(role="assistant", content="abcd", tool_calls=(ToolCall("c", "f", "{}"),))]
    assert check_span(SpanRef(0, start=1, end=4), messages) == 4
    assert check_span(SpanRef(0, "tool_call"), messages) == 2
    with pytest.raises(SpanError, match="has 1 tool calls"):
        check_span(SpanRef(0, "tool_call", 1), messages)
