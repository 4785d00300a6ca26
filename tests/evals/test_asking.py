"""Asked threads against real decoding, and against plain forward passes of transformers without any cache."""

import math

import numpy as np
import pytest
import torch

from kv_retract.cache.keys import is_tombstone
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.erasers import ERASERS
from kv_retract.evals.asking import AskedThread, divergence
from kv_retract.ledger.render import Renderer
from kv_retract.planner import Planner
from kv_retract.session import KVRetractSession
from kv_retract.training.encoding import RowEncoder
from kv_retract.types import Guarantee, Message, Retraction, SamplingParams, Status

SPAN = "needle-0"


class World:
    """A model with its engine and renderer, and a trace."""

    def __init__(self, name, sample):
        loaded = load_model(str(name))
        self.model, self.sample = loaded.model, sample
        self.engine, self.renderer = HFEngine(loaded.model, max_tokens=8192), Renderer(loaded.tokenizer)
        self.encoder = RowEncoder(loaded.tokenizer)

    def thread(self, eraser="none", name=None, retract=(SPAN,)):
        eraser = ERASERS.create(eraser) if isinstance(eraser, str) else eraser
        thread = AskedThread(self.sample, eraser, self.engine, self.renderer, name or eraser.eraser_id)
        thread.prefill()
        if retract:
            thread.retract(retract)
        return thread

    def plain(self, question, answer, gone=None):
        """Log-probabilities of an answer's tokens in one forward pass of transformers on a thread without a span."""
        ids, tokens_of = self.encoder.thread(self.sample)
        start, end = tokens_of(self.sample.span(gone).ref) if gone else (0, 0)
        asked, told = self.encoder.probe(question, answer)
        told = told[:-1]  # the line break behind the end of the turn is no part of the answer
        told_by_the_end = [ids[:start], ids[end:], asked, told]
        with torch.inference_mode():
            logits = self.model(input_ids=torch.from_numpy(np.concatenate(told_by_the_end))[None]).logits[0]
        return logits[-len(told) - 1 : -1].log_softmax(-1), told


@pytest.fixture(scope="module")
def learnt(learnt_model, trace_of):
    return World(learnt_model, trace_of(0))


@pytest.fixture(scope="module")
def random(trace_of):
    return World("random", trace_of(0))


@pytest.fixture
def make(learnt, make_eraser, learnt_model):
    """An eraser by name; `blind` stands for a learned one with random weights."""

    def make(name):
        path = {"path": str(make_eraser(name, learnt_model))} if name == "blind" else {}
        return ERASERS.create("kveraser" if path else name, **path)

    return make


# -- what greedy decoding says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eraser", ["none", "mask", "shift", "recompute", "blind"])
def test_says_is_what_decoding_says(learnt, make, eraser):
    """A session with the same retraction decodes the answers; candidates differ in one word, or in the end."""
    sample, eraser = learnt.sample, make(eraser)
    thread = learnt.thread(eraser, "asked")
    planner = Planner(exact_suffix=0, protect_newest_user=False)
    session = KVRetractSession(learnt.engine, learnt.renderer, eraser=eraser, planner=planner, extra_key="session")
    learnt.engine.extend(session.key("s", sample.messages, add_generation_prompt=False))
    retraction = Retraction(span=sample.span(SPAN).ref, policy="explicit", reason="of a test")
    session.retract("s", sample.messages, proposals=[retraction])
    found = []
    for probe in sample.probes:
        asked = [*sample.messages, Message("user", probe.question)]
        step = session.step("s", asked, sampling=SamplingParams(max_tokens=40))
        given, ended = step.message.content, step.finish_reason == "stop"
        candidates = {probe.answer, probe.answer_without(SPAN), "I do not.", probe.answer[:-1], given}
        for candidate in candidates - {""}:
            says, likelihood = thread.says(probe.question, candidate)
            assert says == (ended and candidate == given), (candidate, given)
            assert math.isfinite(likelihood) and likelihood < 0
            found.append(says)
    assert not all(found)
    if eraser.name in ("none", "recompute"):
        assert sum(found) == len(sample.probes), "the model knows these answers"


