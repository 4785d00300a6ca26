"""The planner, on a rendering that counts three characters of a part as one token."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_retract.errors import SpanError
from kv_retract.planner import EraserFacts, Planner
from kv_retract.types import Evidence, Guarantee, Hop, Message, Retraction, Scope, SpanRef, Status, ToolCall

MASK = EraserFacts(eraser_id="mask")
NOW = "2026-01-01T00:00:00+00:00"


@dataclass
class FakeRendering:
    """Each message: one token of role, then content and calls (a name is three characters) in tokens of three.

    The parts of a message are one text, so that a token may straddle two parts, as with a real tokenizer.
    """

    messages: list

    def _base(self, index):
        return sum(1 + -(-self._length(m) // 3) for m in self.messages[:index]) + 1

    def _length(self, message):
        return len(message.content) + sum(3 + len(c.arguments) for c in message.tool_calls)

    @property
    def ids(self):
        return range(self._base(len(self.messages)) - 1)

    def leaves_out(self, ref):
        """As a template that trims contents."""
        return ref.part == "content" and self.messages[ref.message].content[ref.start : ref.end].isspace()

    def interval(self, ref):
        message = self.messages[ref.message]
        if "hidden" in message.content:
            raise SpanError(f"message {ref.message} is not in the rendering")
        offset = 0
        if ref.part == "content":
            start, end = ref.start, len(message.content) if ref.end is None else ref.end
        else:
            offset = len(message.content) + sum(3 + len(c.arguments) for c in message.tool_calls[: ref.call]) + 3
            length = len(message.tool_calls[ref.call].arguments)
            start, end = ref.start, length if ref.end is None else ref.end
            if ref.start == 0 and ref.end is None:
                start = -3
        base = self._base(ref.message)
        return base + (offset + start) // 3, base + -(-(offset + end) // 3)


THREAD = [
    Message(role="system", content="s" * 30),
    Message(role="user", content="u" * 30),
    Message(role="assistant", content="", tool_calls=(ToolCall("c1", "get", "a" * 30),)),
    Message(role="tool", content="t" * 300, tool_call_id="c1", name="get"),
    Message(role="user", content="v" * 30),
    Message(role="assistant", content="w" * 300),
    Message(role="tool", content="x" * 300, tool_call_id="c1", name="get"),
]


def retract(span, **fields):
    return Retraction(span=span, policy=fields.pop("policy", "p"), reason=fields.pop("reason", "r"), **fields)


def plan(proposals, *, messages=THREAD, records=(), num_cached=None, eraser=MASK, **planner):
    rendering = FakeRendering(list(messages))
    return Planner(**planner).plan(
        proposals,
        thread_id="t",
        messages=messages,
        rendering=rendering,
        records=records,
        num_cached=len(rendering.ids) if num_cached is None else num_cached,
        eraser=eraser,
        now=NOW,
    )


def spans(result):
    return [s.record.span for s in result.spans]


def whys(result):
    return [d.why for d in result.dropped]


def test_plan_carries_records_and_sizes():
    result = plan([retract(SpanRef(3))])
    [planned] = result.spans
    assert (planned.start, planned.end, planned.exact) == (11 + 11 + 12 + 1, 11 + 11 + 12 + 1 + 100, False)
    assert planned.record.status is Status.STEERED and planned.record.eraser_id == "mask"
    assert planned.record.created_at == NOW and planned.record.span_tokens == 100
    assert (result.num_tokens, result.num_cached_tokens, result.eraser_id) == (348, 348, "mask")


def test_clock_is_used_where_no_time_is_given():
    rendering = FakeRendering(THREAD)
    result = Planner().plan(
        [retract(SpanRef(3))],
        thread_id="t",
        messages=THREAD,
        rendering=rendering,
        records=(),
        num_cached=340,
        eraser=MASK,
    )
    assert result.spans[0].record.created_at.endswith("+00:00")


def test_protected_messages():
    proposals = [retract(SpanRef(0)), retract(SpanRef(4)), retract(SpanRef(1)), retract(SpanRef(6))]
    result = plan(proposals, exact_suffix=0)
    assert spans(result) == [SpanRef(1), SpanRef(6)]
    assert whys(result) == ["protected: system prompt", "protected: newest user message"]
    assert len(plan(proposals, protect_system=False, protect_newest_user=False).spans) == 4


def test_bad_span_is_dropped_but_raised_for_explicit():
    for span in (SpanRef(99), SpanRef(3, end=999), SpanRef(3, "tool_call", 0)):
        result = plan([retract(span)])
        assert not result.spans and whys(result)[0].startswith("bad span: ")
        with pytest.raises(SpanError, match="'explicit'.*got"):
            plan([retract(span, policy="explicit")])


def test_span_that_cannot_be_located():
    messages = [Message(role="user", content="hidden"), Message(role="user", content="q")]
    assert "not in the rendering" in whys(plan([retract(SpanRef(0))], messages=messages))[0]
    with pytest.raises(SpanError, match="not in the rendering"):
        plan([retract(SpanRef(0), policy="explicit")], messages=messages)


def test_empty_spans_are_dropped():
    messages = [Message(role="tool", content="", tool_call_id="c"), Message(role="assistant", content="abc")]
    result = plan([retract(SpanRef(0)), retract(SpanRef(1, start=2, end=2))], messages=messages)
    assert not result.spans and whys(result) == ["empty", "empty"]


def test_overlapping_proposals_become_one_with_the_strongest_terms():
    a = retract(SpanRef(3, start=0, end=60), policy="a", reason="one", notice="gone", confidence=0.5)
    b = retract(SpanRef(3, start=30, end=90), policy="b", reason="two", guarantee=Guarantee.EXACT)
    for proposals in ([a, b], [b, a]):
        [planned] = plan(proposals).spans
        record = planned.record
        assert record.span == SpanRef(3, start=0, end=90)
        assert (record.policy, record.reason, record.notice) == ("a+b", "one; two", "gone")
        assert (record.guarantee, record.scope, planned.why_exact) == (Guarantee.EXACT, Scope.THREAD, "guarantee")
    separate = plan([a, retract(SpanRef(3, start=60, end=90))], exact_suffix=0)
    assert len(separate.spans) == 2


def test_same_place_gets_the_same_name():
    """The record of `[0, length)` and of the whole part must be one."""
    [a] = plan([retract(SpanRef(3, start=0, end=300))]).spans
    [b] = plan([retract(SpanRef(3))]).spans
    assert a.record == b.record and a.record.span.end is None


def test_whole_call_and_its_arguments_differ():
    [call] = plan([retract(SpanRef(2, "tool_call"))], exact_suffix=0).spans
    [arguments] = plan([retract(SpanRef(2, "tool_call", 0, 0, 30))], exact_suffix=0).spans
    assert call.end == arguments.end and call.start == arguments.start - 1
    assert spans(plan([retract(SpanRef(2, "tool_call")), retract(SpanRef(2, "tool_call", 0, 5, 9))])) == [
        SpanRef(2, "tool_call")
    ]


def test_retracted_characters_are_not_planned_again():
    first = plan([retract(SpanRef(3, start=90, end=120))], exact_suffix=0)
    records = [s.record for s in first.spans]
    again = plan([retract(SpanRef(3, start=90, end=120))], records=records)
    assert not again.spans and whys(again) == ["already retracted"]
    wider = plan([retract(SpanRef(3), notice="gone")], records=records, exact_suffix=0)
    assert spans(wider) == [SpanRef(3, start=0, end=90), SpanRef(3, start=120, end=300)]
    assert [s.record.notice for s in wider.spans] == ["gone", None]


def test_stronger_guarantee_for_a_steered_span_is_reported():
    records = [s.record for s in plan([retract(SpanRef(3))], exact_suffix=0).spans]
    result = plan([retract(SpanRef(3), guarantee=Guarantee.EXACT)], records=records)
    assert not result.spans and "set it to exact" in whys(result)[0]


def test_stronger_guarantee_for_a_span_that_is_steered_in_part_is_reported():
    records = [s.record for s in plan([retract(SpanRef(3, start=90, end=120))], exact_suffix=0).spans]
    result = plan([retract(SpanRef(3), guarantee=Guarantee.EXACT)], records=records)
    assert len(result.spans) == 2
    assert whys(result) == ["already retracted, in part, but steered: set it to exact in the ledger to have it rebuilt"]
    elsewhere = plan([retract(SpanRef(3, start=200, end=300), guarantee=Guarantee.EXACT)], records=records)
    assert len(elsewhere.spans) == 1 and not elsewhere.dropped


def test_the_rest_of_a_part_that_the_template_does_not_show_is_dropped():
    messages = [*THREAD[:3], Message(role="tool", content="t" * 30 + "   ", tool_call_id="c1"), *THREAD[4:]]
    rest = SpanRef(3, start=0, end=30)
    records = [s.record for s in plan([retract(rest)], messages=messages, exact_suffix=0).spans]
    result = plan([retract(SpanRef(3), policy="explicit")], messages=messages, records=records)
    assert not result.spans and whys(result) == ["empty: the template shows nothing of it"]


def test_token_between_two_spans_belongs_to_the_first():
    result = plan([retract(SpanRef(3, start=0, end=10)), retract(SpanRef(3, start=10, end=20))], exact_suffix=0)
    a, b = result.spans
    assert (a.end - a.start, b.end - b.start) == (4, 3) and a.end == b.start
    inside = plan([retract(SpanRef(3, start=0, end=10)), retract(SpanRef(3, start=10, end=11))], exact_suffix=0)
    assert len(inside.spans) == 1 and "tokens" in whys(inside)[0]


def test_revoked_record_is_a_veto_for_its_policies():
    [planned] = plan([retract(SpanRef(3), policy="a")], exact_suffix=0).spans
    revoked = [dataclasses.replace(planned.record, status=Status.REVOKED)]
    assert whys(plan([retract(SpanRef(3), policy="a")], records=revoked)) == ["revoked earlier"]
    assert spans(plan([retract(SpanRef(3), policy="b")], records=revoked)) == [SpanRef(3)]
    mine = [dataclasses.replace(revoked[0], policy="explicit")]
    assert spans(plan([retract(SpanRef(3), policy="explicit")], records=mine)) == [SpanRef(3)]


def exact(result):
    return [(s.exact, s.why_exact) for s in result.spans]


def test_short_suffix_is_recomputed():
    end = plan([retract(SpanRef(3))]).spans[0].end
    assert exact(plan([retract(SpanRef(3))], num_cached=end + 65)) == [(False, "")]
    assert exact(plan([retract(SpanRef(3))], num_cached=end + 64)) == [(True, "short suffix")]
    assert exact(plan([retract(SpanRef(3))], num_cached=end + 64, exact_suffix=0)) == [(False, "")]
    assert exact(plan([retract(SpanRef(3))], num_cached=end - 1, exact_suffix=0)) == [(True, "not cached")]


def test_everything_behind_an_exact_span_is_exact():
    proposals = [retract(SpanRef(1)), retract(SpanRef(3), guarantee=Guarantee.EXACT), retract(SpanRef(5))]
    result = plan(proposals, exact_suffix=0)
    assert exact(result) == [(False, ""), (True, "guarantee"), (True, "follows an exact span")]
    assert [s.record.status for s in result.spans] == [Status.STEERED, Status.EXACT, Status.EXACT]


def test_min_guarantee_strengthens():
    result = plan([retract(SpanRef(3))], min_guarantee="exact")
    assert exact(result) == [(True, "guarantee")]
    assert result.spans[0].record.guarantee is Guarantee.EXACT


def test_exact_eraser_gives_exact_records():
    eraser = EraserFacts(eraser_id="recompute", exact=True, recomputed=lambda p, s, x: x)
    result = plan([retract(SpanRef(3))], eraser=eraser)
    assert result.spans[0].exact and result.spans[0].record.status is Status.EXACT


REPAIR = EraserFacts(eraser_id="suffix", recomputed=lambda prefix, span, suffix: suffix)


def test_budget_takes_the_cheapest_and_leaves_the_rest_for_later():
    proposals = [retract(SpanRef(1)), retract(SpanRef(3)), retract(SpanRef(5))]
    suffix = 348 - plan(proposals, exact_suffix=0).spans[2].end
    result = plan(proposals, eraser=REPAIR, budget=suffix, exact_suffix=0)
    assert spans(result) == [SpanRef(5)]
    assert whys(result) == ["over budget", "over budget"]
    assert len(plan(proposals, eraser=REPAIR, budget=348, exact_suffix=0).spans) == 3
    assert spans(plan(proposals, eraser=REPAIR, budget=suffix - 1, exact_suffix=0)) == []


def test_budget_never_drops_what_must_be_exact_nor_what_is_free():
    proposals = [retract(SpanRef(3), guarantee=Guarantee.EXACT), retract(SpanRef(5)), retract(SpanRef(1))]
    result = plan(proposals, eraser=REPAIR, budget=0, exact_suffix=0)
    assert spans(result) == [SpanRef(3), SpanRef(5)]
    assert spans(plan([retract(SpanRef(6))], eraser=REPAIR, budget=0, num_cached=250)) == [SpanRef(6)]


def test_budget_counts_a_short_suffix_once():
    proposals = [retract(SpanRef(6, start=120, end=150)), retract(SpanRef(6, start=240, end=270))]
    # Behind the first span 50 tokens are cached, 10 of them in the second span, 10 behind it.
    assert len(plan(proposals, budget=40).spans) == 2
    assert spans(plan(proposals, budget=39)) == [SpanRef(6, start=240, end=270)]


@pytest.mark.parametrize("fields", [{"exact_suffix": -1}, {"budget": -1}, {"min_guarantee": "weak"}])
def test_malformed_fields(fields):
    with pytest.raises(ValueError, match="-1|weak"):
        Planner(**fields)


@st.composite
def threads(draw):
    messages = []
    for _ in range(draw(st.integers(1, 7))):
        role = draw(st.sampled_from(["system", "user", "assistant", "tool"]))
        content = "x" * draw(st.integers(0, 40))
        calls = ()
        if role == "assistant":
            calls = tuple(
                ToolCall(f"c{i}", "get", "a" * draw(st.integers(0, 20))) for i in range(draw(st.integers(0, 2)))
            )
        messages.append(Message(role=role, content=content, tool_calls=calls))
    return messages


@st.composite
def cases(draw):
    messages = draw(threads())
    proposals = []
    for _ in range(draw(st.integers(0, 8))):
        part = draw(st.sampled_from(["content", "content", "tool_call"]))
        start = draw(st.integers(0, 30))
        end = draw(st.one_of(st.none(), st.integers(0, 30)))
        ref = SpanRef(draw(st.integers(0, len(messages))), part, draw(st.integers(0, 1)), start if end else 0, end)
        policy, guarantee = draw(st.sampled_from("abc")), draw(st.sampled_from([*Guarantee] + [Guarantee.STEERED] * 3))
        proposals.append(retract(ref, policy=policy, guarantee=guarantee))
    fields = {"exact_suffix": draw(st.integers(0, 20)), "budget": draw(st.one_of(st.none(), st.integers(0, 60)))}
    num_cached = draw(st.integers(0, len(FakeRendering(messages).ids)))
    eraser = draw(st.sampled_from([MASK, REPAIR, EraserFacts(eraser_id="x", exact=True, recomputed=lambda p, s, x: x)]))
    return messages, proposals, num_cached, eraser, fields


def characters(messages, ref):
    """All (message, part, call, character) of a span; -1 is the name of a call."""
    if ref.part == "content":
        length = len(messages[ref.message].content)
        low = ref.start
    else:
        length = len(messages[ref.message].tool_calls[ref.call].arguments)
        low = -1 if ref.start == 0 and ref.end is None else ref.start
    call = ref.call if ref.part == "tool_call" else 0
    return {(ref.message, ref.part, call, i) for i in range(low, length if ref.end is None else ref.end)}


@settings(max_examples=300, deadline=None)
@given(case=cases(), shuffle=st.randoms(use_true_random=False))
def test_conservation_laws_of_a_plan(case, shuffle):
    messages, proposals, num_cached, eraser, fields = case
    result = plan(proposals, messages=messages, num_cached=num_cached, eraser=eraser, **fields)

    # Ordered, apart, not empty, inside of the thread.
    assert all(0 <= s.start < s.end <= result.num_tokens for s in result.spans)
    assert all(a.end <= b.start for a, b in pairwise(result.spans))

    # Exact from the first exact span on, and where it must be.
    flags = [s.exact for s in result.spans]
    assert flags == sorted(flags)
    for s in result.spans:
        assert s.exact == (s.record.status is Status.EXACT) == (bool(s.why_exact) or eraser.exact)
        assert s.exact or (s.end <= num_cached and s.record.guarantee is Guarantee.STEERED)

    # Protected messages are never planned; nothing is planned that nobody proposed.
    newest_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=None)
    planned = set()
    for s in result.spans:
        assert messages[s.record.span.message].role != "system" and s.record.span.message != newest_user
        own = characters(messages, s.record.span)
        assert own and not own & planned
        planned |= own
    bad = {(d.span, d.policy) for d in result.dropped if d.why.startswith("bad")}
    valid = [p for p in proposals if (p.span, p.policy) not in bad]
    assert planned <= set().union(*(characters(messages, p.span) for p in valid), set())
    assert all(d.why for d in result.dropped)

    # Every character of every valid proposal is planned or dropped with a reason.
    told = planned.union(*(characters(messages, d.span) for d in result.dropped if (d.span, d.policy) not in bad))
    for p in valid:
        assert characters(messages, p.span) <= told

    # The order of the proposals does not matter.
    mixed = list(proposals)
    shuffle.shuffle(mixed)
    assert plan(mixed, messages=messages, num_cached=num_cached, eraser=eraser, **fields).spans == result.spans

    # The budget holds for what is not demanded.
    if fields["budget"] is not None and not any(s.why_exact == "guarantee" for s in result.spans):
        steered = [s for s in result.spans if not s.exact]
        if steered and all(not s.exact for s in result.spans):
            tokens = sum(s.end - s.start for s in steered)
            assert (
                eraser.recomputed(steered[0].start, tokens, num_cached - steered[0].start - tokens) <= fields["budget"]
            )

    # Planning again with the records of the plan plans only what the budget had left over.
    records = [s.record for s in result.spans]
    again = plan(proposals, messages=messages, num_cached=num_cached, eraser=eraser, records=records, **fields)
    if "over budget" not in whys(result):
        assert again.spans == ()
    assert all(not characters(messages, s.record.span) & planned for s in again.spans)
    taken = sorted([(s.start, s.end) for s in result.spans] + [(s.start, s.end) for s in again.spans])
    assert all(a[1] <= b[0] for a, b in pairwise(taken))


def derived(span, root, **fields):
    return retract(span, derived_from=(root,), **fields)


HOP = Hop(
    kind="quote", source=SpanRef(3), target=SpanRef(5),
    evidence=(Evidence(kind="value", source=SpanRef(3), target=SpanRef(5), weight=7),),
)  # fmt: skip


def test_what_was_derived_names_the_retraction_that_it_came_with():
    rendering = FakeRendering(THREAD)
    result = Planner(exact_suffix=0).plan(
        [retract(SpanRef(3)), derived(SpanRef(5), SpanRef(3))],
        thread_id="t", messages=THREAD, rendering=rendering, records=(), num_cached=len(rendering.ids), eraser=MASK,
        hops=[HOP],
    )  # fmt: skip
    root, quote = result.spans
    assert root.record.derived_from == () and quote.record.derived_from == (root.record.retraction_id,)
    assert result.hops == (HOP,)


@pytest.mark.parametrize(
    ("root", "settings"), [(SpanRef(0), {}), (SpanRef(4), {}), (SpanRef(3), {"budget": 0})],
    ids=["system", "newest user", "over budget"],
)  # fmt: skip
def test_what_was_derived_from_a_span_that_stays_stays(root, settings):
    eraser = EraserFacts(eraser_id="e", recomputed=lambda p, s, x: s if s == 100 and p < 60 else 0)
    result = plan([retract(root), derived(SpanRef(5), root)], eraser=eraser, exact_suffix=0, **settings)
    assert result.spans == () and "derived from a span that stays" in whys(result)


def test_a_derived_span_that_a_policy_found_itself_needs_no_root():
    result = plan([retract(SpanRef(0)), derived(SpanRef(5), SpanRef(0)), retract(SpanRef(5), policy="q")])
    assert spans(result) == [SpanRef(5)] and result.spans[0].record.derived_from == ()


def test_what_was_derived_from_a_span_that_is_retracted_already_names_its_record():
    first = plan([retract(SpanRef(3))]).spans[0].record
    result = plan([derived(SpanRef(5), SpanRef(3))], records=[first])
    assert result.spans[0].record.derived_from == (first.retraction_id,)


def test_verification_is_drawn_by_the_retraction_and_only_for_steered_spans():
    drawn = [
        span.verify
        for n in range(200)
        for span in plan([retract(SpanRef(3, start=n), verify=0.25)], exact_suffix=0).spans
    ]
    assert 30 < sum(drawn) < 70
    assert not plan([retract(SpanRef(3), guarantee=Guarantee.EXACT, verify=1.0)]).spans[0].verify
    assert plan([retract(SpanRef(3), verify=1.0)], exact_suffix=0).spans[0].verify
