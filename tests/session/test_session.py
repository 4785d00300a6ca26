"""The session: one agent step on the real engine, and what must hold whatever is lost (D1 to D4)."""

import copy
import dataclasses
import re
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kv_retract import (
    Guarantee,
    KVRetractSession,
    Message,
    Planner,
    RetractionPolicy,
    SamplingParams,
    Scope,
    SpanRef,
    SqliteLedger,
    Status,
    ToolCall,
)
from kv_retract.erasers import RepairEraser
from kv_retract.errors import PolicyError, SpanError, ThreadBusyError
from kv_retract.ledger.render import Renderer
from kv_retract.testing.plain import plain_logits
from kv_retract.testing.spy import prefilled_texts

from .watching import of_message

SHORT = SamplingParams(max_tokens=4)


def thread(n=8):
    """Turns with one tool result in each pair; every message carries a marker of its own."""
    messages = [Message("system", "You are a helpful agent. marker-0")]
    for i in range(1, n):
        if i % 2:
            messages.append(Message("user", f"Please look up item {i} for me. marker-{i}"))
        else:
            messages.append(Message("assistant", f"The answer for item {i} is {i * 37}, as the list shows. marker-{i}"))
    return messages


@pytest.fixture(scope="module")
def loaded():
    return KVRetractSession.from_pretrained("random", max_tokens=4096)


def session_on(loaded, name, **kw):
    """A session of its own namespace on the shared engine."""
    kw.setdefault("planner", Planner(exact_suffix=0))
    return KVRetractSession(loaded.engine, loaded.renderer, extra_key=name, **kw)


@pytest.mark.parametrize("eraser", ["mask", "shift", "repair", "selective", "in_place", "none", "erratum", "recompute"])
def test_a_retracted_message_changes_the_next_step_only_through_the_eraser(loaded, eraser, request):
    session = session_on(loaded, request.node.name, eraser=eraser)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    plan = session.retract("t", messages, proposals=[of_message(2)])
    assert len(plan.spans) == 1 and not plan.dropped
    result = session.last_erase("t")
    assert result.tokens_erased == plan.spans[0].end - plan.spans[0].start
    with prefilled_texts(session) as texts:
        step = session.step("t", [*messages, Message("assistant", "ok"), Message("user", "and now?")], sampling=SHORT)
    assert "marker-2" not in "".join(texts)
    assert step.retraction_ids == (plan.spans[0].record.retraction_id,)
    assert step.num_cached_tokens > plan.spans[0].end * 0.5
    assert session.history("t")[0].status is (Status.EXACT if eraser == "recompute" else Status.STEERED)
    session.engine.check_integrity()


def test_exact_equals_a_thread_that_never_had_the_text(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    plan = session.retract("t", messages, proposals=[of_message(2, guarantee=Guarantee.EXACT)])
    (span,) = plan.spans
    key = session.key("t", messages)
    ids = session.renderer.render(messages).ids
    fresh = np.concatenate([ids[: span.start], ids[span.end :]])
    assert np.array_equal(key.ids, fresh)
    with torch.inference_mode():
        want = loaded.engine.model(input_ids=torch.from_numpy(fresh)[None], use_cache=False).logits[0, -1].float()
    torch.testing.assert_close(session.engine.extend(key).logits[0], want, atol=1e-4, rtol=0)
    assert span.record.scope is Scope.THREAD, "an exact retraction holds in earlier forks too, unless told otherwise"


def test_applying_a_plan_twice_changes_nothing(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    proposals = [of_message(2), of_message(4)]
    first = session.retract("t", messages, proposals=proposals)
    key, history = session.key("t", messages), session.history("t")
    used = session.engine.tokens_in_use()
    second = session.retract("t", messages, proposals=proposals)
    assert len(first.spans) == 2 and not second.spans
    assert {d.why for d in second.dropped} == {"already retracted"}
    assert np.array_equal(session.key("t", messages).ids, key.ids)
    assert session.history("t") == history
    assert session.engine.tokens_in_use() == used
    assert session.last_erase("t") is None


def test_after_eviction_the_span_is_left_out_and_the_thread_becomes_exact(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2), of_message(5)])
    steered = session.key("t", messages)
    session.engine.drop(steered, int(np.flatnonzero(steered.ids < 0)[-1]))
    with prefilled_texts(session) as texts:
        session.step("t", messages, sampling=SHORT)
    assert "marker-5" not in "".join(texts) and "marker-6" in "".join(texts)
    assert [r.status for r in session.history("t")] == [Status.STEERED, Status.EXACT]
    assert (session.key("t", messages).ids < 0).any(), "the first one is still cached, and still steered"


