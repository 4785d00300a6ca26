"""The commands that make traces and models, and that measure a model on the corpus."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from kv_retract.cli import app
from kv_retract.engine.models import load_model
from kv_retract.engine.working import fingerprint_of
from kv_retract.landmarks import LandmarkNet
from kv_retract.trace import read_traces
from kv_retract.training.corpus import generate
from kv_retract.training.samples import CorpusSample

PROGRAM = [sys.executable, "-c", "from kv_retract.cli import main; main()"]
TINY = {
    "hidden_size": 48, "intermediate_size": 32, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16,
    "steps": 3, "batch_tokens": 128, "lengths": [[0.0, 96]], "warmup": 1, "families": ["needles"],
}  # fmt: skip

ACRE = {
    "pretrain_steps": 1, "finetune_steps": 1, "lengths": [[0.0, 256]], "attended": 256, "windows": [32, 64],
    "ratios": [8, 16], "budgets": [32], "overlap": 8, "landmark_positions": 32, "queries": 16, "most_probes": 2,
    "attend": True,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


def process(*arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("corpus",), ("--out", "--family", "--length", "--seed", "--n", "--split", "--json")),
        (("train",), ("reference", "acre")),
        (("train", "reference"), ("--out", "--config", "--device", "--compile", "--minutes", "--json")),
        (("train", "acre"), ("--out", "--model", "--config", "--text", "--from", "--device", "--dtype", "--minutes")),
        (("eval",), ("reference",)),
        (("eval", "reference"), ("--out", "--model", "--family", "--length", "--n", "--split", "--workers", "--json")),
    ],
)
def test_help(command, told):
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0 and all(word in done.output for word in told)


# -- corpus ---------------------------------------------------------------------------------------------------------


def test_corpus_writes_traces(kv_retract, tmp_path):
    out = tmp_path / "new" / "c.jsonl"
    code, text, err = kv_retract("corpus", "--family", "updates", "--length", 300, "--n", 3, "--seed", 7, "--out", out)
    assert (code, text, err) == (0, f"3 traces of 'updates' written to {out}\n", "")
    made = [CorpusSample.from_json(json.loads(line)) for line in out.read_text().splitlines()]
    assert made == [generate("updates", seed=seed, length=300, split="test") for seed in (7, 8, 9)]
    assert [tuple(trace.messages) for trace in read_traces(out)] == [sample.messages for sample in made]


def test_corpus_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "c.jsonl"
    done = process("corpus", "--out", out, "--n", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"out": str(out), "family": "facts", "n": 2}
    made = [CorpusSample.from_json(json.loads(line)) for line in out.read_text().splitlines()]
    assert made == [generate("facts", seed=seed, length=1024, split="test") for seed in (0, 1)]


# -- train ----------------------------------------------------------------------------------------------------------


def test_a_run_is_stopped_resumed_and_measured(kv_retract, config, tmp_path):
    out = tmp_path / "run"
    train = ("train", "reference", "--config", config, "--out", out)
    code, text, err = kv_retract(*train, "--minutes", 0)
    assert (code, err) == (0, "") and text == "1 of 3 steps, stopped; the same command goes on\n"
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "loss.svg", "state.pt"]
    code, text, _ = kv_retract(*train, "--json")
    assert code == 0 and json.loads(text) == {"out": str(out), "steps": 3, "finished": True}
    assert {p.name for p in (out / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "clean" in json.loads((out / "log.jsonl").read_text().splitlines()[-1]), "validated at the end"

    results = tmp_path / "results"
    options = ("--length", 128, "--n", 1, "--family", "facts", "--out", results)
    code, text, _ = kv_retract("eval", "reference", "--model", out / "model", *options)
    assert code == 0 and "Model model (0.1 M parameters), split test" in text and "recompute" in text
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["config"]["lengths"] == [128] and [row["arm"] for row in metrics["rows"]][0] == "clean"
    code, text, err = kv_retract("eval", "reference", "--model", out / "model", *options)
    assert code == 2 and "never overwritten" in err and text == ""


def test_train_in_a_process_of_its_own(config, tmp_path):
    out = tmp_path / "run"
    done = process("train", "reference", "--config", config, "--out", out, "--minutes", 0.01)
    assert done.returncode == 0 and "error" not in done.stderr and "of 3 steps" in done.stdout
    again = process("train", "reference", "--config", config, "--out", out)
    assert again.returncode == 0 and again.stdout == f"3 of 3 steps, finished: {out / 'model'}\n"


def test_landmarks_are_trained_stopped_and_trained_further(kv_retract, tmp_path):
    config, text, out = tmp_path / "acre.json", tmp_path / "text.txt", tmp_path / "run"
    write(config, json.dumps(ACRE))
    write(text, "The cat sat on the mat. " * 60)
    train = ("train", "acre", "--model", "random", "--config", config, "--text", text, "--out")
    code, told, err = kv_retract(*train, out, "--minutes", 0)
    assert (code, err, told) == (0, "", "1 of 2 steps, stopped; the same command goes on\n")
    code, told, err = kv_retract(*train, out, "--json")
    assert (code, err) == (0, "") and json.loads(told) == {"out": str(out), "steps": 2, "finished": True}
    assert {path.name for path in out.iterdir()} >= {"config.json", "log.jsonl", "loss.svg", "state.pt", "landmarks"}
    assert "found" in json.loads((out / "log.jsonl").read_text().splitlines()[-1]), "validated at the end"
    ET.fromstring((out / "loss.svg").read_text())
    loaded = load_model("random")
    net = LandmarkNet.load(out / "landmarks", loaded.model, fingerprint_of(loaded.model))

    code, told, err = kv_retract(*train, tmp_path / "more", "--from", out / "landmarks", "--minutes", 0)
    assert (code, err) == (0, "")
    begun = json.loads((tmp_path / "more" / "config.json").read_text())
    assert begun["start"] == net.identity and begun["base"] == fingerprint_of(loaded.model) and begun["text_digest"]
    code, told, err = kv_retract(*train, tmp_path / "more")
    assert code == 2 and told == "" and "another configuration (start)" in err and err.count("\n") == 1


def test_eval_prints_one_document(kv_retract, monkeypatch, tmp_path):
    seen = []

    def run(settings, progress):
        seen.append(settings)
        return {"config": {}, "rows": []}

    monkeypatch.setattr("kv_retract.evals.reference.eval_reference", run)
    code, text, err = kv_retract(
        "eval", "reference", "--model", "m", "--family", "facts", "--family", "errors", "--length", 100,
        "--length", 200, "--n", 3, "--split", "train", "--seed", 9, "--dtype", "bfloat16", "--out", tmp_path / "o",
        "--json",
    )  # fmt: skip
    assert (code, err) == (0, "") and json.loads(text) == {"config": {}, "rows": []}
    (settings,) = seen
    assert (settings.model, settings.families, settings.lengths) == ("m", ("facts", "errors"), (100, 200))
    assert (settings.n, settings.split, settings.seed, settings.dtype) == (3, "train", 9, "bfloat16")
    kv_retract("eval", "reference", "--model", "m", "--json")
    assert seen[1].families == () and seen[1].lengths == (256, 1024, 2048) and seen[1].out.name.startswith("eval-")


# -- what a caller can get wrong ------------------------------------------------------------------------------------


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("corpus", "--out", "{0}/c", "--family", "nope"), "unknown task family 'nope'; known: documents, errors"),
        (("corpus", "--out", "{0}/c", "--split", "dev"), "expected a split of train, test, got 'dev'"),
        (("corpus", "--out", "{0}/c", "--split", "train", "--family", "documents"), "held out"),
        (("corpus", "--out", "{0}/c", "--length", "10"), "kv-retract corpus --help"),
        (("corpus", "--out", "{0}/there"), "never overwritten"),
        (("corpus",), "Missing option '--out'"),
        (("train", "reference"), "Missing option '--out'"),
        (("train", "reference", "--out", "{0}/run", "--config", "{0}/no.json"), "no.json"),
        (("train", "reference", "--out", "{0}/run", "--config", "{0}/there"), "fields of ReferenceConfig"),
        (("train", "reference", "--out", "{0}/there", "--minutes", "0"), "cannot use '{0}/there' for a run"),
        (("train", "reference", "--out", "{0}/other", "--minutes", "0"), "another configuration"),
        (("train", "reference", "--out", "{0}/run", "--minutes", "-1"), "kv-retract train reference --help"),
        (("train", "reference", "--out", "{0}/run", "--device", "nope", "--minutes", "0"), "nope"),
        (("train", "acre"), "Missing option '--out'"),
        (("train", "acre", "--out", "{0}/run", "--config", "{0}/there"), "fields of AcreTraining"),
        (("train", "acre", "--out", "{0}/run", "--model", "nope"), "a registered model"),
        (("train", "acre", "--out", "{0}/run", "--text", "{0}/no.txt"), "cannot read text of"),
        (("train", "acre", "--out", "{0}/run", "--model", "random", "--from", "{0}/no"), "expected trained landmarks"),
        (("train", "acre", "--out", "{0}/other", "--model", "random", "--minutes", "0"), "another configuration"),
        (("train", "acre", "--out", "{0}/run", "--minutes", "-1"), "kv-retract train acre --help"),
        (("eval", "reference", "--out", "{0}/o", "--model", "nope"), "a registered model"),
        (("eval", "reference", "--out", "{0}/o", "--family", "nope", "--model", "random"), "unknown task family"),
        (("eval", "reference", "--out", "{0}/o", "--split", "dev", "--model", "random"), "expected a split of"),
        (("eval", "reference", "--out", "{0}/o", "--length", "9", "--model", "random"), "at least 64 tokens"),
        (("eval", "reference", "--out", "{0}/there", "--model", "random"), "never overwritten"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(kv_retract, tmp_path, arguments, told):
    write(tmp_path / "there", "mine")
    write(tmp_path / "other" / "config.json", "{}")
    code, text, err = kv_retract(*(argument.format(tmp_path) for argument in arguments))
    assert code == 2 and text == "" and err.startswith("error: ") and err.count("\n") == 1
    assert told.format(tmp_path) in err
    assert (tmp_path / "there").read_text() == "mine"
    left = {path.name for path in tmp_path.iterdir()} - {"there", "other"}
    assert not left, "nothing half-made stays behind"
