"""Long threads under every arm: what each of them sees, what is counted, and what a retraction leaves behind."""

import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kv_retract.cache.keys import build_key
from kv_retract.cli import app, main
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.engine.working import fingerprint_of
from kv_retract.erasers import MaskEraser
from kv_retract.errors import KVRetractError, LandmarkMismatchError, UnknownNameError
from kv_retract.evals import acre_retraction
from kv_retract.evals.acre import (
    COLUMNS,
    RETRACTION,
    TASKS,
    AcreEval,
    Answered,
    LongSample,
    acre_rows,
    eval_acre,
    labelled_arms,
    tasks_of,
)
from kv_retract.evals.acre_arms import LONG_ARMS, BiLayerArm, LongArm, Place
from kv_retract.evals.acre_questions import Question, long_thread, overview, questions_of
from kv_retract.evals.acre_readers import MAX_ANSWER, CountingEngine, LongThread, passages
from kv_retract.evals.acre_refill import refill_cost
from kv_retract.evals.acre_retraction import (
    RETRACTION_ARMS,
    RetractionSample,
    retract,
    retraction_rows,
    retraction_samples,
)
from kv_retract.evals.asking import AskedThread
from kv_retract.evals.console import print_acre
from kv_retract.evals.jobs import LengthError
from kv_retract.evals.specs import Spec, SpecError, parse_specs
from kv_retract.landmarks.net import LandmarkNet
from kv_retract.ledger.render import Renderer
from kv_retract.training.corpus import CorpusError, generate
from kv_retract.training.encoding import RowEncoder
from kv_retract.training.samples import UNKNOWN
from kv_retract.types import SamplingParams

WINDOW, TIMES = 128, 3
ARMS = parse_specs(["full,truncate,sinks,bm25:refill=192,l1_only,pooled:refill=192,acre:ratio=32,refill=192"])
TAIL = 128
"""Most tokens of a question and an answer."""


@pytest.fixture(scope="session")
def landmarks(tmp_path_factory):
    """Landmarks of the bundled model, as they begin to be trained."""
    model, folder = load_model("reference").model, tmp_path_factory.mktemp("landmarks") / "fresh"
    LandmarkNet.for_model(model).save(folder, fingerprint=fingerprint_of(model), base="reference")
    return folder


@pytest.fixture(scope="module")
def found(landmarks, tmp_path_factory):
    """One thread of two tasks under all arms, with retraction and timings: folder, metrics, samples."""
    out, ticks = tmp_path_factory.mktemp("acre") / "out", []
    settings = AcreEval(
        out=out, tasks=("updates", "overview"), times=(TIMES,), n=1, window=WINDOW, arms=tuple(ARMS),
        landmarks=str(landmarks), retract=True, bench=True,
    )  # fmt: skip
    metrics = eval_acre(settings, progress=lambda done, total: ticks.append((done, total)))
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert ticks == [(1, 2), (2, 2)]
    return out, metrics, lines


class World:
    """The bundled model, and a thread of facts that is several windows long."""

    def __init__(self, *, size, length):
        self.loaded = load_model("reference")
        self.renderer, self.encoder = Renderer(self.loaded.tokenizer), RowEncoder(self.loaded.tokenizer)
        tokens = self.encoder.length
        self.sample = generate("facts", seed=0, length=length, split="test", tokens=tokens, mentions=1.0, size=size)
        self.thread = long_thread(self.sample, self.encoder, self.renderer)

    def place(self, **changes):
        place = Place(
            loaded=self.loaded, renderer=self.renderer, window=WINDOW, landmarks="", thread=self.thread, tail=TAIL
        )
        return replace(place, **changes)

    def open(self, text, **changes):
        [spec] = parse_specs([text])
        reader = spec.create(LONG_ARMS).open(self.place(**changes))
        reader.read(self.thread)
        return reader

    def asked(self, probe):
        return self.encoder.probe(probe.question, probe.answer)[0]

    def text(self, ids):
        return self.loaded.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def world():
    return World(size=6, length=700)


# -- a whole run ----------------------------------------------------------------------------------------------------


