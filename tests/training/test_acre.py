"""Training landmarks: what is drawn, what is learnt, runs that stop and go on, and what is refused."""

import json
import random
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from math import log

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kv_retract.cache.keys import build_key
from kv_retract.engine.bilayer import BiLayer, BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import LoadedModel, load_model
from kv_retract.engine.support import inspect_model
from kv_retract.engine.working import fingerprint_of
from kv_retract.errors import LandmarkMismatchError
from kv_retract.landmarks import LandmarkNet
from kv_retract.landmarks.config import WEIGHTS
from kv_retract.training import acre
from kv_retract.training.acre import losses, measure, search_loss, text_loss, train_acre, validation_of
from kv_retract.training.acre_config import AcreTraining, read_acre_training
from kv_retract.training.checkpoint import CheckpointError, read_log
from kv_retract.training.config import ConfigError
from kv_retract.training.corpus import training_families
from kv_retract.training.frozen import BEST
from kv_retract.training.long_rows import Asked, LongRow, draw_row, draw_settings, long_rows
from kv_retract.training.long_threads import LongStudent
from kv_retract.training.samples import UNKNOWN
from kv_retract.training.texts import TextError

TINY = AcreTraining(
    pretrain_steps=1, finetune_steps=3, lengths=((0.0, 256),), attended=256, windows=(32, 64), ratios=(8, 16),
    budgets=(32,), overlap=8, landmark_positions=32, queries=16, most_probes=2, warmup=1,
    attend=True, rounds=2, real_share=0.3,
)  # fmt: skip
SETTINGS = BiLayer(
    window=32, ratio=8, overlap=6, local=60, sinks=2, queries=10, refill=24, landmark_positions=12, max_tokens=320
)


@pytest.fixture(scope="module")
def loaded(tiny, model_of, tokenizer):
    return LoadedModel(model_of(tiny()).eval(), tokenizer, "tiny", is_random=True)


@pytest.fixture
def run(loaded):
    def run(config, out, **options):
        return train_acre(loaded, config, out, **{"validation": 0, **options})

    return run


def student_of(model):
    return LongStudent(model, inspect_model(model)[1], LandmarkNet.for_model(model))


def with_evidence(encoder):
    """The first thread of some to which a question is asked whose evidence has to be found."""
    drawn = (draw_row(TINY, encoder, 256, random.Random(seed), families=("facts",)) for seed in range(50))
    return next(row for row in drawn if any(row.to_find(question) for question in row.questions))


def state(out):
    return torch.load(out / "state.pt", weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a, b):
    asked = all(
        np.array_equal(x.asked, y.asked) and np.array_equal(x.told, y.told) and x.evidence == y.evidence
        for x, y in zip(a.questions, b.questions, strict=True)
    )
    return asked and np.array_equal(a.ids, b.ids) and a.settings == b.settings


# -- what is drawn --------------------------------------------------------------------------------------------------


def test_threads_depend_on_configuration_and_step_only(encoder):
    config, texts = replace(TINY, finetune_steps=5, accumulate=2, real_share=0.5), [np.arange(1000, 1400)]
    whole = list(long_rows(config, encoder, texts))
    assert len(whole) == 12 and not any(row.questions for row in whole[:2]), "stage 1 asks nothing"
    assert any(row.questions for row in whole[2:]) and not same(whole[2], whole[3])
    for step in range(7):
        rest = list(long_rows(config, encoder, texts, start=step))
        assert all(same(a, b) for a, b in zip(rest, whole[2 * step :], strict=True))
    assert not same(next(long_rows(replace(config, seed=1), encoder, texts)), whole[0])


def test_every_thread_has_something_to_teach_in_both_stages(encoder):
    """Two windows at least, so that one is read through the landmarks of another, also at the shortest length."""
    config = replace(
        AcreTraining(), attend=True, pretrain_steps=30, finetune_steps=30, lengths=((0.0, 1024),), real_share=0.3
    )
    texts = [np.arange(2000), np.arange(config.shortest), np.zeros(config.shortest - 1, np.int64)]
    drawn = list(long_rows(config, encoder, texts))
    assert all(row.num_windows >= 2 and 2 * row.settings.window <= config.attended for row in drawn)
    assert not any(len(row.ids) == config.shortest - 1 for row in drawn), "a text that is too short is left out"
    assert {row.settings.ratio for row in drawn} == set(config.ratios)
    of_text = [row for row in drawn if (np.diff(row.ids) == 1).all()]
    assert not any(row.questions for row in of_text) and 0.1 < len(of_text) / len(drawn) < 0.5


