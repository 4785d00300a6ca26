"""The corpus: the same for the same seed, its answers follow from its text, nothing leaks, splits are disjoint."""

import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from kv_retract.errors import UnknownNameError
from kv_retract.trace import read_traces
from kv_retract.training import names, templates
from kv_retract.training.corpus import CorpusError, generate, rough_length, samples, training_families
from kv_retract.training.families import FAMILIES, HELD_OUT
from kv_retract.training.names import FIRST, SIZE, Names, split_of
from kv_retract.training.samples import UNKNOWN, CorpusSample

spec = spec_from_file_location("reader", Path(__file__).with_name("reader.py"))  # tests are no package
reader = module_from_spec(spec)
spec.loader.exec_module(reader)

CASES = [(f, s) for f in FAMILIES.names() for s in ("train", "test") if (f, s) != (HELD_OUT, "train")]
LENGTHS = ((128, 150), (512, 60), (1024, 30), (2048, 12), (4096, 6))
"""Tokens of a trace, and how many seeds."""
_SYLLABLE = rf"(?:{'|'.join(names._ONSETS)})[aeiou][lnrs]"
WORD = re.compile(rf"\b(?:{_SYLLABLE}-\d\d|{_SYLLABLE}[aeiou]?(?:{'|'.join(names._ENDINGS)})|{_SYLLABLE})\b(?!-)")
"""A name of the corpus: a code, a word, or a tag."""
TWO_HOPS = ("relations", "documents")

each_case = pytest.mark.parametrize(("family", "split"), CASES)
each_family = pytest.mark.parametrize("family", FAMILIES.names())


@pytest.fixture(scope="module")
def many():
    """Hundreds of traces of one family and split, of all lengths; drawn once."""
    drawn = {}

    def many(family, split):
        if (family, split) not in drawn:
            drawn[family, split] = [
                generate(family, seed=seed, length=length, split=split, mentions=(0.0, 0.7, 1.0)[seed % 3])
                for length, seeds in LENGTHS
                for seed in range(seeds)
            ]
        return drawn[family, split]

    return many


# -- the same for the same seed -------------------------------------------------------------------------------------


def digest(sample):
    return sha256(json.dumps(sample.to_json()).encode()).hexdigest()


def drawn():
    return [digest(generate(f, seed=seed, length=300, split=s)) for f, s in CASES for seed in range(3)]


def test_the_same_arguments_give_the_same_trace():
    first = drawn()
    assert drawn() == first and len(set(first)) == len(first)


@pytest.mark.parametrize("hash_seed", ["1", "77"])
def test_another_process_gives_the_same_trace(hash_seed):
    code = f"""
        import json
        from hashlib import sha256
        from kv_retract.training.corpus import generate
        for family, split in {CASES!r}:
            for seed in range(3):
                line = json.dumps(generate(family, seed=seed, length=300, split=split).to_json())
                print(sha256(line.encode()).hexdigest())
    """
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    program = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == drawn()


@each_family
def test_arguments_change_the_trace(family):
    base = {"seed": 3, "length": 400, "split": "test", "size": 6, "mentions": 1.0}
    variants = [{}, {"seed": 4}, {"length": 900}, {"size": 12}, {"mentions": 0.0}]
    variants += [{"split": "train"}] if family != HELD_OUT else []
    found = [tuple(generate(family, **{**base, **change}).messages) for change in variants]
    assert len(set(found)) == len(found)


# -- spans and answers ----------------------------------------------------------------------------------------------


@each_case
def test_spans_and_probes_are_well_formed(many, family, split):
    for sample in many(family, split):
        ids = [span.span_id for span in sample.spans]
        assert ids and len(set(ids)) == len(ids)
        taken = set()
        for span in sample.spans:
            content = sample.messages[span.ref.message].content
            end = len(content) if span.ref.end is None else span.ref.end
            assert 0 <= span.ref.start < end <= len(content)
            place = {(span.ref.message, i) for i in range(span.ref.start, end)}
            assert not place & taken, "spans of a sample do not overlap"
            taken |= place
        assert sample.probes and any(probe.without for probe in sample.probes)
        assert len({probe.question for probe in sample.probes}) == len(sample.probes)
        for probe in sample.probes:
            assert set(probe.without) <= set(ids) and probe.answer not in probe.without.values()


@each_case
def test_answers_are_what_the_remaining_text_says(many, family, split):
    """With every span, and without any single one, those included that must not affect an answer."""
    for sample in many(family, split):
        for span_id in (None, *(span.span_id for span in sample.spans)):
            reads = reader.Reader(sample.messages if span_id is None else sample.without(span_id))
            for probe in sample.probes:
                assert reads.answer(probe.question) == probe.answer_without(span_id), (sample.sample_id, span_id)


