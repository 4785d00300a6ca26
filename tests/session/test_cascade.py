"""Cascades end to end: what was derived from a span goes with it, once, and comes back with it (DESIGN D8)."""

import pytest

from kv_retract import KVRetractSession, Lineage, Message, Planner, SamplingParams, SpanRef, Status, ToolCall
from kv_retract.policies import Explicit
from kv_retract.testing.spy import prefilled_texts

SHORT = SamplingParams(max_tokens=4)
CODE = "QX-88231"
THREAD = [
    Message("system", "You are a travel assistant."),
    Message("user", "Find my booking, please."),
    Message("assistant", tool_calls=(ToolCall("a", "find_booking", '{"name": "Mia"}'),)),
    Message("tool", f'{{"booking": "{CODE}", "seat": "14C"}}', tool_call_id="a", name="find_booking"),
    Message("assistant", tool_calls=(ToolCall("b", "get_fare", f'{{"booking": "{CODE}"}}'),)),
    Message("tool", '{"fare": 48213}', tool_call_id="b", name="get_fare"),
    Message("assistant", f"Your booking is {CODE}. It is on time. The fare was 48213."),
    Message("user", "Thank you. What else do you know?"),
]


@pytest.fixture(scope="module")
def loaded():
    return KVRetractSession.from_pretrained("random", max_tokens=4096)


def session_on(loaded, name, cascade, **kw):
    policy = Explicit(match=THREAD[3].content, reason="of somebody else", cascade=cascade)
    return KVRetractSession(
        loaded.engine, loaded.renderer, extra_key=name, policies=[policy], planner=Planner(exact_suffix=0), **kw
    )


@pytest.mark.parametrize(
    ("cascade", "gone", "kept"),
    [
        ("none", {3}, [CODE, "48213"]),
        ("quoted", {3, 4, 6}, ["48213"]),
        ("lineage", {3, 4, 5, 6}, []),
    ],
)
def test_the_cascade_decides_what_the_model_still_reads(loaded, cascade, gone, kept, request):
    session = session_on(loaded, request.node.name, cascade)
    session.engine.extend(session.key("t", THREAD))
    plan = session.plan("t", THREAD)
    assert {hop.target.message for hop in plan.hops} == gone - {3}
    assert all(hop.evidence for hop in plan.hops) and not session.history("t")
    with prefilled_texts(session) as texts:
        session.step("t", THREAD, sampling=SHORT)
    assert {r.span.message for r in session.history("t")} == gone
    read = session.renderer.decode([i for i in session.key("t", THREAD).ids.tolist() if i >= 0])
    assert [value for value in (CODE, "48213") if value in read] == kept
    assert "It is on time." in read
    assert not any(value in "".join(texts) for value in {CODE, "48213"} - set(kept))
    session.engine.check_integrity()


def test_a_cascade_is_looked_at_once_so_later_words_stand(loaded, request):
    session = session_on(loaded, request.node.name, "lineage")
    session.engine.extend(session.key("t", THREAD))
    session.step("t", THREAD, sampling=SHORT)
    before = session.history("t")
    later = [*THREAD, Message("assistant", "Nothing."), Message("user", f"But my booking is {CODE}, I am sure."),
             Message("assistant", f"All right, {CODE} it is."), Message("user", "Good.")]  # fmt: skip
    plan = session.step("t", later, sampling=SHORT).plan
    assert not plan.spans and not plan.hops
    assert session.history("t") == before
    assert CODE in session.renderer.decode([i for i in session.key("t", later).ids.tolist() if i >= 0])


def test_undoing_the_root_brings_everything_back(loaded, request):
    session = session_on(loaded, request.node.name, "lineage", notify=True)
    session.engine.extend(session.key("t", THREAD))
    session.step("t", THREAD, sampling=SHORT)
    [root] = [r for r in session.history("t") if not r.derived_from]
    assert root.span == SpanRef(3) and root.notice
    assert all(r.derived_from == (root.retraction_id,) and r.notice is None for r in session.history("t") if r != root)
    assert len(session.undo("t", root.retraction_id)) == len(session.history("t")) == 5
    assert {r.status for r in session.history("t")} == {Status.REVOKED}
    read = session.renderer.decode(session.key("t", THREAD).ids.tolist())
    assert CODE in read and "48213" in read


def test_attention_joins_as_evidence_where_it_is_asked_for(loaded, request):
    name = request.node.name
    asked = session_on(loaded, name, "quoted", lineage=Lineage(attention=0.05))
    plain = session_on(loaded, f"{name}'", "quoted")
    kinds = []
    for session in (asked, plain):
        session.engine.extend(session.key("t", THREAD))
        kinds.append({e.kind for hop in session.plan("t", THREAD).hops for e in hop.evidence})
        session.engine.check_integrity()
    assert kinds[0] - kinds[1] == {"attention"}