@pytest.mark.parametrize("length", [321, 400, 1089, 1090, 5000, 30_000])
def test_threads_are_cut_as_the_engine_cuts_them(length):
    config, rng = AcreTraining(), random.Random(length)
    assert config.shortest == 2 * 128 + 64 + 1
    windows = set()
    for _ in range(60):
        settings = draw_settings(config, length, rng)
        windows.add(settings.window)
        behind = length - settings.moved(length) * settings.window
        assert settings.moved(length) >= 2 and settings.window % settings.ratio == 0
        assert settings.queries < behind <= settings.local and settings.window >= settings.sinks + settings.overlap
    if length >= 1089:  # two windows of 512 and 64 queries, and one token more
        assert windows == ({512} if length < 2113 else {512, 1024})


@pytest.mark.parametrize("family", training_families())
def test_the_evidence_tells_the_answer(encoder, tokenizer, family):
    """Names in the answer that the question does not say stand in the spans that are called its evidence."""
    told = 0
    for seed in range(6):
        row = draw_row(TINY, encoder, 256, random.Random(seed), families=(family,))
        assert len(row.questions) <= 2
        for question in row.questions:
            asked, answer = tokenizer.decode(question.asked), tokenizer.decode(question.told).split("<|im_end|>")[0]
            spans = " ".join(tokenizer.decode(row.ids[start:end]) for start, end in question.evidence)
            # The first word of a sentence, and where the answer is that nothing is known, tell nothing.
            names = [word.strip(".,") for word in answer.split()[1:] if word[0].isupper() and word != "I"]
            new = [name for name in names if name not in asked]
            assert all(name in spans for name in new), (answer, spans)
            told += bool(new)
            assert answer != UNKNOWN or not new
    assert told


def test_targets_share_the_evidence_among_its_blocks():
    """3 windows of 32 tokens, blocks of 8; the last 6 tokens are read anyway, and so are those behind."""
    ids = np.arange(150)

    def targets(*evidence):
        row = LongRow(ids, SETTINGS)
        assert row.num_windows == 3
        found = row.targets(Asked(ids[:3], ids[:2], evidence))
        assert found is None or (len(found) == 12 and found.sum() == pytest.approx(1))
        return None if found is None else {int(n): pytest.approx(float(found[n])) for n in np.flatnonzero(found)}

    assert targets((8, 16)) == {1: 1.0} and targets((15, 17)) == {1: 0.5, 2: 0.5}
    assert targets((0, 24), (40, 41)) == {0: 1 / 6, 1: 1 / 6, 2: 1 / 6, 5: 0.5}
    assert targets((40, 41), (41, 42)) == {5: 1.0}
    assert targets((8, 16), (120, 130)) == {1: 1.0}, "what is in sight needs no search"
    assert targets((85, 90)) == {10: 0.5, 11: 0.5}
    assert targets((85, 91)) is None and targets((140, 150)) is None and targets() is None


# -- losses ---------------------------------------------------------------------------------------------------------


def test_the_search_loss_is_the_divergence_from_what_is_sought():
    target = torch.tensor([0.0, 0.5, 0.0, 0.5])
    assert float(search_loss(target * 60, target)) == pytest.approx(0, abs=1e-3)
    assert float(search_loss(torch.full((4,), 0.2), target)) == pytest.approx(log(2), abs=1e-4)
    assert float(search_loss(torch.tensor([0.0, 60.0, 0.0, 0.0]), target)) > 20


def test_the_text_loss_is_the_divergence_from_full_attention(loaded):
    """Token by token, against a plain pass; and of a student that reads what the teacher reads, nothing is left."""
    model, student = loaded.model, student_of(loaded.model)
    row = LongRow(np.random.default_rng(0).integers(3, 2000, 150), SETTINGS)
    with torch.no_grad():
        thread = student.read(row.ids, SETTINGS, num_predicted=150)
        plain = model(torch.from_numpy(row.ids)[None]).logits[0, 32:96].double().log_softmax(-1)
        mine = torch.cat(thread.logits).double().log_softmax(-1)
        wanted = (plain.exp() * (plain - mine)).sum(-1).mean()
        assert float(text_loss(model, thread, row)) == pytest.approx(float(wanted), rel=1e-4) and wanted > 1e-3
        exact = replace(thread, logits=tuple(plain.float().split(32)))
        assert float(text_loss(model, exact, row)) == pytest.approx(0, abs=1e-6)