def test_after_a_restart_the_ledger_alone_keeps_the_text_out(loaded, request, tmp_path):
    path, messages = tmp_path / "ledger.sqlite", thread()
    session = session_on(loaded, request.node.name, ledger=path)
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    session.ledger.close()
    code = f"""
        from kv_retract import KVRetractSession, SamplingParams
        from kv_retract.testing.spy import prefilled_texts
        from kv_retract.types import Message
        session = KVRetractSession.from_pretrained("random", max_tokens=2048, ledger={str(path)!r})
        messages = [Message(role, text) for role, text in {[(m.role, m.content) for m in messages]!r}]
        with prefilled_texts(session) as texts:
            session.step("t", messages, sampling=SamplingParams(max_tokens=2))
        text = "".join(texts)
        assert "marker-2" not in text and "marker-3" in text, text
        print([r.status.value for r in session.history("t")])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['exact']"
    with SqliteLedger(path) as reopened:
        assert reopened.records("t")[0].status is Status.EXACT


def test_a_fork_after_the_retraction_never_prefills_the_text(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    session.fork("t", "fork")
    with prefilled_texts(session) as texts:
        step = session.step(
            "fork", [*messages, Message("assistant", "x"), Message("user", "other way")], sampling=SHORT
        )
    assert "marker-2" not in "".join(texts)
    assert step.num_cached_tokens > 100, "the fork shares the edited path"


def test_a_fork_from_before_the_retraction_sees_what_it_saw_then(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    earlier = session.step("t", messages[:4], sampling=SHORT)
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    again = session.step("t", messages[:4], sampling=SHORT)
    assert again.token_ids == earlier.token_ids and again.retraction_ids == ()
    other = [*messages[:4], Message("assistant", "different"), Message("user", "branch")]
    assert session.step("t", other, sampling=SHORT).retraction_ids == ()
    assert len(session.step("t", messages, sampling=SHORT).retraction_ids) == 1


def test_thread_scope_reaches_earlier_forks(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2, scope=Scope.THREAD)])
    assert len(session.step("t", messages[:4], sampling=SHORT).retraction_ids) == 1


def test_pruning_older_messages_does_not_bring_a_retracted_text_back(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(4)])
    pruned = [messages[0], *messages[3:], Message("assistant", "ok"), Message("user", "go on")]
    with prefilled_texts(session) as texts:
        assert len(session.step("t", pruned, sampling=SHORT).retraction_ids) == 1
    assert "marker-4" not in "".join(texts) and "marker-5" in "".join(texts)


def test_a_change_of_tools_rebuilds_the_thread_without_the_text(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    with prefilled_texts(session) as texts:
        session.step("t", messages, tools=tools, sampling=SHORT)
    assert "marker-2" not in "".join(texts) and "marker-3" in "".join(texts)


def test_part_of_a_message(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    # One token: a longer answer would be cached behind the messages and keep their old path alive.
    session.step("t", messages, sampling=SamplingParams(max_tokens=1))
    text = messages[2].content
    span = SpanRef(2, start=text.index("is "), end=text.index(", as"))
    session.retract("t", messages, proposals=[of_message(2, span=span)])
    session.engine.drop(session.key("t", messages), 0)
    with prefilled_texts(session) as texts:
        session.step("t", messages, sampling=SHORT)
    seen = "".join(texts)
    assert "marker-2" in seen and "The answer for item 2" in seen and "is 74" not in seen


def test_tool_call_arguments_and_result_are_retracted_together(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = [
        Message("system", "sys"),
        Message("user", "What is the fare to Oslo?"),
        Message("assistant", "", tool_calls=(ToolCall("c1", "get_fare", '{"city": "Bergen-zz1"}'),)),
        Message("tool", '{"fare": "zz2-440"}', tool_call_id="c1", name="get_fare"),
        Message("assistant", "", tool_calls=(ToolCall("c2", "get_fare", '{"city": "Oslo"}'),)),
        Message("tool", '{"fare": 380}', tool_call_id="c2", name="get_fare"),
    ]
    session.step("t", messages, sampling=SHORT)
    plan = session.retract("t", messages, proposals=[of_message(2, span=SpanRef(2, part="tool_call")), of_message(3)])
    assert len(plan.spans) == 2
    session.engine.drop(session.key("t", messages), 0)
    with prefilled_texts(session) as texts:
        session.step("t", messages, sampling=SHORT)
    seen = "".join(texts)
    assert "zz1" not in seen and "zz2" not in seen and "Oslo" in seen and "380" in seen


def test_mixed_guarantees_in_one_plan(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread(12)
    session.step("t", messages, sampling=SHORT)
    plan = session.retract(
        "t", messages, proposals=[of_message(2), of_message(6, guarantee=Guarantee.EXACT), of_message(8)]
    )
    assert [s.exact for s in plan.spans] == [False, True, True]
    key = session.key("t", messages)
    assert (key.ids < 0).sum() == plan.spans[0].end - plan.spans[0].start
    with prefilled_texts(session) as texts:
        step = session.step("t", messages, sampling=SHORT)
    seen = "".join(texts)
    assert not any(f"marker-{i}" in seen for i in (2, 4, 6, 8)) and "marker-7" in seen
    assert len(step.retraction_ids) == 3
    session.engine.check_integrity()


def test_an_exact_retraction_before_a_steered_one_makes_that_exact_too(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread(12)
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(8)])
    session.retract("t", messages, proposals=[of_message(2, guarantee=Guarantee.EXACT)])
    with prefilled_texts(session) as texts:
        session.step("t", messages, sampling=SHORT)
    assert not any(m in "".join(texts) for m in ("marker-2", "marker-8"))
    assert {r.status for r in session.history("t")} == {Status.EXACT}


def test_a_steered_edit_ends_where_an_exact_one_begins(loaded, request):
    session = session_on(loaded, request.node.name, eraser="shift")
    messages = thread(12)
    session.step("t", messages, sampling=SHORT)  # the answer keeps the old path alive behind the exact span
    proposals = [of_message(2), of_message(8, guarantee=Guarantee.EXACT)]
    steered, exact = session.retract("t", messages, proposals=proposals).spans
    assert session.last_erase("t").tokens_moved == exact.start - steered.end
    key, ids = session.key("t", messages), session.renderer.render(messages).ids
    ids = np.concatenate([key.ids[: exact.start], ids[exact.start :]])
    never = dataclasses.replace(key, ids=ids, positions=np.arange(len(ids)))
    assert session.engine.cached(never) == exact.start, "the text that had to go is cached under a new key"


def test_neighbors_that_share_a_token_are_both_steered(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread(12)
    session.step("t", messages, sampling=SHORT)
    interval, end = session.renderer.render(messages).interval, len(messages[2].content)

    def halves(cut):
        return SpanRef(2, start=0, end=cut), SpanRef(2, start=cut, end=end)

    first, second = next(pair for pair in map(halves, range(4, end)) if interval(pair[0])[1] > interval(pair[1])[0])
    for span in (second, first):  # the token is the second one's, since that was there first
        (planned,) = session.retract("t", messages, proposals=[of_message(2, span=span)]).spans
    step = session.step("t", messages, sampling=SHORT)
    assert not planned.exact and step.num_cached_tokens == step.num_prompt_tokens - 1
    assert [r.status for r in session.history("t")] == [Status.STEERED, Status.STEERED]


def test_a_budget_holds_for_several_spans(loaded, request):
    planner = Planner(exact_suffix=0, budget=40)
    session = session_on(loaded, request.node.name, planner=planner, eraser=RepairEraser(tokens=20))
    messages = thread(12)
    session.step("t", messages, sampling=SHORT)
    plan = session.retract("t", messages, proposals=[of_message(i) for i in (2, 4, 6)])
    assert len(plan.spans) == 2 and session.last_erase("t").tokens_recomputed == 40
    assert [d.why for d in plan.dropped] == ["over budget"]


@pytest.mark.parametrize("eraser", ["mask", "none"])
def test_an_exact_span_behind_a_steered_one_in_the_same_page(loaded, eraser):
    """The page goes as a whole, and so the steered span is left out too."""
    session = KVRetractSession.from_pretrained(
        "random", max_tokens=1024, page_size=16, eraser=eraser, planner=Planner(exact_suffix=0)
    )
    messages = thread(12)
    session.step("t", messages, sampling=SHORT)
    cut = messages[4].content.index("marker")
    for span, guarantee in ((SpanRef(4, end=cut), Guarantee.STEERED), (SpanRef(4, start=cut), Guarantee.EXACT)):
        (planned,) = session.retract("t", messages, proposals=[of_message(4, span=span, guarantee=guarantee)]).spans
    assert planned.start % 16, "the two must share a page"
    with prefilled_texts(session) as texts:
        session.step("t", messages, sampling=SHORT)
    assert "marker-4" not in "".join(texts)
    key, rendering = session.key("t", messages), session.renderer.render(messages)
    assert np.array_equal(key.ids, np.delete(rendering.ids, np.arange(*rendering.interval(SpanRef(4)))))
    want = plain_logits(session.engine.model, key.ids)
    torch.testing.assert_close(session.engine.extend(key).logits, want, atol=1e-4, rtol=0)
    session.engine.check_integrity()


DROPS_OLD_TOOL_RESULTS = """
{%- set at = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set at.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role != 'tool' or loop.index0 > at.user %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def with_template(loaded, template):
    tokenizer = copy.deepcopy(loaded.renderer.tokenizer)
    tokenizer.chat_template = template
    return SimpleNamespace(engine=loaded.engine, renderer=Renderer(tokenizer))


def test_a_retracted_text_that_the_template_drops_later_is_no_error(loaded, request):
    session = session_on(with_template(loaded, DROPS_OLD_TOOL_RESULTS), request.node.name)
    result = Message("tool", "440 marker-1", tool_call_id="c1")
    messages = [Message("user", "fare?"), result, Message("assistant", "ok")]
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(1)])
    later = [*messages, Message("user", "thanks")]
    with prefilled_texts(session) as texts:
        step = session.step("t", later, sampling=SHORT)
    assert "marker-1" not in "".join(texts) and "thanks" in "".join(texts)
    assert len(step.retraction_ids) == 1
    assert len(session.step("t", messages, sampling=SHORT).retraction_ids) == 1