def test_every_arm_answers_the_same_questions(found):
    _, metrics, lines = found
    rows = {(row["arm"], row["task"]): row for row in metrics["rows"]}
    labels = [spec.label for spec in ARMS]
    assert list(rows) == [(a, t) for t in ("updates", "overview") for a in labels] + [(a, "all") for a in labels]
    assert all(row["n"] == 1 and row["times_window"] == TIMES for row in rows.values())
    for task in ("updates", "overview"):
        mine = [line for line in lines if line["part"] == "long" and line["task"] == task]
        assert len({tuple(a["question"] for a in line["answers"]) for line in mine}) == 1
        assert len({line["tokens"] for line in mine}) == 1 and mine[0]["tokens"] >= TIMES * WINDOW - 64
    for label in labels:
        assert {k: v for k, v in rows[label, "all"].items() if k != "task"} == {
            k: v for k, v in rows[label, "updates"].items() if k != "task"
        }, "a whole thread's questions do not count"
    assert rows["full", "updates"]["accuracy"] > rows["truncate", "updates"]["accuracy"], "the model reads its thread"


def test_rows_tell_sizes_and_costs(found):
    rows = {row["arm"]: row for row in found[1]["rows"] if row["task"] == "updates"}
    sizes = {arm: (row["ratio"], row["budget"]) for arm, row in rows.items()}
    assert sizes == {
        "full": (None, None), "truncate": (None, None), "sinks": (None, None), "bm25:refill=192": (None, 192),
        "l1_only": (16, 0), "pooled:refill=192": (16, 192), "acre:ratio=32,refill=192": (32, 192),
    }  # fmt: skip
    back = {arm: row["tokens_refilled"] for arm, row in rows.items()}
    assert back["full"] == back["truncate"] == back["sinks"] == back["l1_only"] == 0
    assert back["pooled:refill=192"] == back["acre:ratio=32,refill=192"] == 192 and 64 < back["bm25:refill=192"] <= 192
    in_layers = {arm for arm, row in rows.items() if row["peak_host_mb"]}
    assert in_layers == {"l1_only", "pooled:refill=192", "acre:ratio=32,refill=192"}
    assert rows["truncate"]["peak_device_mb"] < rows["full"]["peak_device_mb"]
    assert all(row["ttft_ms_median"] > 0 for row in rows.values())


def test_the_folder_holds_configuration_and_samples(found, landmarks):
    out, metrics, lines = found
    assert json.loads((out / "metrics.json").read_text())["rows"] == metrics["rows"]
    config = json.loads((out / "config.json").read_text())
    in_layers = {"l1_only", "pooled:refill=192", "acre:ratio=32,refill=192"}
    assert config["landmarks"].keys() == {*in_layers, RETRACTION}
    assert config["landmarks"][RETRACTION] == config["landmarks"]["l1_only"] and config["arms"] == [
        spec.label for spec in ARMS
    ]
    assert config["landmarks"]["pooled:refill=192"] == "pooled" and config["landmarks"]["l1_only"].startswith("trained")
    assert config["window"] == WINDOW and config["columns"].keys() >= {"leak", "peak_device_mb", "ttft_ms_median"}
    assert str(landmarks.parent) not in (out / "metrics.json").read_text(), "no folder of this machine"
    assert [line["part"] for line in lines] == ["long"] * 7 + ["retraction"] * 5 + ["long"] * 7
    assert set(COLUMNS) - {"_se", "task"} <= metrics["rows"][0].keys()


def test_retraction_rows_are_of_every_arm(found):
    _, metrics, lines = found
    rows = {row["arm"]: row for row in metrics["retraction"] if row["task"] == "updates"}
    assert tuple(rows) == RETRACTION_ARMS and all(row["n"] == 1 for row in rows.values())
    assert rows["none"]["edit_ms_median"] is None and rows["none"]["tokens_recomputed"] == 0
    cost = {arm: row["tokens_recomputed"] for arm, row in rows.items()}
    assert 0 < cost["l2_only"] == cost["both"] <= cost["exact"] < cost["healed"]
    told = {
        line["arm"]: [line[name] for name in ("affected", "leaked", "unaffected")]
        for line in lines if line["part"] == "retraction"
    }  # fmt: skip
    assert told["healed"] == told["exact"], "a healed thread is exact"
    assert metrics["config"]["retraction_columns"].keys() >= {"arm", "leak", "edit_ms_median"}