def lost(probe, span_id):
    """Names in an answer that neither the question nor the answer without the span has: what must not leak."""
    return set(WORD.findall(probe.answer)) - set(WORD.findall(f"{probe.question} {probe.without[span_id]}"))


@each_case
def test_a_lost_value_is_nowhere_else(many, family, split):
    seen = 0
    for sample in many(family, split):
        for probe in sample.probes:
            left = list(sample.messages)
            for span_id in probe.without:  # what the probe depends on may hold it
                at = sample.span(span_id).ref.message
                left[at] = sample.without(span_id)[at]
            texts = [set(WORD.findall(text)) for text in (*reader.texts(left), json.dumps(sample.tools))]
            asked = set(WORD.findall(probe.question))
            for span_id in probe.without:
                values = lost(probe, span_id)
                seen += len(values)
                for words in texts:
                    # Whoever stands between two hops is read about elsewhere, but never with what leads there.
                    if family not in TWO_HOPS or words & asked:
                        assert not words & values, (sample.sample_id, span_id, words & values)
    assert seen > 100


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("family", ["updates", "preferences", "errors"])
def test_the_older_value_stays_in_its_own_span(many, family, split):
    seen = 0
    for sample in many(family, split):
        for probe in sample.probes:
            for older in probe.without.values():
                for value in set(WORD.findall(older)) - set(WORD.findall(probe.question)):
                    holders = [i for i, m in enumerate(sample.messages) if value in WORD.findall(m.content)]
                    assert len(holders) == 1 and holders[0] in {s.ref.message for s in sample.spans}
                    seen += 1
    assert seen > 50


# -- splits ---------------------------------------------------------------------------------------------------------


def all_text(sample):
    answers = [text for p in sample.probes for text in (p.question, p.answer, *p.without.values())]
    return " ".join([*reader.texts(sample.messages), json.dumps(sample.tools), *answers])


@each_case
def test_words_and_codes_belong_to_their_split(many, family, split):
    words = {word for sample in many(family, split) for word in WORD.findall(all_text(sample))} - {*FIRST}
    assert len(words) > 200 and {split_of(word) for word in words} == {split}


def test_one_word_in_ten_is_held_out():
    drawn = {s: {w for seed in range(20) for w in words(seed, s, 100)} for s in ("train", "test")}
    assert not drawn["train"] & drawn["test"] and SIZE == 420 * 40 * 6 == 100_800
    everything = [f + m + e for f in FIRST for m in ("", *names._MIDDLES) for e in names._ENDINGS]
    assert sum(split_of(word) == "test" for word in everything) == pytest.approx(SIZE / 10, rel=0.05)


def words(seed, split, n):
    pool = Names(random.Random(seed), split)
    return [pool.word() for _ in range(n)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_word_comes_twice(split):
    found = words(0, split, 3000)
    assert len(set(found)) == 3000 and len({word[:3] for word in found[:50]}) >= 45


def wordings():
    """Every list of wordings of the corpus, by its name; longer ones are things, not wordings."""
    modules = [templates, *(sys.modules[FAMILIES.factory(f).__module__] for f in FAMILIES.names())]
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, tuple) and 5 <= len(value) <= 8 and all(isinstance(v, str) for v in value):
                yield f"{module.__name__}.{name}", value


def test_held_out_wordings_never_occur_in_training(many):
    lists = dict(wordings())
    assert len(lists) >= 16
    texts = [
        text
        for family in training_families()
        for sample in many(family, "train")
        for text in (*(m.content for m in sample.messages), *(p.question for p in sample.probes))
    ]
    assert len(texts) > 10_000
    for name, options in lists.items():
        held_out = re.compile(reader.pattern(options[-1], **dict.fromkeys(("what", "name", "subject", "thing"), ".+")))
        found = [text for text in texts if held_out.fullmatch(text)]
        assert not found, f"{name}: {found[:3]}"


def test_the_test_split_uses_held_out_wordings_about_half_of_the_time(many):
    openings = [s.messages[0].content for f in training_families() for s in many(f, "test")]
    assert 0.4 < sum(o == templates.SYSTEM[-1] for o in openings) / len(openings) < 0.6