def test_a_steered_span_at_the_very_end_of_a_thread_is_left_out(loaded, request):
    bare = with_template(loaded, "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}")
    session = session_on(bare, request.node.name)
    messages = [Message("user", "fare?"), Message("assistant", "440 marker-1")]
    session.step("t", messages, sampling=SHORT)
    assert session.retract("t", messages, proposals=[of_message(1)]).spans
    with prefilled_texts(session) as texts:
        session.step("t", messages, sampling=SHORT)
    assert "marker-1" not in "".join(texts)
    assert session.history("t")[0].status is Status.EXACT


def test_what_is_not_cached_yet_is_left_out_for_free(loaded, request):
    session = session_on(loaded, request.node.name)
    plan = session.retract("t", thread(), proposals=[of_message(4)])
    assert plan.spans[0].why_exact == "not cached"
    with prefilled_texts(session) as texts:
        session.step("t", thread(), sampling=SHORT)
    assert "marker-4" not in "".join(texts) and "marker-5" in "".join(texts)


def test_a_pool_too_small_for_copies_falls_back_to_exact():
    session = KVRetractSession.from_pretrained(
        "random", max_tokens=1000, eraser="shift", planner=Planner(exact_suffix=0)
    )
    messages = thread(24)
    session.step("a", messages, sampling=SHORT)
    key = session.key("a", messages)
    assert len(key) > 500, "the suffix must not fit twice"
    stream = session.engine.generate(key, SamplingParams(max_tokens=3))
    next(stream)  # holds the pages, so that moving keys needs copies
    plan = session.retract("b", messages, proposals=[of_message(2)])
    result = session.last_erase("b")
    stream.close()
    assert not plan.spans[0].exact and result.exact
    assert session.history("b")[0].status is Status.EXACT
    with prefilled_texts(session) as texts:
        session.step("b", messages, sampling=SHORT)
    assert not re.search(r"marker-2\b", "".join(texts))
    session.engine.check_integrity()