@pytest.mark.parametrize("eraser", ["none", "mask", "recompute"])
def test_one_pass_finds_every_token_that_decoding_picks(random, eraser):
    """On a model that babbles, where nearly even choices are many."""
    thread = random.thread(eraser)
    for probe in random.sample.probes:
        key = thread.asked(probe.question)
        ids = np.array([token.id for token in random.engine.generate(key, SamplingParams(max_tokens=48))])
        logs = thread.log_probabilities(key, ids)
        assert logs.shape == (48, random.model.config.vocab_size) and logs.dtype == torch.float32
        assert logs.argmax(-1).tolist() == ids.tolist()
        assert torch.allclose(logs.exp().sum(-1), torch.ones(48), atol=1e-5)
        assert torch.allclose(thread.log_probabilities(key, ids[:1]), logs[:1], atol=1e-4)


def test_what_the_model_knows_with_and_without_the_span(learnt):
    probe = next(p for p in learnt.sample.probes if SPAN in p.without)
    for eraser, wanted in (("none", probe.answer), ("recompute", probe.answer_without(SPAN))):
        thread = learnt.thread(eraser)
        said = {a for a in (probe.answer, probe.answer_without(SPAN)) if thread.says(probe.question, a)[0]}
        assert said == {wanted}


@pytest.mark.parametrize("model", ["learnt", "random"])
@pytest.mark.parametrize(("eraser", "gone"), [("none", None), ("recompute", SPAN)])
def test_log_likelihoods_are_those_of_a_plain_forward_pass(request, model, eraser, gone):
    world = request.getfixturevalue(model)
    thread = world.thread(eraser)
    for probe in world.sample.probes:
        for answer in (probe.answer, probe.answer_without(SPAN), "Some of it."):
            logs, told = world.plain(probe.question, answer, gone)
            says, likelihood = thread.says(probe.question, answer)
            assert likelihood == pytest.approx(sum(float(logs[i, t]) for i, t in enumerate(told)), abs=2e-3)
            assert says == (logs.argmax(-1).tolist() == told.tolist())
            mine = thread.log_probabilities(thread.asked(probe.question), told)
            assert (mine - logs).abs().max() < 1e-3


def test_asked_ends_where_the_answer_begins(random):
    thread, probe = random.thread(retract=()), random.sample.probes[0]
    ids = random.encoder.thread(random.sample)[0]
    asked = random.encoder.probe(probe.question, "x")[0]
    assert thread.asked(probe.question).ids.tolist() == [*ids, *asked]
    assert thread.prefill() == len(ids)


# -- retracting -----------------------------------------------------------------------------------------------------


def test_retract_tells_where_and_what_it_cost(random):
    ids, tokens_of = random.encoder.thread(random.sample)
    start, end = tokens_of(random.sample.span(SPAN).ref)
    for eraser, recomputed, exact in (("mask", 0, False), ("recompute", len(ids) - end, True)):
        thread = random.thread(eraser, f"told {eraser}", retract=())
        plan, erased = thread.retract([SPAN])
        assert [(s.start, s.end, s.exact) for s in plan.spans] == [(start, end, exact)]
        assert (erased.tokens_erased, erased.tokens_recomputed, erased.exact) == (end - start, recomputed, exact)
        assert erased.edit_ms > 0 and plan.spans[0].record.span == random.sample.span(SPAN).ref
        kept = thread.asked("?").ids
        assert is_tombstone(kept[start:end]).all() != exact and len(kept) >= len(ids) - (end - start) * exact


def test_several_spans_go_together(random):
    both = [span.span_id for span in random.sample.spans]
    thread = random.thread("mask", "both", retract=())
    plan, erased = thread.retract(both)
    tokens_of = random.encoder.thread(random.sample)[1]
    assert [(s.start, s.end) for s in plan.spans] == [tokens_of(random.sample.span(i).ref) for i in both]
    assert erased.tokens_erased == sum(s.end - s.start for s in plan.spans)


