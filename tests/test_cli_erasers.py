"""The commands of learned erasers, on the random model and as small as they go."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kv_retract.cli import app
from kv_retract.engine.models import load_model
from kv_retract.engine.working import fingerprint_of
from kv_retract.erasers.kveraser import KVEraserEraser
from kv_retract.evals import repeated
from kv_retract.training import eraser as eraser_training
from kv_retract.training.texts import digest_of, read_texts

PROGRAM = [sys.executable, "-c", "from kv_retract.cli import main; main()"]
SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "tau_bench_airline_sample.jsonl"
TINY = {"pretrain_steps": 1, "finetune_steps": 1, "batch_tokens": 256, "lengths": [[0.0, 200]], "rank": 2}
REFERENCE = {
    "hidden_size": 48, "intermediate_size": 32, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16,
    "steps": 20, "batch_tokens": 128, "lengths": [[0.0, 96]], "warmup": 1, "families": ["needles"], "real_share": 1.0,
}  # fmt: skip


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Folder of an eraser that `train eraser` made for the random model, stopped after a step and resumed."""
    folder = tmp_path_factory.mktemp("train")
    config = write(folder / "config.json", TINY)
    train = ["train", "eraser", "--model", "random", "--dtype", "float32", "--variant", "blind", "--json"]
    train += ["--config", str(config), "--out", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eraser_training, "training_families", lambda: ["needles"])
        for steps, more in ((1, ["--minutes", "0"]), (2, ["--workers", "1"])):
            done = CliRunner().invoke(app, [*train, *more])
            assert (done.exit_code, done.stderr) == (0, "")
            told = {"out": str(folder / "run"), "steps": steps, "finished": steps == 2}
            assert json.loads(done.stdout) == told and (folder / "run" / "eraser").is_dir() == told["finished"]
    return folder / "run" / "eraser"


@pytest.fixture
def arm(learned):
    return f"kveraser:path={learned}"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("eval",), ("erasers", "repeated")),
        (("bench",), ("latency", "shared")),
        (("train",), ("eraser",)),
        (("eval", "erasers"), ("--task", "--length", "--arm", "--n", "--workers", "--split", "--out", "--json")),
        (("eval", "repeated"), ("--edits", "--arm", "--n", "--workers", "--split", "--out", "--json")),
        (("bench", "latency"), ("--context", "--depth", "--span", "--arm", "--repeats", "--out", "--json")),
        (("bench", "shared"), ("--threads", "--prefix", "--span", "--suffix", "--arm", "--out", "--json")),
        (("train", "eraser"), ("--out", "--model", "--variant", "--stage", "--config", "--text", "--minutes")),
        (("train", "reference"), ("--text",)),
    ],
)
def test_help(command, told):
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0 and all(word in done.output for word in told)


# -- train ----------------------------------------------------------------------------------------------------------


def test_a_trained_eraser_belongs_to_its_model(learned):
    run = learned.parent
    assert {path.name for path in run.iterdir()} >= {"config.json", "log.jsonl", "loss.svg", "state.pt", "eraser"}
    assert sorted(path.name for path in learned.iterdir()) == ["config.json", "eraser.safetensors"]
    ET.fromstring((run / "loss.svg").read_text())
    config = json.loads((run / "config.json").read_text())
    assert {name: config[name] for name in ("variant", "rank", "pretrain_steps")} == {
        "variant": "blind", "rank": 2, "pretrain_steps": 1
    }  # fmt: skip
    eraser = KVEraserEraser(path=str(learned))
    assert (eraser.variant, eraser.config.base) == ("blind", "random")
    eraser.config.check_base(fingerprint_of(load_model("random").model))
    assert "leak" in json.loads((run / "log.jsonl").read_text().splitlines()[-1]), "validated at the end"