def test_a_pool_too_small_to_recompute_leaves_it_to_the_next_step():
    session = KVRetractSession.from_pretrained("random", max_tokens=800, planner=Planner(exact_suffix=0))
    messages = thread(24)
    stream = session.engine.generate(session.key("a", messages), SamplingParams(max_tokens=3))
    next(stream)  # holds the pages, so that there is no room for the suffix beside them
    proposals = [of_message(2, guarantee=Guarantee.EXACT)]
    (planned,) = session.retract("b", messages, proposals=proposals).spans
    assert planned.exact and session.last_erase("b").exact and not session.last_erase("b").tokens_recomputed
    stream.close()
    with prefilled_texts(session) as texts:
        session.step("b", messages, sampling=SHORT)
    assert not re.search(r"marker-2\b", "".join(texts))
    session.engine.check_integrity()


def test_policies_run_before_each_step_and_their_failures_surface(loaded, request):
    @dataclasses.dataclass(kw_only=True)
    class Second(RetractionPolicy):
        name = "second"

        def propose(self, ctx):
            return [of_message(2, policy="second")] if len(ctx.messages) > 4 else []

    @dataclasses.dataclass(kw_only=True)
    class Broken(RetractionPolicy):
        name = "broken"

        def propose(self, ctx):
            raise KeyError("oops")

    session = session_on(loaded, request.node.name, policies=[Second()])
    assert not session.step("t", thread()[:4], sampling=SHORT).plan.spans
    assert len(session.step("t", thread()[:6], sampling=SHORT).plan.spans) == 1
    assert not session.step("t", thread(), sampling=SHORT).plan.spans
    with pytest.raises(PolicyError, match="'broken' failed on thread 't'.*KeyError: 'oops'"):
        session_on(loaded, request.node.name, policies=[Broken()]).step("t", thread())
    for wrong, name in ((None, "NoneType"), ([SpanRef(2)], "SpanRef")):
        broken = Broken()
        broken.propose = lambda ctx, wrong=wrong: wrong
        with pytest.raises(PolicyError, match=f"'broken' failed on thread 't'.*{name}"):
            session_on(loaded, request.node.name, policies=[broken]).step("t", thread())