def test_refilling_is_timed_against_reading_again(found):
    cost = found[1]["refill_cost"]
    assert cost["ratio"] == pytest.approx(cost["refill_ms"] / cost["encode_ms"]) and 0 < cost["ratio"] < 1
    assert cost["n"] == 15 and 0 < cost["tokens"] <= 512


def test_results_are_printed(found):
    console = Console(file=io.StringIO(), width=160)
    print_acre(found[1], console)
    text = console.file.getvalue()
    assert all(spec.label in text for spec in ARMS) and all(arm in text for arm in RETRACTION_ARMS)
    cells = [line.split() for line in text.splitlines()]
    assert {tuple(c[:4]) for c in cells if c[:1] == ["full"]} == {
        ("full", "all", str(TIMES), "1"), ("full", "overview", str(TIMES), "1")
    }  # fmt: skip
    assert f"windows of {WINDOW} tokens" in text and re.search(r"Bringing \d+ tokens back: .* ms, [\d.]+% of", text)
    short = Console(file=io.StringIO(), width=160)
    print_acre({**found[1], "retraction": [], "refill_cost": None}, short)
    assert "healed" not in short.file.getvalue() and "Bringing" not in short.file.getvalue()


# -- questions ------------------------------------------------------------------------------------------------------


def test_what_nobody_knows_is_not_asked():
    sample = generate("facts", seed=3, length=512, split="test")
    asked = questions_of("facts", sample, 100)
    known = {p.question: p.answer for p in sample.probes if p.answer != UNKNOWN}
    assert {q.text: q.right for q in asked} == known and len(known) == len(sample.probes) - 1
    assert all(q.outdated == () and q.is_outdated(UNKNOWN) is None for q in asked)
    some = questions_of("facts", sample, 2)
    assert len(some) == 2 and some == questions_of("facts", sample, 2), "the same for every arm and run"


@pytest.mark.parametrize("family", ["updates", "preferences", "documents", "relations"])
def test_outdated_answers_are_told_apart(family):
    samples = [generate(family, seed=seed, length=512, split="test") for seed in range(4)]
    asked = [(s, q) for s in samples for q in questions_of(family, s, 100)]
    replaced = [(s, q) for s, q in asked if q.outdated]
    assert replaced
    for sample, question in replaced:
        [probe] = [p for p in sample.probes if p.question == question.text and p.answer == question.right]
        assert set(question.outdated) == set(probe.without.values()) - {UNKNOWN}
        assert question.is_outdated(question.outdated[0]) and not question.is_outdated(question.right)
        assert question.is_right(probe.answer) and not question.is_right(probe.answer + " Or so.")


def test_a_whole_thread_is_counted_by_hand():
    sample = generate("facts", seed=2, length=512, split="test")
    count, first = overview(sample)
    text = " ".join(call.arguments for m in sample.messages for call in m.tool_calls)
    assert int(count.right) == len(re.findall(r"{", text)) > 4
    assert text.startswith(json.dumps({json.loads(text[: text.index("}") + 1]).popitem()[0]: first.right}))
    assert count.is_right(f"There were {count.right} calls.") and not count.is_right(f"For Kel-{count.right}.")
    assert not count.is_right(f"There were {count.right}0.") and not count.is_right(UNKNOWN)
    assert questions_of("overview", sample, 1) == [count]


# -- what readers see -----------------------------------------------------------------------------------------------


def test_a_whole_thread_is_answered_as_it_is_scored_elsewhere(world):
    """The same as one pass with the right answer in place, on a cache of which nothing depends on the answer."""
    reader, engine = world.open("full"), HFEngine(world.loaded.model, max_tokens=4096)
    thread = AskedThread(world.sample, MaskEraser(), engine, world.renderer, "asked")
    assert reader.key(np.array([7])).ids.tolist() == [*world.thread.ids, 7]
    assert reader.key().ids.tolist() == thread._key(world.sample.messages, open_turn=False).ids.tolist()
    for probe in world.sample.probes:
        said = reader.answer(world.asked(probe)).text
        for answer in (probe.answer, UNKNOWN):
            assert (said == answer) == thread.says(probe.question, answer)[0]


