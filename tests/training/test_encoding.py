"""Rows of training against their slow exact twin, the renderer with the chat template, and a loop over every cell."""

import random

import numpy as np
import pytest

from kv_retract.ledger.render import Renderer
from kv_retract.training.encoding import Row, choose_spans, thread_text
from kv_retract.training.families import FAMILIES
from kv_retract.training.samples import UNKNOWN
from kv_retract.types import Message, ToolCall

SPLITS = [(f, s) for f in FAMILIES.names() for s in ("train", "test") if (f, s) != ("documents", "train")]
each_case = pytest.mark.parametrize(("family", "split"), SPLITS)
each_family = pytest.mark.parametrize("family", FAMILIES.names())


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def rendered(renderer, sample, more=(), *, tools=True):
    tools = sample.tools or None if tools else None
    return renderer.render([*sample.messages, *more], tools=tools, add_generation_prompt=False)


def dialogue(probes, span_id=None):
    return [
        m for p in probes for m in (Message("user", p.question), Message("assistant", p.answer_without(span_id)))
    ]  # fmt: skip


# -- the thread -----------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("tools", [True, False])
def test_a_thread_has_the_ids_of_its_rendering(make, encoder, renderer, family, split, tools):
    for seed in range(6):
        sample = make(family, seed, length=100 + 150 * seed, split=split)
        row = encoder.encode(sample, [], with_tools=tools)
        assert row.ids.tolist() == rendered(renderer, sample, tools=tools).ids.tolist()
        assert not row.answer.any() and (row.probe == -1).all() and row.hidden == ()


def test_a_long_thread(make, encoder, renderer):
    sample = make("injections", length=8000)
    assert encoder.encode(sample, []).ids.tolist() == rendered(renderer, sample).ids.tolist()


def test_forms_that_no_family_writes(renderer):
    call, other = ToolCall("1", "f", '{"a": "é\\n東"}'), ToolCall("2", 'g"x', "not json")
    messages = [
        Message("system", ""),
        Message("user", "Ünïcödé 🙂\n\n  spaces "),
        Message("assistant", "First.", tool_calls=(call, other)),
        Message("tool", "", tool_call_id="1"),
        Message("tool", "x", tool_call_id="2"),
        Message("assistant", tool_calls=(call, call)),
    ]
    for tools in ((), ({"type": "function", "function": {"name": "f", "description": "für"}},)):
        text, at = thread_text(messages, tools)
        assert text == renderer.render(messages, tools=tools or None, add_generation_prompt=False).text
        assert all(text[start:].startswith(m.content) for start, m in zip(at, messages, strict=True))


def test_length(encoder, tokenizer):
    for text in ("", "a", "The owner of order Kelbrin is Tarsden Molvik.", '{"gate": "Marden-31"}'):
        assert encoder.length(text) == len(tokenizer(text, add_special_tokens=False)["input_ids"])


# -- probes ---------------------------------------------------------------------------------------------------------


@each_case
def test_a_row_with_probes_is_the_rendering_of_the_longer_thread(make, encoder, renderer, family, split):
    for seed in range(4):
        sample = make(family, seed, length=200, split=split)
        row = encoder.encode(sample, sample.probes)
        thread = rendered(renderer, sample)
        assert row.ids.tolist() == rendered(renderer, sample, dialogue(sample.probes)).ids.tolist()
        assert (row.probe[: len(thread.ids)] == -1).all() and not row.answer[: len(thread.ids)].any()
        for number, probe in enumerate(sample.probes):
            mine = row.probe == number
            assert renderer.tokenizer.decode(row.ids[mine & row.answer]) == f"{probe.answer}<|im_end|>\n"
            asked = f"<|im_start|>user\n{probe.question}<|im_end|>\n<|im_start|>assistant\n"
            assert renderer.tokenizer.decode(row.ids[mine & ~row.answer]) == asked
        assert (np.diff(row.probe) >= 0).all() and row.probe.max() == len(sample.probes) - 1


# -- spans ----------------------------------------------------------------------------------------------------------


@each_case
def test_removed_spans_are_the_tokens_of_their_interval(make, encoder, renderer, family, split):
    for seed in range(4):
        sample = make(family, seed, length=200, split=split)
        thread = rendered(renderer, sample)
        for span in sample.spans:
            start, end = thread.interval(span.ref)
            row = encoder.encode(sample, sample.probes, removed=[span.span_id])
            longer = rendered(renderer, sample, dialogue(sample.probes, span.span_id)).ids
            assert row.ids.tolist() == [*longer[:start], *longer[end:]]
            assert int((row.probe == -1).sum()) == len(thread.ids) - (end - start)


@each_case
def test_hidden_spans_are_the_tokens_of_their_interval(make, encoder, renderer, family, split):
    for seed in range(4):
        sample = make(family, seed, length=200, split=split)
        thread = rendered(renderer, sample)
        hidden = {span.span_id for span in sample.spans}
        row = encoder.encode(sample, sample.probes, hidden=hidden)
        assert row.ids.tolist() == encoder.encode(sample, sample.probes).ids.tolist(), "answered as if they were seen"
        want = [
            (number, thread.interval(sample.span(span_id).ref))
            for number, probe in enumerate(sample.probes)
            for span_id in probe.without
        ]
        assert sorted(row.hidden) == sorted(want)