def test_each_loss_teaches_the_net_and_leaves_the_model_alone(loaded, encoder):
    model = deepcopy(loaded.model).requires_grad_(False)
    before, student = deepcopy(model.state_dict()), student_of(model)
    row = with_evidence(encoder)
    optimizer = torch.optim.AdamW(student.net.parameters(), lr=0.01)
    for name in ("text", "answer", "search"):
        loss = losses(student, row, TINY)[name]
        optimizer.zero_grad()
        loss.backward()
        without = {n for n, p in student.net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        # What landmarks tell in the last layer is no part of any score, and how scores are made of nothing else.
        assert loss.isfinite() and without == (
            {"weight.model/layers/1/self_attn/v_proj"} if name == "search" else {"heads", "maps"}
        ), (name, without)
        assert all(p.grad.isfinite().all() for p in student.net.parameters() if p.grad is not None)
        optimizer.step()
        assert not any(module._forward_hooks for module in model.modules())
        assert all(p.grad is None for p in model.parameters()) and equal(before, model.state_dict())


@torch.no_grad()
def test_every_round_of_every_question_is_taught(loaded, encoder):
    student, config = student_of(loaded.model), replace(TINY, most_probes=4)
    drawn = (draw_row(config, encoder, 256, random.Random(seed), families=("facts",)) for seed in range(50))
    most = config.most_answers
    row = next(
        row
        for row in drawn
        if all(any(map(row.to_find, some)) for some in (row.questions[:most], row.questions[most:]))
    )
    thread, search, answer = student.read(row.ids, row.settings), [], []
    for number, question in enumerate(row.questions):
        rounds, logits = student.ask(thread, question.asked, question.told)
        if answered := number < most:
            answer.append(-logits.log_softmax(-1)[range(len(logits)), question.told].mean())
        if (target := row.targets(question)) is not None:
            heard = rounds if answered else rounds[:1]
            search += [search_loss(scores, torch.from_numpy(target)) for scores in heard]
    found = losses(student, row, config)
    assert len(row.questions) > most and len(search) >= 3
    assert len({round(float(x), 6) for x in search}) == len(search)
    assert float(found["search"]) == pytest.approx(float(sum(search) / len(search)), rel=1e-5)
    assert float(found["answer"]) == pytest.approx(float(sum(answer) / len(answer)), rel=1e-5)


def test_what_a_thread_cannot_teach_is_absent(loaded, encoder):
    student, row = student_of(loaded.model), draw_row(TINY, encoder, 256, random.Random(0))
    bare = replace(row, questions=())
    with torch.no_grad():
        assert set(losses(student, bare, TINY)) == {"text"}
        assert not losses(student, bare, replace(TINY, text_weight=0.0))
        assert not losses(student, bare, replace(TINY, attended=2 * row.settings.window - 1)), "a window by itself"
        stranger = replace(row, questions=(replace(row.questions[0], evidence=()),))
        assert set(losses(student, stranger, TINY)) == {"text", "answer"}, "nothing tells it: there is nothing to find"
        assert measure(student, [stranger]) == {}


def test_losses_in_bfloat16(loaded, encoder):
    model, row = deepcopy(loaded.model).bfloat16().requires_grad_(False), draw_row(TINY, encoder, 256, random.Random(1))
    rounded, wanted = losses(student_of(model), row, TINY), losses(student_of(model.float()), row, TINY)
    assert rounded.keys() == wanted.keys()
    for name, loss in rounded.items():
        print(name, float(loss.detach()), float(wanted[name].detach()))
        assert abs(float(loss.detach() - wanted[name].detach())) < 0.05 + 0.05 * float(wanted[name].detach())


# -- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_in_pieces_equals_an_uninterrupted_one(run, loaded, tmp_path):
    weights = deepcopy(loaded.model.state_dict())
    options = {"validation": 1, "validate_every": 2, "texts": ["The cat sat on the mat. " * 60]}
    run(TINY, tmp_path / "bare", texts=options["texts"])
    assert run(TINY, tmp_path / "whole", **options) == 4
    for done in range(1, 5):
        assert not (tmp_path / "pieces" / "landmarks").exists()
        assert run(TINY, tmp_path / "pieces", seconds=0.0, **options) == done
    whole, *others = (state(tmp_path / name) for name in ("whole", "bare", "pieces"))
    assert all(equal(whole, other) for other in others), "a validation changes nothing of the training"
    fresh = LandmarkNet.for_model(loaded.model).state_dict()
    assert all(not torch.equal(whole[name], fresh[name]) for name in whole), "all of it learns"
    logs = [read_log(tmp_path / name) for name in ("whole", "pieces")]
    assert logs[0] == logs[1] and [entry["step"] for entry in logs[0]] == [2, 4]
    assert equal(loaded.model.state_dict(), weights), "the base model stays bit by bit"
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_landmarks_of_a_finished_run_work(run, loaded, tmp_path):
    out = tmp_path / "run"
    run(TINY, out, validation=1, validate_every=4)
    assert {path.name for path in out.iterdir()} == {"config.json", "log.jsonl", "state.pt", "landmarks", BEST}
    (entry,) = [entry for entry in read_log(out) if "found" in entry]
    assert set(entry) == {"step", "found", "right"} and set(entry["found"]) <= set(training_families())
    settings = replace(SETTINGS, landmarks=str(out / "landmarks"))
    engine = BiLayerEngine(HFEngine(loaded.model, max_tokens=400), settings)
    assert isinstance(engine.landmarks, LandmarkNet) and equal(engine.landmarks.state_dict(), state(out))
    assert engine.extend(build_key(np.random.default_rng(0).integers(3, 2000, 150), ())).logits.isfinite().all()
    engine.check_integrity()


def test_the_best_validation_is_the_result(run, tmp_path, monkeypatch):
    """Scripted validations: the third is best, by what is found and what is right together."""
    scores = iter([(0.5, 0.1), (0.2, 0.3), (0.4, 0.4), (0.7, 0.0)])

    def scripted(*args, **options):
        found, right = next(scores)
        return {"found": {"facts": found}, "right": {"facts": right}}

    monkeypatch.setattr(acre, "validation_of", scripted)
    run(TINY, tmp_path / "run", validation=1, validate_every=1)
    for _ in range(3):
        run(TINY, tmp_path / "three", seconds=0.0)
    best = load_file(tmp_path / "run" / "landmarks" / WEIGHTS)
    assert equal(best, state(tmp_path / "three")) and not equal(best, state(tmp_path / "run"))


def test_a_validation_is_the_same_each_time(loaded, encoder):
    student = student_of(loaded.model)
    found, again = (validation_of(student, TINY, encoder, n=2) for _ in range(2))
    assert found == again and set(found) == {"found", "right"} and found["found"].keys() == found["right"].keys()
    assert all(0 <= value <= 1 for values in found.values() for value in values.values()) and found["found"]


def test_all_is_found_where_all_is_brought_back(loaded, encoder):
    student, row = student_of(loaded.model), with_evidence(encoder)
    everything, nothing = (replace(row, settings=replace(row.settings, refill=n)) for n in (len(row.ids), 0))
    assert measure(student, [everything])["found"] == 1.0 and measure(student, [nothing])["found"] < 0.2


def test_landmarks_that_are_not_attended_to_learn_to_be_found(run, loaded, tmp_path):
    """Only that: text and answers tell them nothing, so nothing is asked of either."""
    config = replace(TINY, attend=False, pretrain_steps=0, real_share=0.0, rounds=1)
    assert run(config, tmp_path / "run") == 3
    assert {name for entry in read_log(tmp_path / "run") for name in entry} <= {"step", "seconds", "search"}
    net = LandmarkNet.load(tmp_path / "run" / "landmarks", loaded.model, fingerprint_of(loaded.model))
    assert not net.attended
    for name in ("pretrain_steps", "real_share"):
        with pytest.raises(ConfigError, match="text tells them nothing; set attend"):
            replace(config, **{name: 1})


def test_a_folder_belongs_to_one_run(run, loaded, tiny, model_of, tmp_path):
    texts = ["a text " * 200]
    run(TINY, tmp_path / "run", seconds=0.0, texts=texts)
    with pytest.raises(CheckpointError, match=r"another configuration \(learning_rate\)"):
        run(replace(TINY, learning_rate=2e-3), tmp_path / "run", texts=texts)
    other = LoadedModel(model_of(tiny(seed=1)).eval(), loaded.tokenizer, "tiny", is_random=True)
    with pytest.raises(CheckpointError, match=r"another configuration \(base\)"):
        train_acre(other, TINY, tmp_path / "run", texts=texts)
    with pytest.raises(CheckpointError, match=r"another configuration \(text_digest\)"):
        run(TINY, tmp_path / "run")
    given = read_acre_training(tmp_path / "run" / "config.json")
    with pytest.raises(TextError, match="name the same files"):
        run(given, tmp_path / "other")
    with pytest.raises(ConfigError, match="on a model of fingerprint abc, got 'tiny'"):
        run(replace(given, base="abc"), tmp_path / "other", texts=texts)
    assert not (tmp_path / "other").exists()


def test_landmarks_are_trained_further(run, loaded, tiny, model_of, tmp_path):
    run(TINY, tmp_path / "first")
    start = tmp_path / "first" / "landmarks"
    run(replace(TINY, learning_rate=0.0), tmp_path / "same", start=start)
    assert equal(state(tmp_path / "same"), state(tmp_path / "first")), "no step at a learning rate of 0"
    config = replace(TINY, seed=1, finetune_steps=1)
    run(config, tmp_path / "whole", start=start)
    for _ in range(2):
        run(config, tmp_path / "pieces", start=start, seconds=0.0)
    assert equal(state(tmp_path / "whole"), state(tmp_path / "pieces"))
    assert not equal(state(tmp_path / "whole"), state(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=r"another configuration \(start\)"):
        run(config, tmp_path / "whole")
    given = read_acre_training(tmp_path / "whole" / "config.json")
    assert given.start == LandmarkNet.load(start, loaded.model, given.base).identity
    with pytest.raises(ConfigError, match="train trained .* further, got none: name that one's folder"):
        run(given, tmp_path / "other")
    other = LoadedModel(model_of(tiny(seed=1)).eval(), loaded.tokenizer, "tiny", is_random=True)
    with pytest.raises(LandmarkMismatchError, match="trained on model 'tiny'"):
        train_acre(other, TINY, tmp_path / "other", start=start)
    with pytest.raises(LandmarkMismatchError, match="expected trained landmarks in"):
        run(TINY, tmp_path / "other", start=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ratios": [24]}, "every ratio divides, got a window of 32 at 24"),
        ({"lengths": [[0.0, 60]]}, "lengths of at least 98, .* got 60"),
        ({"lengths": []}, "lengths that begin at 0"),
        ({"budgets": []}, "budgets with numbers of at least 1"),
        ({"windows": 512}, "fields of AcreTraining"),
        ({"overlap": 31}, "sinks and overlap together, 35, got 32"),
        ({"overlap": -1}, "overlap of at least 0"),
        ({"rounds": 0}, "rounds of at least 1"),
        ({"real_share": 2}, "real_share from 0 to 1"),
        ({"pretrain_steps": 0, "finetune_steps": 0}, "steps of at least 1"),
        ({"restarts": [[0.0, 1e-3]]}, "restarts at ascending shares"),
        ({"colour": 1}, "fields of AcreTraining.*colour"),
    ],
)
def test_impossible_configurations_are_refused(tmp_path, change, told):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY.to_json(), **change}))
    with pytest.raises(ConfigError, match=told):
        read_acre_training(path)