def test_a_policy_that_is_late_or_fails_does_not_hold_the_step_up(loaded, request):
    go = threading.Event()

    class Slow(RetractionPolicy):
        name = "slow"

        def propose(self, ctx):
            assert ctx.now.tzinfo is not None
            go.wait(30)
            return [of_message(2, policy="slow")]

    class Broken(RetractionPolicy):
        name = "broken"

        def propose(self, ctx):
            raise KeyError("oops")

    class Quick(RetractionPolicy):
        name = "quick"

        def propose(self, ctx):
            return [of_message(2, policy="quick")]

    session = session_on(
        loaded, request.node.name, policies=[Slow(), Broken(), Quick()], policy_deadline_s=0.5,
        on_policy_failure="skip",
    )  # fmt: skip
    plan = session.retract("t", thread())
    go.set()
    assert {span.record.policy for span in plan.spans} == {"quick"}
    assert [(f.policy, f.kind) for f in session.policy_failures("t")] == [("slow", "late"), ("broken", "failed")]
    assert session.policy_failures("another") == ()


def test_a_span_outside_the_thread_is_refused_and_nothing_is_kept(loaded, request):
    session = session_on(loaded, request.node.name)
    with pytest.raises(SpanError, match="from 0 to 7, got 99"):
        session.retract("t", thread(), proposals=[of_message(99)])
    assert session.history("t") == []