def test_hidden_spans_move_with_what_is_removed_before_them(make, encoder, renderer):
    sample = make("facts", length=200)
    thread = rendered(renderer, sample)
    gone, hidden = sample.spans[0], sample.spans[-1]
    size = np.diff(thread.interval(gone.ref))[0]
    row = encoder.encode(sample, sample.probes, removed=[gone.span_id], hidden=[hidden.span_id])
    start, end = thread.interval(hidden.ref)
    assert [interval for _, interval in row.hidden] == [(start - size, end - size)]
    assert row.ids[start - size : end - size].tolist() == thread.ids[start:end].tolist()


def test_all_removed(make, encoder, renderer):
    sample = make("needles", length=200, size=8)
    thread, removed = rendered(renderer, sample), [span.span_id for span in sample.spans]
    keep = np.ones(len(thread.ids), bool)
    for span in sample.spans:
        keep[slice(*thread.interval(span.ref))] = False
    row = encoder.encode(sample, sample.probes, removed=removed)
    assert row.ids[row.probe == -1].tolist() == thread.ids[keep].tolist()
    assert renderer.tokenizer.decode(row.ids[row.answer]) == f"{UNKNOWN}<|im_end|>\n" * len(sample.probes)


@each_case
def test_from_notes_alone_a_probe_sees_later_mentions_and_the_system_message(make, encoder, renderer, family, split):
    for seed in range(4):
        sample = make(family, seed, length=200, split=split, mentions=1.0)
        hidden = [s.span_id for s in sample.spans]
        row = encoder.encode(sample, sample.probes, hidden=hidden, notes_only=True, with_tools=False)
        seen = row.visible()
        for number, probe in enumerate(sample.probes):
            thread = seen[np.flatnonzero(row.probe == number)[-1]][: int((row.probe == -1).sum())]
            if not probe.without:
                assert thread.all()
                continue
            spans = [sample.span(span_id) for span_id in probe.without]
            if not all(span.subject for span in spans):
                continue  # an injection that concerns everything: whatever follows can hold notes
            text = renderer.tokenizer.decode(row.ids[: len(thread)][thread])
            notes = sample.messages[0].content
            for i, message in enumerate(sample.messages):
                later = [s for s in spans if i > s.ref.message and s.subject in message.content]
                notes += message.content if later and i not in {s.ref.message for s in spans} else ""
            assert text.replace("<|im_end|>\n", "").replace("\n</tool_response>", "") == notes


# -- who sees whom --------------------------------------------------------------------------------------------------


def slowly_visible(row):
    n = len(row.ids)
    seen = np.zeros((n, n), bool)
    for query in range(n):
        for key in range(query + 1):
            blind = any(row.probe[query] == p and start <= key < end for p, (start, end) in row.hidden)
            seen[query, key] = not blind and row.probe[key] in (-1, row.probe[query])
    return seen


def test_visible_of_a_row_by_hand():
    row = Row(np.arange(7), np.zeros(7, bool), np.array([-1, -1, -1, 0, 0, 1, 1]), ((1, (1, 2)),))
    assert row.visible().astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1, 1],
    ]


@each_family
def test_visible_equals_a_loop_over_every_cell(make, encoder, family):
    sample = make(family, length=64, size=3)
    for hidden in ((), [s.span_id for s in sample.spans]):
        row = encoder.encode(sample, sample.probes[:3], hidden=hidden, with_tools=False)
        assert bool(row.hidden) == bool(hidden)
        assert np.array_equal(row.visible(), slowly_visible(row))


# -- which spans go together ----------------------------------------------------------------------------------------


@each_family
def test_no_probe_is_affected_by_two_chosen_spans(make, family):
    several = 0
    for seed in range(15):
        sample = make(family, seed, length=128, size=8)
        for share in (0.25, 1.0):
            chosen = choose_spans(sample, random.Random(seed), share=share)
            assert chosen <= {s.span_id for s in sample.spans}
            assert all(len(chosen & set(p.without)) <= 1 for p in sample.probes)
            several += len(chosen) > 1
        assert chosen, "of all spans at least one"
        assert choose_spans(sample, random.Random(seed), share=0.0) == set()
    assert several or family == "injections"


def test_chosen_spans_are_the_same_for_the_same_chance(make):
    sample = make("facts", size=8)
    first, again, other = (choose_spans(sample, random.Random(seed), share=0.5) for seed in (1, 1, 2))
    assert first == again != other


def test_a_span_that_nothing_depends_on_is_not_chosen(make):
    for seed in range(20):
        sample = make("updates", seed, length=128)
        affecting = {span_id for probe in sample.probes for span_id in probe.without}
        assert choose_spans(sample, random.Random(0), share=1.0) == affecting