def test_a_guarantee_is_passed_on(random):
    thread = random.thread("mask", "guarantee", retract=())
    plan, erased = thread.retract([SPAN], Guarantee.EXACT)
    assert erased.exact and plan.spans[0].record.status is Status.EXACT
    ids, tokens_of = random.encoder.thread(random.sample)
    start, end = tokens_of(random.sample.span(SPAN).ref)
    assert thread.prefill() == len(ids) - (end - start)
    assert not is_tombstone(thread.asked("?").ids).any()


def test_what_cannot_be_retracted_is_an_error_of_ours(random):
    thread = random.thread("mask", "twice")
    with pytest.raises(AssertionError, match="the planner takes them"):
        thread.retract([SPAN])
    with pytest.raises(KeyError, match="nope"):
        thread.retract(["nope"])


# -- side by side, and closed ---------------------------------------------------------------------------------------


def test_threads_of_two_names_share_nothing(random):
    plain = random.thread("none", "a", retract=())
    probe = random.sample.probes[0]
    before = plain.log_probabilities(plain.asked(probe.question), np.array([5]))
    other = random.thread("mask", "b")
    after = other.log_probabilities(other.asked(probe.question), np.array([5]))
    again = plain.log_probabilities(plain.asked(probe.question), np.array([5]))
    assert torch.allclose(before, again, atol=1e-5) and (after - again).abs().max() > 0.1


@pytest.mark.parametrize("eraser", ["none", "mask", "recompute", "blind"])
def test_close_frees_whatever_the_thread_held(learnt, make, eraser):
    engine = HFEngine(learnt.model, max_tokens=4096)
    other = AskedThread(learnt.sample, ERASERS.create("none"), engine, learnt.renderer, "other")
    length = other.prefill()
    thread = AskedThread(learnt.sample, make(eraser), engine, learnt.renderer, "mine")
    thread.prefill()
    thread.retract([SPAN])
    for probe in learnt.sample.probes:
        thread.says(probe.question, probe.answer)
    list(engine.generate(thread.asked("Who?"), SamplingParams(max_tokens=8)))
    assert engine.tokens_in_use() > length + 50
    thread.close()
    engine.check_integrity()
    assert engine.tokens_in_use() == length, "questions and answers are gone too, and other threads stay"
    other.close()
    assert engine.tokens_in_use() == 0
    other.close()


# -- divergence -----------------------------------------------------------------------------------------------------


def test_divergence_is_the_naive_sum():
    generator = torch.Generator().manual_seed(0)
    expected, found = (torch.randn(5, 3, generator=generator).log_softmax(-1) for _ in range(2))
    kl = sum(
        math.exp(float(p)) * (float(p) - float(q))
        for row, other in zip(expected, found, strict=True) for p, q in zip(row, other, strict=True)
    )  # fmt: skip
    agree = [int(row.argmax() == other.argmax()) for row, other in zip(expected, found, strict=True)]
    assert 0 < sum(agree) < 5
    assert divergence(expected, found) == pytest.approx((kl / 5, sum(agree) / 5), rel=1e-5)
    assert divergence(expected, found)[0] != pytest.approx(divergence(found, expected)[0], rel=1e-2)


def test_divergence_by_hand():
    expected, found = (torch.tensor([row]).log() for row in ([0.5, 0.5], [0.9, 0.1]))
    assert divergence(expected, found)[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    two = torch.cat([found, found.flip(1)])
    assert divergence(two, torch.cat([found, found]))[1] == 0.5
    assert divergence(found, found) == (0.0, 1.0)


def test_divergence_is_never_below_zero():
    logs = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    assert divergence(logs, logs + 1e-3)[0] == 0.0, "probabilities whose sum is rounded up"