def test_a_streaming_thread_cannot_be_edited(loaded, request):
    session = session_on(loaded, request.node.name)
    stream = session.stream("t", thread(), sampling=SamplingParams(max_tokens=30))
    next(stream)
    with pytest.raises(ThreadBusyError, match="streaming"):
        session.retract("t", thread(), proposals=[of_message(2)])
    assert session.history("t") == []
    assert not session.retract("t", thread()).spans, "nothing to do is no conflict"
    stream.close()
    assert session.retract("t", thread(), proposals=[of_message(2)]).spans


def test_streaming_equals_a_step(loaded, request):
    session = session_on(loaded, request.node.name)
    sampling = SamplingParams(max_tokens=20, logprobs=True)
    step = session.step("t", thread(), sampling=sampling)
    deltas = list(session.stream("t", thread(), sampling=sampling))
    assert "".join(d.text for d in deltas) == session.renderer.decode(list(step.token_ids))
    assert deltas[-1].result.token_ids == step.token_ids
    assert len(step.logprobs) == len(step.token_ids) == step.num_completion_tokens
    assert step.finish_reason == "length"


def test_the_pieces_of_a_stream_hold_every_token(loaded, request):
    session = session_on(loaded, request.node.name)
    for seed in range(3):
        sampling = SamplingParams(max_tokens=40, temperature=2.0, seed=seed, stop=("qq",))
        deltas = list(session.stream("t", [Message("user", "😀 日本語")], sampling=sampling))
        assert sum((d.token_ids for d in deltas), ()) == deltas[-1].result.token_ids


def test_a_stop_string_ends_the_answer(loaded, request):
    session = session_on(loaded, request.node.name)
    text = session.renderer.decode(list(session.step("t", thread(), sampling=SamplingParams(max_tokens=20)).token_ids))
    stop = text[5:8]
    step = session.step("t", thread(), sampling=SamplingParams(max_tokens=20, stop=(stop,)))
    assert step.message.content == text[: text.index(stop)]
    assert step.finish_reason == "stop"


def test_a_notice_follows_the_newest_message_and_stays_there(loaded, request):
    session = session_on(loaded, request.node.name, notify=True)
    messages = thread()
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(2)])
    more = [*messages, Message("assistant", "ok"), Message("user", "next")]
    text = session.renderer.decode([int(i) for i in session.key("t", more).ids if i >= 0])
    assert text.count("[Notice: an earlier assistant message has been withdrawn") == 1
    assert text.index("marker-7") < text.index("[Notice") < text.index("next")


