"""Attention as evidence of lineage: which targets get a share, how it is made, and whether it finds what was used."""

import numpy as np
import pytest

from kv_retract import KVRetractSession
from kv_retract.attention import attention_of
from kv_retract.planner import Planner
from kv_retract.testing.spy import prefilled_texts
from kv_retract.thread import view_thread
from kv_retract.training.corpus import samples
from kv_retract.types import Message, Retraction, SpanRef, Status, ToolCall

CALL = ToolCall("c2", "get_owner", '{"order": "Kel-42"}')
MESSAGES = [
    Message("system", "You are an agent with tools."),
    Message("user", "Please look up the owner of order Kel-42."),
    Message("assistant", tool_calls=(ToolCall("c1", "get_owner", '{"order": "Kel-42"}'),)),
    Message("tool", '{"result": "The owner of order Kel-42 is Tar."}', tool_call_id="c1", name="get_owner"),
    Message("assistant", "I have looked that up. The owner of order Kel-42 is Tar.", tool_calls=(CALL,)),
    Message("tool", '{"result": "The owner of order Kel-42 is Tar."}', tool_call_id="c2", name="get_owner"),
    Message("user", "Who is it?"),
    Message("assistant", "The owner of order Kel-42 is Tar."),
]
RESULT = SpanRef(3)
LATER = [
    SpanRef(4, start=0, end=22),
    SpanRef(4, start=23, end=56),
    SpanRef(4, "tool_call", 0),
    SpanRef(7, start=0, end=33),
]
"""What the assistant says and calls behind `RESULT`."""


@pytest.fixture(scope="module")
def shared():
    return KVRetractSession.from_pretrained(planner=Planner(exact_suffix=0))


@pytest.fixture
def session(shared):
    yield shared
    shared.engine.check_integrity()
    shared.engine.drop(shared.key("t", MESSAGES), 0)


def view_of(session, messages=MESSAGES, thread_id="t", tools=None):
    records = session.ledger.records(thread_id)
    return view_thread(session.engine, session.renderer, records, messages, tools=tools, add_generation_prompt=False)


def cached_view(session, messages=MESSAGES, tools=None):
    session.engine.extend(view_of(session, messages, tools=tools).key)
    return view_of(session, messages, tools=tools)


def test_targets_are_the_later_sentences_and_calls(session):
    shares = attention_of(session.engine, cached_view(session))(RESULT)
    assert list(shares) == LATER
    assert all(0 <= share <= 1 for share in shares.values())


def shares_alone(session, view, ref, source=RESULT):
    """Shares of the tokens of one part of a message, asked of the engine by themselves."""
    tokens = np.arange(*view.rendering.interval(ref))
    return session.engine.attention(view.key, view.rendering.interval(source), tokens).numpy()


def test_a_share_is_the_most_attentive_token_less_the_median_one(session):
    view = cached_view(session)
    shares = attention_of(session.engine, view)(RESULT)
    for ref in (ref for ref in LATER if ref.part == "content"):
        one = shares_alone(session, view, ref)
        assert shares[ref] == pytest.approx(float(one.max() - np.median(one)), abs=1e-5)
    assert len({round(share, 4) for share in shares.values()}) == len(LATER)


def test_of_a_call_only_the_values_of_its_arguments_may_have_been_copied(session):
    arguments = '{"order": "Kel-42", "last_order": {"numbers": [1234, "say \\"a: b\\" \\\\"]}}'
    values = [ref_of(4, arguments, text) for text in ("Kel-42", "1234", 'say \\"a: b\\" \\\\')]
    messages = [*MESSAGES[:4], Message("assistant", tool_calls=(ToolCall("c2", "get_owner", arguments),))]
    view = cached_view(session, messages)
    whole = shares_alone(session, view, SpanRef(4, "tool_call", 0))
    best = max(shares_alone(session, view, ref).max() for ref in values)
    assert whole.max() > best + 0.01, "the form of the call is more attentive here"
    got = attention_of(session.engine, view)(RESULT)
    assert got == {SpanRef(4, "tool_call", 0): pytest.approx(float(best - np.median(whole)), abs=1e-5)}


def ref_of(message, arguments, text):
    start = arguments.index(text)
    return SpanRef(message, "tool_call", 0, start, start + len(text))


@pytest.mark.parametrize(
    "arguments, some",
    [("{}", False), ("", False), ('{"order": ""}', False), ('{"order": "Kel', True), ("Kel-42", True), ('"\\', True)],
)
def test_arguments_may_be_missing_or_malformed(session, arguments, some):
    messages = [*MESSAGES[:4], Message("assistant", tool_calls=(ToolCall("c2", "get_owner", arguments),))]
    shares = attention_of(session.engine, cached_view(session, messages))(RESULT)
    assert list(shares) == ([SpanRef(4, "tool_call", 0)] if some else [])