def test_options_of_training_go_before_the_file(kv_retract, tmp_path):
    config = write(tmp_path / "config.json", {**TINY, "variant": "blind", "stage": "both", "hidden": 4})
    text = write(tmp_path / "text.txt", "The cat sat on the mat. " * 60)
    options = ("--variant", "kv_map", "--stage", "pretrain", "--text", text, "--text", SAMPLE, "--minutes", 0)
    train = (
        "train",
        "eraser",
        "--model",
        "random",
        "--dtype",
        "float32",
        "--config",
        config,
        "--out",
        tmp_path / "run",
    )
    train_on_one = (*train, *options[:6], *options[8:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eraser_training, "training_families", lambda: ["needles"])
        code, out, err = kv_retract(*train, *options)
        assert (code, err) == (0, "") and out == f"1 of 1 steps, finished: {tmp_path / 'run' / 'eraser'}\n"
        found = json.loads((tmp_path / "run" / "config.json").read_text())
        assert (found["variant"], found["stage"], found["hidden"]) == ("kv_map", "pretrain", 4)
        assert found["text_digest"] == digest_of(read_texts([text, SAMPLE])) != ""
        code, out, err = kv_retract(*train_on_one)
    assert code == 2 and out == "" and "another configuration (text_digest)" in err


def test_a_reference_model_learns_text(kv_retract, tmp_path):
    config = write(tmp_path / "config.json", REFERENCE)
    train = ("train", "reference", "--config", config, "--out", tmp_path / "run")
    code, out, _ = kv_retract(*train, "--text", SAMPLE, "--json")
    assert code == 0 and json.loads(out) == {"out": str(tmp_path / "run"), "steps": 20, "finished": True}
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert found["text_digest"] == digest_of(read_texts([SAMPLE])) != ""
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["text"] > 1 and "answer" not in first, "rows are pieces of the text only, which asks nothing"
    code, out, err = kv_retract(*train)
    assert code == 2 and out == "" and "another configuration (text_digest)" in err


# -- eval -----------------------------------------------------------------------------------------------------------


def test_eval_erasers(kv_retract, tmp_path, arm, learned):
    sizes = ("--model", "random", "--task", "needles", "--length", 64, "--n", 1, "--arm", "mask", "--arm", arm)
    code, out, err = kv_retract("eval", "erasers", *sizes, "--out", tmp_path / "a", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "") and document == json.loads((tmp_path / "a" / "metrics.json").read_text())
    label = 'kveraser:variant="blind"'
    assert document["config"]["arms"] == ["recompute", "mask", label]
    assert [row["arm"] for row in document["extraction"]] == ["recompute", "mask", label]
    code, out, err = kv_retract("eval", "erasers", *sizes, "--out", tmp_path / "b")
    assert (code, err) == (0, "") and "Model random, split test, 1 traces per task and length" in out
    assert label in out and "recompute" in out and "\x1b" not in out
    code, out, err = kv_retract("eval", "erasers", *sizes, "--out", tmp_path / "b")
    assert code == 2 and out == "" and "never overwritten" in err


def test_eval_erasers_in_a_process_of_its_own(tmp_path):
    arguments = ("--model", "random", "--task", "needles", "--length", "64", "--n", "1", "--arm", "none", "--json")
    done = subprocess.run(
        [*PROGRAM, "eval", "erasers", *arguments], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("erasers-")
    assert json.loads(done.stdout) == json.loads((folder / "metrics.json").read_text())


def test_eval_repeated(kv_retract, tmp_path, arm, monkeypatch):
    monkeypatch.setattr(repeated, "SURVIVORS", 1)
    monkeypatch.setattr(repeated, "AHEAD", 8)
    sizes = ("--model", "random", "--edits", 2, "--n", 1)
    code, out, err = kv_retract("eval", "repeated", *sizes, "--arm", arm, "--out", tmp_path / "a", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "") and document == json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert {(row["mode"], row["edits"]) for row in document["rows"]} == {(mode, 2) for mode in repeated.MODES}
    assert (tmp_path / "a" / "repeated.svg").is_file()
    code, out, err = kv_retract("eval", "repeated", *sizes, "--arm", "mask", "--out", tmp_path / "b")
    assert (code, err) == (0, "") and "after healing" in out and "recompute" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("command", "module", "name", "expected"),
    [
        (
            "erasers", "kv_retract.evals.erasers", "eval_erasers",
            {"tasks": ("facts", "errors"), "lengths": (100, 200), "model": "m", "n": 3, "split": "train", "seed": 9},
        ),
        (
            "repeated", "kv_retract.evals.repeated", "eval_repeated",
            {"edits": (100, 200), "model": "m", "n": 3, "split": "train", "seed": 9},
        ),
    ],
)  # fmt: skip
def test_eval_passes_every_option_on(kv_retract, monkeypatch, command, module, name, expected):
    seen = []
    monkeypatch.setattr(f"{module}.{name}", lambda settings, progress: seen.append(settings) or {"rows": []})
    options = ["--model", "m", "--n", 3, "--split", "train", "--seed", 9, "--dtype", "bfloat16", "--workers", 2]
    options += ["--task", "facts", "--task", "errors"] if "tasks" in expected else []
    size = "--length" if "tasks" in expected else "--edits"
    arms = ["-a", "mask,repair:tokens=3", "-a", "kveraser:path=/x"]
    code, out, err = kv_retract("eval", command, *options, size, 100, size, 200, *arms, "--out", "o", "--json")
    assert (code, err, json.loads(out)) == (0, "", {"rows": []})
    (settings,) = seen
    assert {field: getattr(settings, field) for field in expected} == expected
    assert [arm.label for arm in settings.arms] == ["mask", "repair:tokens=3", 'kveraser:path="/x"']
    assert (settings.dtype, settings.workers, settings.device, settings.out) == ("bfloat16", 2, "cpu", Path("o"))
    kv_retract("eval", command, "--json")
    defaults = seen[1]
    assert defaults.out.name.startswith(f"{command}-") and defaults.model == "reference"
    assert defaults == type(defaults)(out=defaults.out), "the command has the defaults of the library"


# -- bench ----------------------------------------------------------------------------------------------------------


def test_bench_latency(kv_retract, tmp_path, arm):
    sizes = ("--model", "random", "--context", 64, "--context", 128, "--depth", 0.5, "--span", 8, "--repeats", 1)
    code, out, err = kv_retract("bench", "latency", *sizes, "-a", arm, "--json", "--out", tmp_path / "new" / "l.json")
    document = json.loads(out)
    assert (code, err) == (0, "") and document == json.loads((tmp_path / "new" / "l.json").read_text())
    assert [(row["context"], row["depth"]) for row in document["rows"]] == [(64, 0.5)] * 2 + [(128, 0.5)] * 2
    assert [row["arm"].partition(":")[0] for row in document["growth"]] == ["kveraser", "recompute"]
    code, out, err = kv_retract("bench", "latency", *sizes, "-a", "mask")
    assert (code, err) == (0, "") and "times as fast as recompute" in out and "mask" in out and "\x1b" not in out


def test_bench_shared(kv_retract, tmp_path, arm):
    sizes = ("--model", "random", "--threads", 3, "--prefix", 16, "--span", 8, "--suffix", 8)
    code, out, err = kv_retract("bench", "shared", *sizes, "-a", arm, "--json", "--out", tmp_path / "s.json")
    document = json.loads(out)
    assert (code, err) == (0, "") and document == json.loads((tmp_path / "s.json").read_text())
    (found,) = document["arms"].values()
    assert (document["threads"], found["tokens_written_first"], found["tokens_written_all"]) == (3, 8, 8)
    code, out, err = kv_retract("bench", "shared", *sizes, "-a", "recompute")
    assert (code, err) == (0, "") and "first ms" in out and "recompute" in out


# -- what a caller can get wrong ------------------------------------------------------------------------------------

NO_MODEL = ("a registered model", "nothing is downloaded")
NO_ERASER = ("a learned eraser in", "kv-retract train eraser")
MISTAKES = {
    "erasers: no such task": (["eval", "erasers", "--task", "nope", "-a", "mask"], ("family 'nope'", "known: doc")),
    "erasers: no such arm": (["eval", "erasers", "-a", "nope"], ("unknown eraser 'nope'", "known:", "kveraser")),
    "erasers: no such folder": (["eval", "erasers", "-a", "kveraser:path=no"], NO_ERASER),
    "erasers: no such variant": (["eval", "erasers", "-a", "kveraser:variant=x"], ("blind, suffix_aware, kv_map",)),
    "erasers: no such model": (["eval", "erasers", "-a", "mask", "--model", "nope"], NO_MODEL),
    "erasers: existing folder": (["eval", "erasers", "-a", "mask", "--out", "taken"], ("never overwritten",)),
    "erasers: no such split": (
        ["eval", "erasers", "-a", "mask", "--model", "random", "--split", "dev"], ("train, test, got 'dev'",)
    ),
    "erasers: short": (["eval", "erasers", "-a", "mask", "--model", "random", "--length", 9], ("at least 64 tokens",)),
    "erasers: no traces": (["eval", "erasers", "--n", 0], ("eval erasers --help",)),
    "repeated: no such arm": (["eval", "repeated", "-a", "nope"], ("unknown eraser 'nope'",)),
    "repeated: no such folder": (["eval", "repeated", "-a", "kveraser:path=no"], NO_ERASER),
    "repeated: no edits": (["eval", "repeated", "--edits", 0], ("'--edits'", "eval repeated --help")),
    "repeated: existing folder": (["eval", "repeated", "-a", "mask", "--out", "taken"], ("never overwritten",)),
    "latency: no such arm": (["bench", "latency", "-a", "nope"], ("unknown eraser 'nope'",)),
    "latency: no such model": (["bench", "latency", "-a", "mask", "--model", "nope"], NO_MODEL),
    "latency: depth": (["bench", "latency", "--depth", 1.5], ("'--depth'", "bench latency --help")),
    "latency: depth that is no number": (["bench", "latency", "-a", "mask", "--depth", "nan"], ("--depth",)),
    "latency: long span": (["bench", "latency", "-a", "mask", "--context", 64], ("pass a smaller --span",)),
    "latency: existing file": (["bench", "latency", "-a", "mask", "--out", "taken/file"], ("choose another",)),
    "shared: no such arm": (["bench", "shared", "--model", "random", "-a", "nope"], ("unknown eraser 'nope'",)),
    "shared: no such model": (["bench", "shared", "-a", "mask", "--model", "nope"], NO_MODEL),
    "shared: one thread": (["bench", "shared", "--threads", 1], ("'--threads'", "bench shared --help")),
    "shared: existing file": (["bench", "shared", "-a", "mask", "--out", "taken/file"], ("choose another",)),
    "train: no folder": (["train", "eraser"], ("Missing option '--out'",)),
    "train: no such stage": (["train", "eraser", "--out", "o", "--stage", "x"], ("pretrain, finetune, both",)),
    "train: no such file": (["train", "eraser", "--out", "o", "--config", "no.json"], ("no.json", "EraserTraining")),
    "train: unknown field": (["train", "eraser", "--out", "o", "--config", "taken/odd"], ("odd", "EraserTraining")),
    "train: no such model": (["train", "eraser", "--out", "o", "--model", "nope"], NO_MODEL),
    "train: no such text": (["train", "eraser", "--out", "o", "--text", "no.txt"], ("cannot read text of 'no.txt'",)),
    "train: text that is none": (["train", "eraser", "--out", "o", "--text", "taken/empty"], ("in 'taken/empty'",)),
    "train: a file": (
        ["train", "eraser", "--out", "taken/file", "--model", "random", "--minutes", 0], ("cannot use 'taken/file'",)
    ),
    "train: minutes": (["train", "eraser", "--out", "o", "--minutes", -1], ("train eraser --help",)),
    "train: model without text": (["train", "reference", "--out", "o", "--text", "no.txt"], ("of 'no.txt'",)),
    "train: no such variant": (
        ["train", "eraser", "--out", "o", "--model", "random", "--variant", "x"], ("blind, suffix_aware, kv_map",)
    ),
    "shared: too long for the model": (
        ["bench", "shared", "--model", "random", "--prefix", 40_000, "-a", "mask", "--threads", 2], ("32768 positions",)
    ),
    "erasers: too long for the model": (
        ["eval", "erasers", "-a", "mask", "--model", "random", "--task", "needles", "--length", 33_000, "--n", 1],
        ("32768 positions",),
    ),
}  # fmt: skip


def check_mistake(kv_retract, folder, arguments, words):
    (folder / "taken").mkdir()
    write(folder / "taken" / "file", "kept")
    write(folder / "taken" / "odd", '{"odd": 1}')
    write(folder / "taken" / "empty", " \n")
    code, out, err = kv_retract(*arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {"runs"}
    assert left == {"taken", "taken/file", "taken/odd", "taken/empty"}, "nothing half-made stays behind"
    assert (folder / "taken" / "file").read_text() == "kept"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(kv_retract, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    check_mistake(kv_retract, tmp_path, *MISTAKES[mistake])


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "erasers", "--task", "needles", "--length", 64, "--n", 1),
        ("bench", "latency", "--context", 64, "--span", 8, "--repeats", 1),
        ("bench", "shared", "--threads", 2, "--prefix", 8, "--span", 8, "--suffix", 8),
    ],
)
def test_an_eraser_of_another_model_is_told_with_the_remedy(kv_retract, tmp_path, monkeypatch, arm, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = kv_retract(*command, "--model", "random-256", "-a", arm)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "trained on model 'random'" in err and "kv-retract train eraser --model DIR" in err
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
