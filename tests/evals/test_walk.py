"""Walks of single traces: what is in the cache before and after, and which edits count as the eraser's own."""

from dataclasses import replace

import pytest

from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.evals.arms import Arm
from kv_retract.evals.specs import Spec
from kv_retract.evals.walk import Walker
from kv_retract.ledger.render import Renderer
from kv_retract.policies import Explicit, ToolErrorRecovered
from kv_retract.trace import Trace
from kv_retract.trace.chat import messages_from_chat
from kv_retract.types import Guarantee


@pytest.fixture(scope="module")
def loaded():
    return load_model("random")


@pytest.fixture
def make_walker(loaded):
    def make(policies=(), arms=("mask", "recompute"), pool=4096, max_context=1000, score_tokens=8):
        engine, renderer = HFEngine(loaded.model, max_tokens=pool), Renderer(loaded.tokenizer)
        policies = policies or [ToolErrorRecovered()]
        made = [Arm(Spec(name), engine, renderer) for name in arms]
        walker = Walker(made, renderer, policies, max_context=max_context, score_tokens=score_tokens)
        return walker, engine

    return make


@pytest.fixture
def trace(chat):
    return Trace(trace_id="t", messages=tuple(messages_from_chat(chat())), source="t:1", format="openai")


def test_a_walk_leaves_an_empty_cache(make_walker, trace):
    walker, engine = make_walker(arms=("none", "mask", "shift", "repair", "selective", "erratum", "recompute"))
    outcome = walker.walk(trace, "0-t")
    assert (outcome.num_steps, outcome.problem, len(outcome.samples)) == (4, "", 7)
    assert engine.tokens_in_use() == 0
    engine.check_integrity()


def test_the_sample_of_one_edit(make_walker, trace):
    walker, _ = make_walker()
    mask, exact = walker.walk(trace, "0-t").samples
    assert (mask.arm, exact.arm) == ("mask", "recompute")
    for sample in (mask, exact):
        assert (sample.trace_id, sample.source, sample.step, sample.policies) == ("t", "t:1", 6, ("tool_error",))
        assert sample.own_edit and sample.tokens_scored == 8
    # Cached were the messages up to the agent's newest, and of them what stands behind the span was recomputed.
    assert exact.tokens_recomputed == exact.suffix_tokens == mask.suffix_tokens > 0
    assert mask.cached_tokens == exact.cached_tokens + exact.tokens_erased
    assert mask.prefilled_tokens == exact.prefilled_tokens < mask.context_tokens


def test_a_reference_is_needed(make_walker):
    with pytest.raises(ValueError, match="expected the arm 'recompute' among the arms, got .'mask'"):
        make_walker(arms=("mask",))


def test_edits_accumulate(make_walker, trace):
    messages = list(trace.messages)
    messages += [*messages[1:7], replace(messages[6], content="Second answer.")]
    walker, _ = make_walker()
    outcome = walker.walk(replace(trace, messages=tuple(messages)), "0-t")
    assert [(s.step, s.excerpt.message) for s in outcome.retracted] == [(6, 3), (14, 11)]
    first, second = (s for s in outcome.samples if s.arm == "recompute")
    assert first.tokens_erased == second.tokens_erased
    last = [s for s in outcome.samples if s.arm == "mask"][-1]
    assert last.cached_tokens - second.cached_tokens == first.tokens_erased + second.tokens_erased


def test_what_the_planner_had_recomputed_is_not_the_erasers_own(make_walker, trace):
    walker, _ = make_walker([ToolErrorRecovered(guarantee=Guarantee.EXACT)])
    mask, exact = walker.walk(trace, "0-t").samples
    assert not mask.own_edit and mask.tokens_recomputed == exact.tokens_recomputed > 0
    assert mask.kl == pytest.approx(0, abs=1e-9)


def test_what_was_not_cached_yet_is_no_edit(make_walker, trace):
    walker, _ = make_walker([Explicit(match="440}")])
    mask, exact = walker.walk(trace, "0-t").samples
    assert (mask.step, mask.own_edit, exact.own_edit) == (6, False, False)
    assert mask.edit_ms is None and mask.tokens_recomputed == 0 and mask.kl == pytest.approx(0, abs=1e-9)


def test_an_edit_that_found_no_room_is_not_the_erasers_own(make_walker, trace, monkeypatch):
    from kv_retract.erasers import MaskEraser
    from kv_retract.errors import PoolExhaustedError

    def full(self, view):
        raise PoolExhaustedError("no room for the copies")

    monkeypatch.setattr(MaskEraser, "erase", full)
    walker, _ = make_walker()
    mask, exact = walker.walk(trace, "0-t").samples
    assert not mask.own_edit and exact.own_edit and mask.kl == pytest.approx(0, abs=1e-9)


def test_a_span_of_a_protected_message_is_tried_again_later(make_walker, trace):
    walker, _ = make_walker([Explicit(match="flight")])
    outcome = walker.walk(trace, "0-t")
    # Message 1 is the newest of the user until message 7.
    assert [(s.step, s.excerpt.message) for s in outcome.retracted] == [(8, 1)]
    assert {s.step for s in outcome.samples} == {8}


def test_an_answer_without_a_token_to_score(make_walker, trace, monkeypatch):
    walker, engine = make_walker()
    monkeypatch.setattr(walker, "_continuation", lambda trace, step: walker._renderer.render(trace.messages).ids[:0])
    samples = walker.walk(trace, "0-t").samples
    assert [(s.tokens_scored, s.kl, s.top1) for s in samples] == [(0, None, None)] * 2
    assert engine.tokens_in_use() == 0


def test_a_generation_prompt_that_past_turns_do_not_have(loaded, trace, make_walker, monkeypatch):
    template = loaded.tokenizer.chat_template
    other = template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    assert other != template
    monkeypatch.setattr(loaded.tokenizer, "chat_template", other)
    walker, _ = make_walker(score_tokens=1000)
    outcome = walker.walk(trace, "0-t")
    answer = loaded.tokenizer.encode(trace.messages[6].content, add_special_tokens=False)
    assert outcome.problem == "" and [s.tokens_scored for s in outcome.samples] == [len(answer)] * 2
    assert outcome.samples[0].kl > 0 and outcome.samples[0].own_edit


def test_a_trace_too_long_for_the_pool_is_a_problem(make_walker, trace):
    walker, engine = make_walker(pool=128)
    outcome = walker.walk(trace, "0-t")
    assert outcome.num_steps == 2 and outcome.problem.startswith("step 3: ") and not outcome.samples
    assert engine.tokens_in_use() == 0
    engine.check_integrity()