def test_configurations(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_json()))
    assert read_acre_training(path) == TINY and read_acre_training(path, seed=3) == replace(TINY, seed=3)
    assert read_acre_training(None) == AcreTraining()


def test_a_model_with_too_few_positions_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="needs 40000 positions and model 'tiny' has 32768; give smaller attended"):
        run(replace(TINY, attended=40_000), tmp_path / "run")
    with pytest.raises(ConfigError, match="needs 32973 positions"):  # 4 + 512 + 32_381 + 8 behind landmarks, and so on
        run(replace(TINY, landmark_positions=32_737), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- learning -------------------------------------------------------------------------------------------------------


def test_the_bundled_model_learns_to_look_at_the_evidence():
    """Threads of 512 tokens that it has not seen, one family, a few dozen steps."""
    loaded = load_model("reference")
    encoder = acre.encoder_for(loaded.tokenizer)
    config = replace(
        AcreTraining(), finetune_steps=40, pretrain_steps=0, windows=(128,), ratios=(16,), budgets=(64,), rounds=1,
        text_weight=0.0, most_probes=4,
    )  # fmt: skip
    student, rng = student_of(loaded.model.requires_grad_(False)), random.Random(0)
    rows = (draw_row(config, encoder, 500, rng, families=("needles",)) for _ in iter(int, 1))
    rows = [row for row in islice(rows, 60) if any(row.to_find(question) for question in row.questions)][:42]
    new, optimizer = rows[:6], torch.optim.AdamW(student.net.parameters(), lr=2e-3)

    def search():
        with torch.no_grad():
            return np.mean([float(losses(student, row, config)["search"]) for row in new])

    before, found = search(), measure(student, new)["found"]
    for row in rows[6:]:
        losses(student, row, config)["search"].backward()
        torch.nn.utils.clip_grad_norm_(student.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after, refound = search(), measure(student, new)["found"]
    print(f"search {before:.2f} to {after:.2f}, found {found:.2f} to {refound:.2f}")
    assert after < 0.8 * before and refound > found + 0.15