def test_bytes_are_those_of_the_tokens_in_use(world):
    reader, probe = world.open("full"), world.sample.probes[0]
    model = world.loaded.model.config
    assert reader.token_bytes == 2 * 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    assert reader.host_bytes == 0
    answer = reader.answer(world.asked(probe))
    read = len(world.thread) + len(world.asked(probe)) + len(world.encoder.ids(answer.text))
    # In the pool and in the working cache; of the last token, the end of the turn, nothing is kept.
    assert reader.device_bytes == 2 * read * reader.token_bytes and answer.tokens_refilled == 0
    assert reader.engine.tokens_in_use() == len(world.thread), "what was asked is forgotten"


@pytest.mark.parametrize(("arm", "first"), [("truncate", 0), ("sinks", 4), ("sinks:sinks=9,tokens=50", 9)])
def test_ends_stand_at_consecutive_positions(world, arm, first):
    reader, newest = world.open(arm), 50 if "tokens" in arm else WINDOW
    ids = world.thread.ids
    assert reader.key().ids.tolist() == [*ids[:first], *ids[-newest:]]
    assert reader.key().positions.tolist() == list(range(first + newest))
    short = world.open(arm.split(":")[0], window=5000)
    assert short.key().ids.tolist() == ids.tolist(), "a short thread is whole, its first tokens not twice"


def test_a_message_is_retrieved_by_the_words_of_a_question(world):
    reader, ids = world.open("bm25:refill=120"), world.thread.ids
    first = world.thread.borders[0]
    recent = len(reader.key()) - first
    assert 0 < recent <= WINDOW and len(ids) - recent in world.thread.borders
    for span in world.sample.spans:
        [probe] = [p for p in world.sample.probes if span.span_id in p.without]
        key, asked = reader.key(world.asked(probe)).ids, world.asked(probe)
        assert key[:first].tolist() == ids[:first].tolist() and key[-len(asked) :].tolist() == asked.tolist()
        old = key[first : len(key) - recent - len(asked)]
        assert 0 < len(old) <= 120 and old[-1] in world.renderer.stop_token_ids
        content = world.sample.messages[span.ref.message].content
        assert content in world.text(old) or content in world.text(ids[-recent:])
        told = world.text(key)
        turns = re.findall(r"<\|im_start\|>(\w+)\n.*?<\|im_end\|>", told, re.DOTALL)
        assert len(turns) == told.count("<|im_end|>") == told.count("<|im_start|>") - 1, "turns are whole"
        rest = world.text(ids)
        for piece in re.findall(r".+?<\|im_end\|>", world.text(old), re.DOTALL):
            _, found, rest = rest.partition(piece)
            assert found, "in the order of the thread"
    answer = reader.answer(asked)
    assert answer.tokens_refilled == len(old) and reader.engine.tokens_in_use() == first
    assert reader.device_bytes <= 2 * (len(key) + MAX_ANSWER) * reader.token_bytes, "of one question"


def test_nothing_is_retrieved_for_words_that_stand_nowhere(world):
    reader = world.open("bm25")
    for question in ("Zyxwvq?", "Is it?"):
        asked = world.encoder.ids(question)
        assert len(reader.key(asked)) == len(reader.key()) + len(asked)


def test_passages_are_messages_and_pieces_of_long_ones():
    ids = np.arange(100)
    thread = LongThread(ids=ids, contents=((12, 38), (43, 48)), borders=np.array([10, 40, 50]))
    short, *pieces = [p.tolist() for p in passages(thread, [0, 10, 40], 14)]
    assert short == list(range(10)) and all(len(piece) <= 14 for piece in pieces)
    assert [p[:2] + p[-2:] for p in pieces] == [[10, 11, 38, 39]] * 3, "each has the template of the message"
    assert sum((piece[2:-2] for piece in pieces), []) == list(range(12, 38))
    two = [p.tolist() for p in passages(thread, [10, 50], 14)]
    assert sum(two, []) == list(range(10, 50)) and max(map(len, two)) == 14, "where there are two contents"
    assert passages(thread, [7], 14) == []