def test_restore_brings_checkpointed_retractions_to_another_replica(loaded, request):
    first, second = (session_on(loaded, f"{request.node.name}-{i}") for i in range(2))
    messages = thread()
    first.step("t", messages, sampling=SHORT)
    first.retract("t", messages, proposals=[of_message(2)])
    second.restore("t", first.history("t"))
    second.restore("t", first.history("t"))
    with prefilled_texts(second) as texts:
        second.step("t", messages, sampling=SHORT)
    assert "marker-2" not in "".join(texts) and len(second.history("t")) == 1


def test_what_was_revoked_is_read_again_and_only_the_caller_may_retract_it_once_more(loaded, request):
    @dataclasses.dataclass(kw_only=True)
    class Second(RetractionPolicy):
        name = "second"

        def propose(self, ctx):
            return [of_message(2, policy="second")]

    session = session_on(loaded, request.node.name, policies=[Second()])
    messages = thread()
    (span,) = session.step("t", messages, sampling=SHORT).plan.spans
    session.ledger.set_status("t", {span.record.retraction_id: Status.REVOKED})
    with prefilled_texts(session) as texts:
        step = session.step("t", messages, sampling=SHORT)
    assert "marker-2" in "".join(texts) and not step.retraction_ids
    assert [d.why for d in step.plan.dropped] == ["revoked earlier"]
    (again,) = session.retract("t", messages, proposals=[of_message(2)]).spans
    assert again.record.retraction_id != span.record.retraction_id, "another policy: another retraction"
    session.engine.drop(session.key("t", messages), 0)
    with prefilled_texts(session) as texts:
        step = session.step("t", messages, sampling=SHORT)
    assert "marker-2" not in "".join(texts) and step.retraction_ids == (again.record.retraction_id,)


def test_a_steered_span_that_is_evicted_just_before_decoding_is_left_out(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SamplingParams(max_tokens=1))
    session.retract("t", messages, proposals=[of_message(2)])
    view_of, evicted = session._view, []

    def view_then_evict(*args):
        view = view_of(*args)
        if not evicted and session._threads.is_streaming("t"):  # as another thread does that needs the room
            evicted.append(session.engine.drop(view.key, 0))
        return view

    session._view = view_then_evict
    with prefilled_texts(session) as texts:
        step = session.step("t", messages, sampling=SHORT)
    assert evicted[0] > 0 and step.num_cached_tokens == 0
    assert "marker-2" not in "".join(texts) and "marker-3" in "".join(texts)
    assert session.history("t")[0].status is Status.EXACT


def test_of_two_equal_messages_none_comes_back_when_older_ones_are_pruned(loaded, request):
    session = session_on(loaded, request.node.name)
    twin = Message("user", "My pin is marker-twin.")
    messages = thread(4) + [twin, Message("assistant", "ok, one"), twin, *thread(3)[1:]]
    session.step("t", messages, sampling=SHORT)
    session.retract("t", messages, proposals=[of_message(6, scope=Scope.BRANCH)])
    session.retract("t", messages, proposals=[of_message(4, guarantee=Guarantee.EXACT)])
    for pruned in (messages, messages[2:], messages[3:], messages[5:]):
        session.engine.drop(session.key("t", pruned), 0)
        with prefilled_texts(session) as texts:
            step = session.step("t", pruned, sampling=SHORT)
        assert "marker-twin" not in "".join(texts)
        assert len(step.retraction_ids) == len(set(step.retraction_ids)) >= 1


def test_no_kv_that_has_read_an_exactly_retracted_text_stays(loaded, request):
    session = session_on(loaded, request.node.name)
    messages = thread()
    session.step("t", messages, sampling=SHORT)  # the decoded answer hangs behind the old path
    session.step("fork", [*messages[:6], Message("user", "another turn")], sampling=SHORT)
    old, other = session.key("t", messages), session.key("fork", messages[:6])
    start, _ = session.renderer.render(messages).interval(SpanRef(2))
    session.retract("t", messages, proposals=[of_message(2, guarantee=Guarantee.EXACT)])
    assert session.engine.cached(old) == session.engine.cached(other) == start
    session.engine.check_integrity()
