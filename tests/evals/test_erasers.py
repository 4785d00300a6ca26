"""The comparison of erasers: its folder, and its figures against plain forward passes, eval_reference and a reader."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from kv_retract.engine.models import load_model
from kv_retract.errors import EraserMismatchError, OutputExistsError, UnknownNameError
from kv_retract.evals import erasers as module
from kv_retract.evals.asking import AskedThread
from kv_retract.evals.eraser_rows import COLUMNS, EXTRACTION_COLUMNS
from kv_retract.evals.erasers import ASK_BACK, EraserEval, eval_erasers, labelled_arms
from kv_retract.evals.jobs import families_of
from kv_retract.evals.reference import ReferenceEval, eval_reference
from kv_retract.evals.specs import Spec, SpecError
from kv_retract.training.corpus import CorpusError, generate
from kv_retract.training.encoding import RowEncoder

spec = spec_from_file_location("reader", Path(__file__).parents[1] / "training" / "reader.py")  # tests are no package
reader = module_from_spec(spec)
spec.loader.exec_module(reader)

TIMES = ("edit_ms", "next_step_ms")


def run(out, *arms, **fields):
    """Evaluate arms (names or specs); return the metrics and the samples by arm."""
    arms = tuple(arm if isinstance(arm, Spec) else Spec(arm) for arm in arms)
    metrics = eval_erasers(EraserEval(**{"out": out, "lengths": (64,), "n": 2, "arms": arms, **fields}))
    by_arm = {}
    for line in (out / "samples.jsonl").read_text().splitlines():
        by_arm.setdefault(json.loads(line)["arm"], []).append(json.loads(line))
    return metrics, by_arm


@pytest.fixture(scope="module")
def blind(make_eraser, learnt_model):
    return Spec("kveraser", {"path": str(make_eraser("blind", learnt_model))})


@pytest.fixture(scope="module")
def found(learnt_model, blind, tmp_path_factory):
    """The two traces that the model knows by heart, under four arms: folder, metrics, samples, ticks of progress."""
    out, ticks = tmp_path_factory.mktemp("erasers") / "out", []
    arms = (Spec("none"), Spec("mask"), Spec("recompute"), blind)
    metrics = eval_erasers(
        EraserEval(out=out, model=str(learnt_model), tasks=("needles",), lengths=(64,), n=2, arms=arms),
        progress=lambda done, total: ticks.append((done, total)),
    )
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return out, metrics, samples, ticks


def overall(metrics):
    rows = metrics["rows"]
    return {r["arm"]: r for r in rows if r["task"] == r["length"] == r["span_length"] == r["depth"] == "all"}


# -- the folder -----------------------------------------------------------------------------------------------------


def test_the_folder(found, blind):
    out, metrics, samples, ticks = found
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.json", "samples.jsonl"]
    assert list(out.parent.iterdir()) == [out], "no draft stays"
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    config = json.loads((out / "config.json").read_text())
    assert config == metrics["config"] and config["columns"] == COLUMNS
    assert config["extraction_columns"] == EXTRACTION_COLUMNS
    values = ("model", "tasks", "lengths", "n", "split", "seed", "dtype", "max_probes")
    assert [config[name] for name in values] == ["learnt", ["needles"], [64], 2, "test", 0, "float32", 4]
    assert config["num_parameters"] > 1e5 and config["seconds"] > 0 and config["versions"]["torch"]
    assert ticks == [(1, 2), (2, 2)]
    assert len(samples) == 8 and set(metrics) == {"config", "rows", "paired", "extraction"}


def test_recompute_is_first_and_only_once(found, blind):
    arms = ["recompute", "none", "mask", 'kveraser:variant="blind"']
    assert found[1]["config"]["arms"] == arms and list(overall(found[1])) == arms
    assert [sample["arm"] for sample in found[2]] == arms * 2
    given = [Spec("mask"), Spec("recompute"), Spec("none")]
    assert [label for label, _ in labelled_arms(given)] == ["recompute", "mask", "none"]
    assert [label for label, _ in labelled_arms([])] == ["recompute"] and len(given) == 3


def test_what_the_model_knows_by_heart(found, blind):
    rows = overall(found[1])
    shares = ("affected_accuracy", "leak", "unaffected_accuracy")
    assert [rows["recompute"][name] for name in shares] == [1.0, 0.0, 1.0]
    assert [rows["none"][name] for name in shares] == [0.0, 1.0, 1.0]
    assert (rows["recompute"]["kl"], rows["recompute"]["top1"]) == (0.0, 1.0)
    assert rows["none"]["kl"] > 0.1 and rows["none"]["top1"] < 1
    assert rows["mask"]["kl"] != rows["none"]["kl"] != rows['kveraser:variant="blind"']["kl"]
    assert all(row["edit_ms_median"] > 0 and row["next_step_ms_median"] > 0 for row in rows.values())


# -- against a plain forward pass -----------------------------------------------------------------------------------


class Plain:
    """What a model says to ids, without any cache."""

    def __init__(self, folder):
        loaded = load_model(str(folder))
        self.model, self.tokenizer, self.encoder = loaded.model, loaded.tokenizer, RowEncoder(loaded.tokenizer)

    @torch.inference_mode()
    def logs(self, before, ids):
        """Log-probabilities where each of `ids` would follow."""
        logits = self.model(input_ids=torch.from_numpy(np.concatenate([before, ids]))[None]).logits[0]
        return logits[len(before) - 1 : -1].log_softmax(-1).double()

    def says(self, thread, question, answer):
        asked, told = self.encoder.probe(question, answer)
        logs = self.logs(np.concatenate([thread, asked]), told[:-1])
        return logs.argmax(-1).tolist() == told[:-1].tolist(), float(logs[range(len(told) - 1), told[:-1]].sum())

    def decode(self, thread, question, n, end=None):
        ids = np.concatenate([thread, self.encoder.probe(question, "")[0]])
        given = []
        while len(given) < n and (not given or given[-1] != end):
            given.append(int(self.logs(ids, np.array([0]))[0].argmax()))
            ids = np.append(ids, given[-1])
        return np.array(given)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("arm", ["none", "recompute"])
def test_every_figure_is_that_of_plain_forward_passes(found, learnt_model, trace_of, arm, number):
    sample, plain = trace_of(number), Plain(learnt_model)
    (mine,) = (s for s in found[2] if s["arm"] == arm and s["sample_id"] == sample.sample_id)
    span = sample.span(f"needle-{number}")
    ids, tokens_of = plain.encoder.thread(sample)
    start, end = tokens_of(span.ref)
    without = np.concatenate([ids[:start], ids[end:]])
    thread = ids if arm == "none" else without
    hit = [p for p in sample.probes if span.span_id in p.without]
    others = [p for p in sample.probes if span.span_id not in p.without]
    assert mine["affected"] == [plain.says(thread, p.question, p.without[span.span_id])[0] for p in hit]
    assert mine["leaked"] == [plain.says(thread, p.question, p.answer)[0] for p in hit]
    assert mine["unaffected"] == [plain.says(thread, p.question, p.answer)[0] for p in others]
    assert (mine["task"], mine["kind"], mine["length"]) == ("needles", "needle", 64)
    assert (mine["span_length"], mine["depth"]) == (end - start, start / len(ids))
    assert mine["tokens_recomputed"] == (0 if arm == "none" else len(ids) - end)

    asked = plain.encoder.probe(hit[0].question, "")[0]
    ahead = plain.decode(without, hit[0].question, module.AHEAD)
    expected, given = (plain.logs(np.concatenate([t, asked]), ahead) for t in (without, thread))
    assert mine["kl"] == pytest.approx(float((expected.exp() * (expected - given)).sum(-1).mean()), abs=1e-3)
    assert mine["top1"] == pytest.approx(float((expected.argmax(-1) == given.argmax(-1)).double().mean()), abs=1e-6)

    value = hit[0].answer.removesuffix(".").split()[-1]
    decoy = module._decoy(" ".join(message.content for message in sample.messages))
    true, false = (
        plain.says(thread, hit[0].question, text)[1]
        for text in (hit[0].answer, hit[0].answer.replace(f"{value}.", f"{decoy}."))
    )
    assert mine["likelier"] == (true > false)
    prompts = [prompt.format(subject=span.subject) for prompt in ASK_BACK]
    told = [plain.tokenizer.decode(plain.decode(thread, p, 32, plain.tokenizer.eos_token_id)) for p in prompts]
    assert mine["extracted"] == any(re.search(rf"\b{value}\b", text) for text in told)


def test_a_learned_eraser_pays_for_the_span_only(found, blind):
    for sample in found[2]:
        if sample["arm"] == 'kveraser:variant="blind"':
            assert sample["tokens_recomputed"] == sample["span_length"]


def test_shares_are_those_of_eval_reference(found, learnt_model, tmp_path):
    settings = ReferenceEval(
        out=tmp_path / "reference", model=str(learnt_model), families=("needles",), lengths=(64,), n=2
    )
    decoded = {row["arm"]: row for row in eval_reference(settings)["rows"] if row["arm"] != "clean"}
    assert set(decoded) == {"none", "mask", "recompute"}
    for arm, row in decoded.items():
        mine = overall(found[1])[arm]
        assert (row["accuracy"], row["leak"]) == (mine["affected_accuracy"], mine["leak"])
    answers = [json.loads(line) for line in (tmp_path / "reference" / "samples.jsonl").read_text().splitlines()]
    for sample in found[2][:3]:
        given = [a for a in answers if (a["sample_id"], a["arm"]) == (sample["sample_id"], sample["arm"])]
        assert sample["affected"] == [a["right"] for a in given if a["affected"]]
        assert sample["leaked"] == [a["leaked"] for a in given if a["affected"]]
        assert sample["unaffected"] == [a["right"] for a in given if not a["affected"]]


# -- against a scripted reader, on all families ---------------------------------------------------------------------


class ScriptedReader(AskedThread):
    """Scripted, no model: `recompute` forgets exactly what was retracted, other erasers nothing."""

    gone = None

    def retract(self, span_ids, *rest):
        if self._session.eraser.name == "recompute":
            (self.gone,) = span_ids
        return super().retract(span_ids, *rest)

    def says(self, question, answer):
        messages = self.sample.without(self.gone) if self.gone else self.sample.messages
        return reader.Reader(messages).answer(question) == answer, 0.0


def test_a_scripted_reader_is_always_right(monkeypatch, tmp_path):
    """So the span that goes is one that its probes are about, and what is expected follows from the rest."""
    monkeypatch.setattr(module, "AskedThread", ScriptedReader)
    monkeypatch.setattr(module, "AHEAD", 4)
    metrics, by_arm = run(tmp_path / "out", "none", model="random", extraction=False, max_probes=4)
    assert metrics["config"]["tasks"] == list(families_of((), "test")) and len(by_arm["none"]) == 16
    for sample in by_arm["recompute"]:
        assert all(sample["affected"]) and not any(sample["leaked"]) and all(sample["unaffected"])
    for sample in by_arm["none"]:
        assert not any(sample["affected"]) and all(sample["leaked"]) and all(sample["unaffected"])
        assert len(sample["affected"]) in (1, 2) and len(sample["affected"]) + len(sample["unaffected"]) <= 4
    assert {len(sample["unaffected"]) for sample in by_arm["none"]} > {0}
    assert {sample["extracted"] for sample in by_arm["none"]} == {sample["likelier"] for sample in by_arm["none"]}
    assert metrics["extraction"][0] == {
        "arm": "recompute", "n": 0, "likelier": None, "likelier_se": None, "extracted": None, "extracted_se": None
    }  # fmt: skip


# -- extraction -----------------------------------------------------------------------------------------------------


def test_the_decoy_is_a_value_that_the_text_does_not_hold():
    texts = ["", "Kel", " ".join(f"the {module._decoy('x' * i)}" for i in range(40))]
    for text in texts:
        decoy = module._decoy(text)
        assert decoy not in text and decoy == module._decoy(text) and re.fullmatch("[A-Z][a-z]+", decoy)
    assert len({module._decoy("x" * i) for i in range(40)}) == 40


def test_no_value_was_retracted_where_a_withdrawal_went(monkeypatch, tmp_path):
    """Without the withdrawal the model must tell a value; with it it does not know one, so there is none to get."""
    monkeypatch.setattr(module, "AHEAD", 1)
    _, by_arm = run(tmp_path / "out", "none", model="random", tasks=("preferences",), n=12)
    withdrawals = [sample for sample in by_arm["none"] if sample["kind"] == "withdrawal"]
    assert withdrawals and all(sample["likelier"] is sample["extracted"] is None for sample in withdrawals)


def test_the_value_is_one_that_the_span_told(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "AHEAD", 1)
    monkeypatch.setattr(module, "ASK_BACK", ())
    seen = []

    class Watched(module._Trace):
        def _value(self):
            seen.append((super()._value(), self._sample, self._span))
            return seen[-1][0]

    monkeypatch.setattr(module, "_Trace", Watched)
    run(tmp_path / "out", model="random", tasks=("relations", "facts", "injections"), n=4)
    for value, sample, span in seen:
        text = sample.messages[span.ref.message].content[span.ref.start : span.ref.end]
        assert value is None or re.search(rf"\b{value}\b", text), span.span_id
    assert [value for value, *_ in seen if value]


# -- what cannot be measured ----------------------------------------------------------------------------------------


def test_results_are_never_overwritten(found, learnt_model):
    before = (found[0] / "metrics.json").read_text()
    with pytest.raises(OutputExistsError, match="never overwritten"):
        run(found[0], "none", model=str(learnt_model), tasks=("needles",))
    assert (found[0] / "metrics.json").read_text() == before


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"tasks": ("nope",)}, UnknownNameError, "unknown task family 'nope'; known: documents"),
        ({"arms": (Spec("nope"),)}, UnknownNameError, "unknown eraser 'nope'; known: .*recompute"),
        ({"arms": (Spec("repair", {"width": 3}),)}, SpecError, "repair:width=3"),
        ({"arms": (Spec("kveraser", {"path": "nowhere"}),)}, EraserMismatchError, "kv-retract train eraser"),
    ],
)
def test_unknown_parts_are_told_before_any_work(tmp_path, fields, error, told):
    """Before a model is loaded too: the one asked for is not there either."""
    settings = EraserEval(out=tmp_path / "out", model="no-such-model", **{"lengths": (64,), "n": 1, **fields})
    with pytest.raises(error, match=told):
        eval_erasers(settings, progress=lambda *_: pytest.fail("work was done"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"model": "nope"}, UnknownNameError, "a registered model"),
        ({"split": "dev"}, CorpusError, "a split of train, test"),
        ({"split": "train", "tasks": ("documents",)}, CorpusError, "held out"),
        ({"lengths": (20,)}, CorpusError, "at least 64"),
    ],
)
def test_settings_that_cannot_be_leave_nothing_behind(tmp_path, fields, error, told):
    with pytest.raises(error, match=told):
        run(tmp_path / "out", "none", **{"model": "random", "n": 1, **fields})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["blind", "suffix_aware", "kv_map"])
def test_an_eraser_of_another_model_is_refused(make_eraser, learnt_model, tmp_path, variant):
    arm = Spec("kveraser", {"path": str(make_eraser(variant, "random"))})
    with pytest.raises(EraserMismatchError, match=f"'{variant}' was trained on .*kv-retract train eraser --model"):
        run(tmp_path / "out", arm, model=str(learnt_model), tasks=("needles",), n=1)
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_figures_and_another_one_others(found, blind, learnt_model, tmp_path):
    arms = ("none", "mask", blind)
    again, other = (
        run(tmp_path / str(seed), *arms, model=str(learnt_model), tasks=("needles",), seed=seed)[1] for seed in (0, 1)
    )

    def timeless(samples):
        return [{name: value for name, value in sample.items() if name not in TIMES} for sample in samples]

    for arm, samples in again.items():
        assert timeless(samples) == timeless(s for s in found[2] if s["arm"] == arm)
        assert timeless(other[arm]) != timeless(samples)
    assert [s["sample_id"] for s in other["none"]] == [
        generate("needles", seed=seed, length=64, split="test").sample_id for seed in (1, 2)
    ]