def test_borders_are_where_turns_end(world):
    assert [world.text(world.thread.ids[b - 1 : b]) for b in world.thread.borders] == ["<|im_end|>"] * len(
        world.sample.messages
    )
    for (start, end), message in zip(
        world.thread.contents, [m for m in world.sample.messages if m.content], strict=True
    ):
        assert world.text(world.thread.ids[start:end]) == message.content


def test_two_layers_answer_as_the_engine_decodes(world):
    reader, probe = world.open("pooled:ratio=8,refill=96"), world.sample.probes[0]
    asked, engine = world.asked(probe), reader.engine
    answer = reader.answer(asked)
    key = build_key(np.concatenate([world.thread.ids, asked]), ())
    sampling = SamplingParams(max_tokens=MAX_ANSWER, stop_token_ids=world.renderer.stop_token_ids)
    ids = [token.id for token in engine.generate(key, sampling)]
    assert answer.text == world.renderer.decode(ids).strip() and answer.tokens_refilled == 96
    windows = engine.settings.moved(len(key))
    assert windows > 3 and reader.host_bytes == windows * WINDOW * reader.token_bytes
    local = len(key) - windows * WINDOW  # of the answer nothing is cached
    before = engine.windows.layout.sinks + engine.settings.overlap + 96
    working = before + local + len(ids) - 1
    assert reader.device_bytes >= (working + local + windows * WINDOW // 8) * reader.token_bytes
    assert reader.device_bytes <= (working + 2 * local + TAIL + windows * WINDOW // 8) * reader.token_bytes
    engine.check_integrity()


def test_landmarks_and_sizes_are_those_that_are_asked_for(world, landmarks):
    arm = Spec("acre", {"ratio": 32, "refill": 64, "rounds": 1, "local": 300, "overlap": 0}).create(LONG_ARMS)
    engine = arm.open(world.place(landmarks=str(landmarks))).engine
    s = engine.settings
    assert (s.window, s.ratio, s.refill, s.rounds, s.local, s.overlap) == (WINDOW, 32, 64, 1, 300, 0)
    assert engine.landmarks.are_tokens
    plain = BiLayerArm().settings(world.place())
    assert (plain.local, plain.overlap, plain.sinks) == (WINDOW + plain.queries, WINDOW // 8, 4)
    assert not LONG_ARMS.create("pooled").open(world.place(landmarks=str(landmarks))).engine.landmarks.are_tokens


def test_a_thread_beyond_the_models_positions_has_no_figures(tmp_path):
    [row, _] = eval_acre(
        AcreEval(out=tmp_path / "out", tasks=("facts",), times=(33,), n=1, arms=(Spec("full"),))
    )["rows"]  # fmt: skip
    assert row["n"] == 0 and row["accuracy"] is row["leak"] is row["ttft_ms_median"] is row["peak_device_mb"] is None


def test_a_thread_that_memory_cannot_hold_has_no_figures(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Vast(LongArm):
        """Takes more memory than any machine has, once it is told more than a window."""

        def open(self, place):
            if len(place.thread) > WINDOW:
                torch.empty(2**60)

    monkeypatch.setitem(LONG_ARMS._factories, "vast", Vast)
    settings = AcreEval(
        out=tmp_path / "out", tasks=("facts",), times=(2,), n=1, window=WINDOW, arms=(Spec("vast"), Spec("truncate"))
    )
    vast, truncate, *_ = eval_acre(settings)["rows"]
    assert vast["n"] == 0 and vast["peak_device_mb"] is None and truncate["n"] == 1

    class Broken(Vast):
        def open(self, place):
            if len(place.thread) > WINDOW:
                torch.ones(2) @ torch.ones(3)

    monkeypatch.setitem(LONG_ARMS._factories, "vast", Broken)
    with pytest.raises(RuntimeError, match="size"):
        eval_acre(replace(settings, out=tmp_path / "other"))


# -- retraction -----------------------------------------------------------------------------------------------------


def opened(world, arm, landmarks, ratio=8):
    kind = acre_retraction._HalfEngine if arm == "l2_only" else CountingEngine
    reader = BiLayerArm(ratio=ratio, refill=96).open_as(kind, world.place(landmarks=str(landmarks)))
    reader.read(world.thread)
    return reader


def layers(reader):
    """L1 and L2 of the thread: slots, and the states of landmarks and tokens; hidden ones are zero."""
    engine, key = reader.engine, reader.key()
    moved = engine.settings.moved(len(key))
    lease = engine.windows.lease(key, moved)
    slots, pool = lease.slots.copy(), engine.windows.pool
    k, rows = pool.read(np.maximum(slots, 0))[0], np.maximum(slots.reshape(-1, 8).max(1), 0) // 8
    engine.windows.manager.release(lease)
    return slots, pool.read_landmarks(rows)[0], k


@pytest.mark.parametrize("kind", ["trained", "pooled"])
def test_arms_withdraw_what_they_say(world, landmarks, kind):
    span = world.encoder.thread(world.sample)[1](world.sample.spans[1].ref)
    window, edges = span[0] // WINDOW, (span[0], span[1])
    assert span[1] // WINDOW == window, "a span in one window, for this test"
    folder, seen = landmarks if kind == "trained" else "pooled", {}
    for arm in RETRACTION_ARMS:
        reader = opened(world, arm, folder)
        _, recomputed = retract(reader, arm, edges)
        seen[arm] = (reader, recomputed, *layers(reader))
        reader.engine.check_integrity()
        assert reader.engine.cached(reader.key()) == len(reader.key())
    none, half, both = (seen[arm] for arm in ("none", "l2_only", "both"))
    hidden = slice(*span)
    assert (half[2][hidden] == -1).all() and (both[2][hidden] == -1).all() and (none[2][hidden] >= 0).all()
    # Landmarks of its window from its block on; those of blocks that the span fills are gone in both.
    behind = slice(span[1] // 8, (window + 1) * WINDOW // 8)
    assert torch.equal(half[3][:, behind], none[3][:, behind])
    assert not torch.allclose(both[3][:, behind], none[3][:, behind], atol=1e-3)
    after = slice(span[1], (window + 1) * WINDOW)
    torch.testing.assert_close(half[4][:, after], both[4][:, after])
    assert not torch.allclose(half[4][:, after], none[4][:, after], atol=1e-3), "its other tokens are encoded anew"
    later = slice((window + 1) * WINDOW // 8, None)
    assert torch.equal(both[3][:, later], none[3][:, later]), "later windows keep what they took from it"
    assert half[1] == both[1] and none[1] == 0 and both[1] < seen["exact"][1] < seen["healed"][1]
    gone = span[1] - span[0]
    for arm in ("healed", "exact"):
        assert len(seen[arm][0].key()) == len(world.thread) - gone
    torch.testing.assert_close(seen["healed"][3], seen["exact"][3], atol=1e-4, rtol=1e-4)
    fresh = opened(world, "none", folder)
    fresh._ids = np.delete(world.thread.ids, np.r_[hidden])
    torch.testing.assert_close(layers(fresh)[1], seen["exact"][3], atol=1e-4, rtol=1e-4)


def test_a_span_of_an_old_window_is_chosen():
    """In a thread so short that all of it is brought back, and with landmarks that only say what to bring back."""
    world = World(size=3, length=450)
    place, tokens_of = world.place(landmarks="pooled"), world.encoder.thread(world.sample)[1]
    chosen = set()
    for number in range(2):
        samples = retraction_samples(world.sample, number, place, world.encoder, times=3, max_probes=2)
        assert [s.arm for s in samples] == list(RETRACTION_ARMS) and len({s.span_id for s in samples}) == 1
        for s in samples:
            start, end = tokens_of(world.sample.span(s.span_id).ref)
            assert s.window == start // WINDOW and end <= s.num_windows * WINDOW
            assert s.unaffected == (True,), "the model knows what the thread says"
            assert (s.affected, s.leaked) == (((False,), (True,)) if s.arm == "none" else ((True,), (False,)))
        chosen.add(samples[0].span_id)
    assert len(chosen) == 2
    short = world.place(window=4096)
    assert retraction_samples(world.sample, 0, short, world.encoder, times=1, max_probes=2) == []


# -- rows -----------------------------------------------------------------------------------------------------------


def answered(right, outdated=None, ttft_ms=1.0, back=0):
    return Answered(question="?", expected="a", given="b", right=right, outdated=outdated, ttft_ms=ttft_ms,
                    tokens_refilled=back)  # fmt: skip


def long_sample(number, *answers, task="facts", **changes):
    fields = dict(sample_id=f"{task}-{number}", task=task, times_window=2, tokens=9, arm="acre", ratio=8, budget=64,
                  answers=answers, device_mb=float(number), host_mb=2.0)  # fmt: skip
    return LongSample(**{**fields, **changes})


def test_rows_are_means_with_errors_over_threads():
    rows = acre_rows([
        long_sample(0, answered(True, ttft_ms=1, back=64), answered(True, ttft_ms=2, back=32)),
        long_sample(1, answered(False, ttft_ms=9, back=0), answered(False, ttft_ms=3, back=64)),
        long_sample(0, answered(True, outdated=False), task="updates", times_window=4),
        long_sample(1, answered(False, outdated=True), task="updates", times_window=4),
        long_sample(0, answered(False), task="overview"),
    ])  # fmt: skip
    facts, updates, whole, short, long = rows
    assert (facts["n"], facts["accuracy"], facts["leak"], facts["peak_device_mb"]) == (2, 0.5, None, 1.0)
    assert facts["accuracy_se"] == pytest.approx(0.5), "two threads, not four answers"
    assert (facts["ttft_ms_median"], facts["tokens_refilled"]) == (2.5, 40)
    assert (updates["leak"], updates["leak_se"]) == (0.5, pytest.approx(0.5))
    assert (whole["task"], whole["accuracy"]) == ("overview", 0)
    assert [(r["task"], r["times_window"], r["accuracy"]) for r in (short, long)] == [("all", 2, 0.5), ("all", 4, 0.5)]
    [empty, _] = acre_rows([long_sample(0, device_mb=None, host_mb=None)])
    assert empty["n"] == 0 and empty["accuracy"] is empty["accuracy_se"] is empty["peak_host_mb"] is None


def test_retraction_rows_are_means_with_errors_over_threads():
    [row, every] = retraction_rows([
        RetractionSample(
            sample_id=str(i), task="facts", times_window=2, arm="both", span_id="s", window=0, num_windows=1,
            affected=(bool(i),) * 2, leaked=(not i,) * 2, unaffected=(), edit_ms=float(i), tokens_recomputed=2 * i,
        )
        for i in range(2)
    ])  # fmt: skip
    assert every == {**row, "task": "all"}
    assert (row["n"], row["affected_accuracy"], row["leak"], row["unaffected_accuracy"]) == (2, 0.5, 0.5, None)
    assert row["leak_se"] == pytest.approx(0.5) and (row["edit_ms_median"], row["tokens_recomputed"]) == (0.5, 1)


# -- what does not fit ----------------------------------------------------------------------------------------------


def with_arms(*texts, **changes):
    return AcreEval(**{"out": Path("never"), "window": WINDOW, "arms": tuple(parse_specs(texts)), **changes})


@pytest.mark.parametrize(
    ("arm", "error", "told"),
    [
        ("nope", UnknownNameError, "unknown arm 'nope'; known: acre, bm25, full, l1_only, pooled, sinks, truncate"),
        ("pooled:ratio=48", SpecError, "'pooled:ratio=48' does not fit: a window must be a multiple of the ratio"),
        ("pooled:local=10", SpecError, "expected room for a window and the queries"),
        ("pooled:refill=40000", SpecError, "smaller local, refill or landmark_positions"),
        ("pooled:size=3", SpecError, "does not take"),
        ("acre:landmarks=nowhere", LandmarkMismatchError, "kv-retract train acre"),
    ],
)
def test_arms_that_do_not_fit_are_told_at_once(arm, error, told):
    with pytest.raises(error, match=re.escape(told)):
        labelled_arms(with_arms(arm))


@pytest.mark.parametrize("arm", ["acre", "l1_only"])
def test_arms_with_trained_landmarks_do_not_go_without(arm):
    with pytest.raises(LandmarkMismatchError, match="'random', and none are bundled; pass --landmarks"):
        labelled_arms(with_arms(arm, model="random"))
    [pooled] = labelled_arms(with_arms("pooled", model="random"))
    assert (pooled.label, pooled.landmarks) == ("pooled", "pooled")


def test_labels_name_folders_and_not_the_way_to_them(landmarks):
    [made] = labelled_arms(with_arms(f"acre:landmarks={landmarks},ratio=8"))
    assert made.label == 'acre:landmarks="fresh",ratio=8' and made.arm.landmarks == str(landmarks)
    with pytest.raises(SpecError, match="different names"):
        labelled_arms(with_arms(f"acre:landmarks={landmarks}", f"acre:landmarks={landmarks}/../fresh"))


def test_landmarks_of_another_model_are_refused(landmarks):
    with pytest.raises(LandmarkMismatchError, match="trained on model 'reference'"):
        labelled_arms(with_arms("acre", model="random", landmarks=str(landmarks)))


@pytest.mark.parametrize("part", ["retract", "bench"])
def test_a_window_that_retraction_does_not_fit_is_told_at_once(part):
    settings = with_arms("full", window=100, model="random", tasks=("facts",))
    with pytest.raises(SpecError, match="'retraction, refill_cost' does not fit: a window must be a multiple"):
        eval_acre(replace(settings, **{part: True}))


def test_tasks_are_those_of_the_split():
    assert tasks_of(with_arms("full")) == TASKS
    assert tasks_of(with_arms("full", split="train")) == tuple(t for t in TASKS if t != "documents")
    assert tasks_of(with_arms("full", tasks=("overview", "needles"))) == ("overview", "needles")
    with pytest.raises(UnknownNameError, match="unknown task family 'nope'"):
        tasks_of(with_arms("full", tasks=("nope",)))
    with pytest.raises(CorpusError, match="at least 64 tokens"):
        eval_acre(with_arms("full", window=16, times=(2,), tasks=("facts",)))
    assert not Path("never").exists()


def test_a_thread_without_old_windows_has_nothing_to_refill(world):
    with pytest.raises(LengthError, match="--times"):
        refill_cost(world.place(window=4096))


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command(monkeypatch, tmp_path, capsys):
    told = CliRunner().invoke(app, ["eval", "acre", "--help"], env={"COLUMNS": "120"}).output
    for option in ("--task", "--times", "--arm", "--n", "--window", "--landmarks", "--retract", "--bench", "--json"):
        assert option in told
    out = tmp_path / "out"
    options = ["--model", "random", "--window", "64", "--times", "2", "--task", "facts", "--n", "1", "--out", str(out)]
    done = CliRunner().invoke(
        app, ["eval", "acre", *options, "-a", "truncate", "-a", "pooled:ratio=8,refill=32", "--json"]
    )
    assert (done.exit_code, done.stderr) == (0, "")
    metrics = json.loads(done.stdout)
    assert [row["arm"] for row in metrics["rows"]] == ["truncate", "pooled:ratio=8,refill=32"] * 2
    assert (
        metrics["retraction"] == []
        and metrics["refill_cost"] is None
        and metrics == json.loads((out / "metrics.json").read_text())
    )
    monkeypatch.setattr("sys.argv", ["kv-retract", "eval", "acre", *options, "-a", "acre"])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--landmarks" in error and issubclass(LandmarkMismatchError, KVRetractError)


def test_a_question_is_right_as_it_says():
    exact = Question(text="?", right="It is Tal.")
    assert exact.is_right("It is Tal.") and not exact.is_right("It is Tal. Yes.")