# -- length ---------------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("length", [256, 512, 1024, 4096])
def test_the_length_is_reached(make, encoder, family, length):
    def tokens(seed, length, size):
        return len(encoder.encode(make(family, seed, length=length, size=size), [], with_tools=False).ids)

    size = max(1, length // 256)
    least = max(tokens(seed, 64, size) for seed in range(20))
    for seed in range(3):
        # A block of filler less where the last one would be too long.
        assert length - 70 <= tokens(seed, length, size) <= 1.15 * max(length, least)


@each_family
def test_long_threads_take_a_second_or_so(make, encoder, family):
    started = time.process_time()
    sample = make(family, length=32_768, split="test")
    assert time.process_time() - started < 5
    assert 0.97 * 32_768 < len(encoder.encode(sample, []).ids) < 1.05 * 32_768
    assert len({call.id for m in sample.messages for call in m.tool_calls}) > 150


def test_without_a_tokenizer_lengths_are_estimated(encoder):
    tokens = [len(encoder.encode(generate("facts", seed=s, length=2048), []).ids) for s in range(3)]
    assert all(1000 < n < 4000 for n in tokens) and rough_length("x" * 40) == 10


# -- threads --------------------------------------------------------------------------------------------------------


@each_case
def test_turns_follow_each_other_as_in_a_chat(many, family, split):
    for sample in many(family, split):
        first, *rest = sample.messages
        assert first.role == "system" and rest[-1].role == "assistant" and not rest[-1].tool_calls
        asked, open_calls = set(), []
        previous = "assistant"
        for message in rest:
            if message.role == "tool":
                assert open_calls.pop(0) == (message.tool_call_id, message.name)
            else:
                assert not open_calls, "every call is answered at once"
                assert message.role == {"assistant": "user", "user": "assistant", "tool": "assistant"}[previous]
            for call in message.tool_calls:
                assert message.role == "assistant" and call.id not in asked and json.loads(call.arguments)
                asked.add(call.id)
                open_calls.append((call.id, call.name))
            assert bool(message.content) != bool(message.tool_calls)
            previous = message.role


@each_family
def test_mentions_name_a_subject_without_its_value(family):
    split = "test" if family == HELD_OUT else "train"
    always, never = (
        sum(s.mentioned_later(span.span_id) for s in made for span in s.spans) / sum(len(s.spans) for s in made)
        for made in (list(samples(family, 40, length=128, split=split, mentions=m)) for m in (1.0, 0.0))
    )
    assert always > 0.9 and never < 0.75


def test_filler_concerns_nothing_that_is_asked(make):
    sample = make("needles", length=2000)
    short = make("needles", length=64)
    assert len(sample.messages) > 3 * len(short.messages)
    asked = {word for probe in sample.probes for word in WORD.findall(probe.question)}
    assert all(not asked & set(WORD.findall(m.content)) for m in sample.messages if m.name == "get_weather")


# -- many, and what cannot be ---------------------------------------------------------------------------------------


@each_family
def test_lines_are_read_as_recorded_threads(family, tmp_path):
    split = "test" if family == HELD_OUT else "train"
    made = list(samples(family, 3, seed=5, length=200, split=split))
    assert [s.sample_id for s in made] == [f"{family}-{split}-200-{seed}" for seed in (5, 6, 7)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(sample.to_json()) + "\n" for sample in made), encoding="utf-8")
    traces = list(read_traces(path))
    assert [tuple(trace.messages) for trace in traces] == [sample.messages for sample in made]
    assert [CorpusSample.from_json(json.loads(line)) for line in path.read_text().splitlines()] == made


def test_the_held_out_family_is_not_for_training():
    assert HELD_OUT == "documents" and HELD_OUT not in training_families()
    assert len(training_families()) == len(FAMILIES.names()) - 1 == 7
    with pytest.raises(CorpusError, match="held out.*split='test'"):
        generate(HELD_OUT, seed=0)


def test_training_never_shows_the_pages_of_the_held_out_family(many):
    module = sys.modules[FAMILIES.factory(HELD_OUT).__module__]
    words = re.compile("|".join(re.escape(w).replace(r"\{name\}", ".+") for w in (*module._SHARE, *module._AROUND)))
    assert all(words.search(all_text(sample)) for sample in many(HELD_OUT, "test"))
    found = [s.sample_id for f in training_families() for s in many(f, "train") if words.search(all_text(s))]
    assert not found


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"family": "nope"}, UnknownNameError, "unknown task family 'nope'; known: documents, errors, facts"),
        ({"split": "dev"}, CorpusError, "expected a split of train, test, got 'dev'"),
        ({"length": 63}, CorpusError, "at least 64 tokens, got 63"),
        ({"length": -1}, CorpusError, "at least 64 tokens, got -1"),
        ({"size": 0}, CorpusError, "size of at least 1, got 0"),
    ],
)
def test_what_is_not_there(arguments, error, told):
    with pytest.raises(error, match=told):
        generate(**{"family": "facts", "seed": 0, **arguments})


@each_family
def test_the_smallest_trace(family):
    for seed in range(30):
        sample = generate(family, seed=seed, length=64, split="test", size=1)
        reads = reader.Reader(sample.messages)
        assert all(reads.answer(p.question) == p.answer for p in sample.probes)
    assert UNKNOWN == "I do not know."