def test_only_what_stands_behind_the_message_of_the_span_is_a_target(session):
    attention = attention_of(session.engine, cached_view(session))
    assert list(attention(SpanRef(4, start=0, end=22))) == LATER[3:]
    assert attention(SpanRef(7)) == {}


@pytest.mark.parametrize("span", [SpanRef(99), SpanRef(3, start=5, end=5), SpanRef(3, "tool_call", 1)])
def test_a_span_that_is_not_there_has_no_targets(session, span):
    assert attention_of(session.engine, cached_view(session))(span) == {}


def test_what_is_not_cached_is_unknown_and_stays_so(session):
    whole = view_of(session)
    assert whole.cached < whole.rendering.interval(LATER[0])[1]
    with prefilled_texts(session) as texts:
        assert attention_of(session.engine, whole)(RESULT) == {}
        assert not texts
        session.engine.extend(whole.key.cut(whole.rendering.interval(LATER[2])[1]))
        texts.clear()
        partly = attention_of(session.engine, view_of(session))(RESULT)
    assert list(partly) == LATER[:3]
    assert "Who is it" not in "".join(texts) and "result" not in "".join(texts), "targets alone run again"


def test_a_thread_that_was_evicted_meanwhile_is_unknown(session):
    attention = attention_of(session.engine, cached_view(session))
    session.engine.drop(session.key("t", MESSAGES), 0)
    assert attention(RESULT) == {}


def test_retracted_spans_are_neither_source_nor_target(session):
    cached_view(session)
    gone = [Retraction(span=span, policy="test", reason="wrong") for span in (SpanRef(5), LATER[0])]
    plan = session.retract("gone", MESSAGES, proposals=gone)
    assert [span.exact for span in plan.spans] == [False, False]
    view = view_of(session, thread_id="gone")
    assert {e.exact for e in view.edits} == {False}
    attention = attention_of(session.engine, view)
    assert list(attention(RESULT)) == LATER[1:]
    assert attention(SpanRef(5)) == {}
    assert attention(SpanRef(5, start=0, end=9)) == {}


def test_entries_are_counted_without_what_was_removed_exactly(session):
    cached_view(session)
    session.retract("exact", MESSAGES, proposals=[Retraction(span=SpanRef(1), policy="test", reason="wrong")])
    session.ledger.set_status("exact", {r.retraction_id: Status.EXACT for r in session.ledger.records("exact")})
    session.engine.extend(view_of(session, thread_id="exact").key)
    view = view_of(session, thread_id="exact")
    assert len(view.key) < len(view.rendering.ids)
    shares = attention_of(session.engine, view)(RESULT)
    assert list(shares) == LATER
    span, ref = view.rendering.interval(RESULT), view.rendering.interval(LATER[3])
    shift = len(view.rendering.ids) - len(view.key)
    one = session.engine.attention(view.key, (span[0] - shift, span[1] - shift), np.arange(*ref) - shift).numpy()
    assert shares[LATER[3]] == pytest.approx(float(one.max() - np.median(one)), abs=1e-5)


def test_an_engine_that_does_not_show_attention_has_no_answers(session):
    class FakeEngine:
        """Knows nothing of attention."""

    assert attention_of(FakeEngine(), view_of(session)) is None


def test_the_bundled_model_looks_at_what_it_answers_from(session):
    """At a threshold of 0.5, on answers whose sources the corpus knows."""
    used, unused = [], []
    for sample in samples("relations", 8, split="test", length=300):
        probe = sample.probes[0]
        messages = [*sample.messages, Message("user", probe.question), Message("assistant", probe.answer)]
        answer = SpanRef(len(messages) - 1, start=0, end=len(probe.answer))
        attention = attention_of(session.engine, cached_view(session, messages, sample.tools))
        for span in sample.spans:
            (used if span.span_id in probe.without else unused).append(attention(span.ref)[answer])
    print(f"used {len(used)}: {np.mean(np.array(used) >= 0.5):.2f}, unused {len(unused)}: "
          f"{np.mean(np.array(unused) >= 0.5):.2f}")  # fmt: skip
    assert len(used) >= 8 and len(unused) >= 8
    assert np.mean(np.array(used) >= 0.5) >= 0.75
    assert np.mean(np.array(unused) >= 0.5) <= 0.25


def test_a_lineage_that_asks_for_attention_needs_an_engine_that_tells():
    from kv_retract.attention import check_lineage
    from kv_retract.errors import UnsupportedError
    from kv_retract.ledger.lineage import Lineage

    class Silent:
        """Stands for an engine that shows no attention."""

    assert check_lineage(Lineage(), Silent()).attention is None
    with pytest.raises(UnsupportedError, match="a Silent does not tell"):
        check_lineage(Lineage(attention=0.5), Silent())
