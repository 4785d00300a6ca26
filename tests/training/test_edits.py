"""Threads with spans to be erased: the right tokens, the right answers, the right view of the thread."""

import random

import numpy as np
import pytest

from kv_retract.training.corpus import training_families
from kv_retract.training.edits import EditRow, Query, edit_of_sample, edit_of_text
from kv_retract.training.encoding import choose_spans, thread_text

each_family = pytest.mark.parametrize("family", training_families())


def of_sample(make, encoder, family, seed, *, with_tools=False):
    sample = make(family, seed, length=300)
    rng = random.Random(seed)
    spans = choose_spans(sample, rng, share=1.0)
    probes = [p for p in sample.probes if len(spans & set(p.without)) <= 1]
    return sample, spans, probes, edit_of_sample(encoder, sample, probes, spans, with_tools=with_tools)


@each_family
def test_spans_and_queries_say_what_the_sample_says(make, encoder, tokenizer, family):
    for seed in range(5):
        sample, spans, probes, row = of_sample(make, encoder, family, seed)
        assert tokenizer.decode(row.thread) == thread_text(sample.messages)[0]
        assert len(row.spans) == len(spans) and list(row.spans) == sorted(row.spans)
        texts = {s.span_id: s.ref for s in sample.spans if s.span_id in spans}
        contents = [
            sample.messages[ref.message].content[ref.start : ref.end]
            for ref in sorted(texts.values(), key=lambda ref: (ref.message, ref.start))
        ]
        for (start, end), content in zip(row.spans, contents, strict=True):
            assert content.strip() in tokenizer.decode(row.thread[start:end])
            assert end - start <= encoder.length(content) + 2
        for probe, query in zip(probes, row.queries, strict=True):
            hit = spans & set(probe.without)
            answer = probe.answer_without(next(iter(hit), None))
            assert tokenizer.decode(query.ids[query.first :]) == f"{answer}<|im_end|>\n"
            assert probe.question in tokenizer.decode(query.ids[: query.first])
            assert query.kind == ("affected" if hit else "unaffected") and query.sees == len(row.thread)
            if hit:
                assert tokenizer.decode(query.lost) == f"{probe.answer}<|im_end|>\n"
            else:
                assert query.lost is None


@each_family
def test_the_thread_without_spans_is_what_training_removes(make, encoder, family):
    for seed in range(3):
        sample, spans, _, row = of_sample(make, encoder, family, seed, with_tools=True)
        assert np.array_equal(row.without_spans(), encoder.encode(sample, [], removed=spans).ids)


def test_what_stands_before_a_query():
    row = EditRow(np.arange(20), ((3, 5), (8, 9)), ())
    assert row.span_index.tolist() == [3, 4, 8] and row.without_spans().tolist() == [*range(3), 5, 6, 7, *range(9, 20)]
    for sees, left in ((2, 2), (3, 3), (4, 3), (5, 3), (8, 6), (9, 6), (20, 17)):
        query = Query("neighbor", np.arange(4), 1, sees)
        assert row.sees_without_spans(query) == left == int((np.delete(np.arange(20), [3, 4, 8]) < sees).sum())


@pytest.mark.parametrize("length", [144, 200, 1000])
def test_random_spans_of_a_text(length):
    """Token 17 of the text is 17: what is asked shows where it stood."""
    text, lengths, starts = np.arange(length), set(), set()
    for seed in range(300):
        row = edit_of_text(text, random.Random(seed))
        assert 1 <= len(row.spans) <= 3
        for (start, end), (after, _) in zip(row.spans, [*row.spans[1:], (length, 0)], strict=True):
            assert 0 <= start < end < after and end < length - 48
            lengths.add(end - start)
            starts.add(start)
        first, *others = row.queries
        assert first.kind == "continuation" and first.ids.tolist() == list(range(length - 49, length))
        assert first.sees == len(row.thread) - 1 == length - 49
        borders = [*(start for start, _ in row.spans[1:]), len(row.thread)]
        behind = [(end, min(end + 48, stop)) for (_, end), stop in zip(row.spans, borders, strict=True)]
        assert [(q.kind, q.sees, *q.ids) for q in others] == [
            ("neighbor", end, *range(end, stop)) for end, stop in behind if stop - end > 1
        ]
        assert all(q.first == 1 and q.lost is None for q in row.queries)
    most = min(512, (length - 48) // 8)
    assert min(lengths) == 1 and most - 4 <= max(lengths) <= most and min(starts) < 9
    assert sum(n <= 8 for n in lengths) >= 7, "short spans are as likely as long ones"


def test_turns_of_a_text_are_spans_half_of_the_time():
    """Token 1 begins and ends turns; a turn of 3 tokens is too short, one of 400 too long."""
    turns = [20, 3, 400, 60, 40]
    text = np.concatenate([[1], *(np.append(np.arange(size) + 10, 1) for size in turns), np.arange(200) + 500])
    ends = np.cumsum(np.array(turns) + 1)
    whole = {(int(end) - size, int(end)) for end, size in zip(ends, turns, strict=True)}
    assert all((text[start - 1], text[end]) == (1, 1) for start, end in whole)
    found = [span for seed in range(400) for span in edit_of_text(text, random.Random(seed), marks={1}).spans]
    drawn = {span: found.count(span) for span in whole}
    fits = {span for span in whole if 4 <= span[1] - span[0] <= (len(text) - 48) // 3}
    assert len(fits) == 3 and all(drawn[span] > 0.1 * len(found) for span in fits), drawn
    assert all(drawn[span] <= 2 for span in whole - fits)
    assert 0.35 < sum(drawn.values()) / len(found) < 0.65
    plain = [span for seed in range(400) for span in edit_of_text(text, random.Random(seed)).spans]
    assert sum(span in whole for span in plain) <= 4, "without marks, spans are random pieces"


@each_family
def test_the_marks_of_a_tokenizer_stand_around_every_turn(make, encoder, tokenizer, family):
    sample = make(family, 0, length=300)
    ids, _ = encoder.thread(sample)
    running = [i for i in ids.tolist() if i not in encoder.marks]
    assert "<|im_start|>" not in tokenizer.decode(running) and "<tool_response>" not in tokenizer.decode(running)
    assert encoder.marks >= {*tokenizer.all_special_ids, *tokenizer.encode("<tool_response></tool_response>")}


def test_the_same_chance_gives_the_same_spans():
    rows = [edit_of_text(np.arange(400), random.Random(3)).spans for _ in range(2)]
    assert rows[0] == rows[1] != edit_of_text(np.arange(400), random.Random(4)).spans


def test_a_text_may_be_too_short():
    with pytest.raises(ValueError, match="at least 144 tokens, got 143"):
        edit_of_text(np.arange(143), random.Random(0))
