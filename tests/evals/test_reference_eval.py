"""The measurement on the corpus: its folder and rows, on a tiny random model, on scripted answers, by hand."""

import io
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from kv_retract.errors import OutputExistsError, UnknownNameError
from kv_retract.evals import reference as module
from kv_retract.evals.console import print_reference
from kv_retract.evals.reference import ARMS, COLUMNS, MAX_ANSWER, Answer, ReferenceEval, eval_reference, reference_rows
from kv_retract.reference import MODEL_DIR
from kv_retract.training.corpus import CorpusError, generate
from kv_retract.training.encoding import RowEncoder
from kv_retract.training.families import FAMILIES
from kv_retract.training.reference import ReferenceConfig, new_model
from kv_retract.training.samples import UNKNOWN

spec = spec_from_file_location("reader", Path(__file__).parents[1] / "training" / "reader.py")  # tests are no package
reader = module_from_spec(spec)
spec.loader.exec_module(reader)

KEYS = {"family", "kind", "length", "arm", "n", "accuracy", "accuracy_se", "leak", "leak_se"}
TINY = ReferenceConfig(
    hidden_size=48, intermediate_size=32, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, steps=1
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Qwen3 with random weights and the bundled tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    model = new_model(
        TINY, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_folder, tmp_path):
    def settings(**fields):
        fields = {"families": ("facts",), "lengths": (128,), "n": 1, **fields}
        return ReferenceEval(out=tmp_path / "out", model=str(model_folder), **fields)

    return settings


# -- the folder, on a model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(model_folder, tmp_path_factory):
    """One trace of two families, on the tiny model: the folder, what was returned, and the ticks of progress."""
    out, ticks = tmp_path_factory.mktemp("eval") / "out", []
    metrics = eval_reference(
        ReferenceEval(out=out, model=str(model_folder), families=("preferences", "facts"), lengths=(128,), n=1),
        progress=lambda done, total: ticks.append((done, total)),
    )
    return out, metrics, ticks


def test_the_folder(tiny_run):
    out, metrics, ticks = tiny_run
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.json", "samples.jsonl"]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    config = json.loads((out / "config.json").read_text())
    assert config == metrics["config"] and config["columns"] == COLUMNS and set(COLUMNS) < KEYS
    assert (config["model"], config["families"], config["lengths"]) == ("tiny", ["preferences", "facts"], [128])
    assert (config["n"], config["split"], config["seed"], config["dtype"]) == (1, "test", 0, "float32")
    assert config["num_parameters"] > 60_000 and config["seconds"] > 0 and config["versions"]["torch"]
    assert ticks == [(1, 2), (2, 2)]


def test_rows_and_samples_of_the_folder(tiny_run):
    out, metrics, _ = tiny_run
    rows = metrics["rows"]
    assert all(set(row) == KEYS for row in rows)
    assert [row["family"] for row in rows] == ["facts"] * 4 + ["preferences"] * 4
    assert [row["arm"] for row in rows] == [*ARMS, *ARMS] and ARMS == ("clean", "none", "mask", "recompute")
    for row in rows:
        assert (row["kind"] == "clean") == (row["arm"] == "clean") == (row["leak"] is None)
        assert row["accuracy"] == 0.0 and row["accuracy_se"] is row["leak_se"] is None, "one trace, and it babbles"
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["arm"] for s in samples if s["family"] == "facts"] == [arm for arm in ARMS for _ in range(4)]
    for arm in ARMS:
        affected = [s["affected"] for s in samples if s["family"] == "facts" and s["arm"] == arm]
        assert affected == [True, False, False, False], "the same questions under every arm"
    assert all(s["question"] and s["expected"] and not s["right"] and not s["leaked"] for s in samples)


def test_the_same_seed_gives_the_same_answers(tiny_run, settings):
    again = eval_reference(settings())
    assert again["rows"] == tiny_run[1]["rows"][:4]
    assert (settings().out / "samples.jsonl").read_text() == "".join(
        line for line in (tiny_run[0] / "samples.jsonl").read_text().splitlines(keepends=True) if '"facts"' in line
    )


def test_the_number_of_processes_changes_nothing(tiny_run, settings):
    ticks = []
    shared = eval_reference(
        settings(families=("preferences", "facts"), workers=2), progress=lambda done, total: ticks.append((done, total))
    )
    assert shared["rows"] == tiny_run[1]["rows"] and ticks == tiny_run[2]
    assert (settings().out / "samples.jsonl").read_text() == (tiny_run[0] / "samples.jsonl").read_text()


# -- scripted answers -----------------------------------------------------------------------------------------------


def kept_messages(session, messages):
    """The thread as a reader without a cache sees it: what was retracted is cut out."""
    for record in session.history("t"):
        at, content = record.span.message, messages[record.span.message].content
        end = len(content) if record.span.end is None else record.span.end
        cut = type(messages[at])(**{**_fields(messages[at]), "content": content[: record.span.start] + content[end:]})
        messages = (*messages[:at], cut, *messages[at + 1 :])
    return messages


def _fields(message):
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


def scripted_reader(session, messages, sample, probe):
    """Scripted, no model: forgets exactly what was retracted."""
    return reader.Reader(kept_messages(session, messages)).answer(probe.question)


def scripted_stale(session, messages, sample, probe):
    """Scripted, no model: never forgets."""
    return probe.answer


def scripted_noise(session, messages, sample, probe):
    """Scripted, no model: has read nothing."""
    return "What?"


def scripted(monkeypatch, ask, settings, **fields):
    monkeypatch.setattr(module, "_ask", ask)
    rows = eval_reference(settings(**fields))["rows"]
    assert {(row["family"], row["length"]) for row in rows} == {(f, 128) for f in fields["families"]}
    return rows


ALL = dict(families=tuple(FAMILIES.names()), n=8)


def test_a_scripted_reader_is_always_right(monkeypatch, settings):
    """So the retracted span is the right one, and what is expected follows from the rest of the text."""
    rows = scripted(monkeypatch, scripted_reader, settings, **ALL)
    assert {row["accuracy"] for row in rows} == {1.0}
    assert {row["leak"] for row in rows if row["arm"] != "clean"} == {0.0}
    assert {row["accuracy_se"] for row in rows} <= {0.0, None}, "None: one trace only"
    kinds = {row["kind"] for row in rows}
    assert kinds >= {"clean", "distractor", "error", "injection", "needle", "preference", "tool_result", "update"}


def test_a_scripted_model_that_never_forgets(monkeypatch, settings):
    rows = scripted(monkeypatch, scripted_stale, settings, **ALL)
    for row in rows:
        if row["arm"] == "clean":
            assert 0 < row["accuracy"] < 1 or row["family"] in ("documents", "injections", "preferences")
        else:
            assert (row["accuracy"], row["leak"]) == (0.0, 1.0)


def test_a_scripted_model_that_reads_nothing(monkeypatch, settings):
    rows = scripted(monkeypatch, scripted_noise, settings, families=("facts", "errors"))
    assert {(row["accuracy"], row["leak"]) for row in rows} == {(0.0, 0.0), (0.0, None)}


# -- by hand --------------------------------------------------------------------------------------------------------


def answer(given, *, sample="s1", arm="mask", affected=True, kind=None, family="facts", length=256):
    return Answer(
        sample_id=sample, family=family, length=length, kind=kind or ("clean" if arm == "clean" else "tool_result"),
        arm=arm, affected=affected, question="?", expected=UNKNOWN, retracted="It is X.", given=given,
    )  # fmt: skip


def test_right_and_leaked():
    assert answer(f" {UNKNOWN}\n").right and not answer(UNKNOWN).leaked
    assert answer("It is X.").leaked and not answer("It is X.").right
    assert not answer("It is X. Or so.").leaked and not answer("it is X.").leaked
    assert not answer("It is X.", affected=False).leaked


def test_rows_by_hand():
    rows = reference_rows(
        [
            answer(UNKNOWN), answer("It is X."), answer("It is X.", sample="s2"), answer("?", sample="s2"),
            answer("ignored", affected=False),
            answer(UNKNOWN, arm="clean"), answer("?", arm="clean", affected=False),
            answer(UNKNOWN, arm="none"), answer(UNKNOWN, length=64), answer(UNKNOWN, family="errors", kind="error"),
        ]
    )  # fmt: skip
    by = {(r["family"], r["kind"], r["length"], r["arm"]): r for r in rows}
    assert list(by) == [
        ("errors", "error", 256, "mask"), ("facts", "clean", 256, "clean"), ("facts", "tool_result", 64, "mask"),
        ("facts", "tool_result", 256, "none"), ("facts", "tool_result", 256, "mask"),
    ]  # fmt: skip
    mask = by["facts", "tool_result", 256, "mask"]
    assert (mask["n"], mask["accuracy"], mask["leak"]) == (4, 0.25, 0.5)
    # Sums of the deviations per trace: ±0.5 of right, 0 of leaked; two traces, four answers (2411.00640, 2.2).
    assert mask["accuracy_se"] == pytest.approx((2 / 1 * 2 * 0.5**2) ** 0.5 / 4) and mask["leak_se"] == 0.0
    clean = by["facts", "clean", 256, "clean"]
    assert (clean["n"], clean["accuracy"], clean["leak"], clean["leak_se"]) == (2, 0.5, None, None)
    assert by["errors", "error", 256, "mask"]["accuracy_se"] is None
    assert reference_rows([]) == []


def test_right_answers_fit_in_the_longest_answer():
    tokens = RowEncoder(AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)).length
    longest = 0
    for family in FAMILIES.names():
        for seed in range(150):
            probes = generate(family, seed=seed, length=64, split="test").probes
            longest = max(longest, *(tokens(text) + 1 for p in probes for text in (p.answer, *p.without.values())))
    assert 20 < longest < 0.85 * MAX_ANSWER


# -- printed, and what cannot be ------------------------------------------------------------------------------------


def test_printed_rows(tiny_run):
    console = Console(file=io.StringIO(), width=160)
    print_reference(tiny_run[1], console)
    lines = console.file.getvalue().splitlines()
    assert "Model tiny (0.1 M parameters), split test, 1 traces per family and length" in lines[0]
    (mask,) = (line.split() for line in lines if line.split()[:1] == ["facts"] and "mask" in line)
    assert mask == ["facts", "tool_result", "128", "mask", "1", "0", "±", "–", "0", "±", "–"]


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"families": ("nope",)}, UnknownNameError, "unknown task family 'nope'; known: documents"),
        ({"split": "dev"}, CorpusError, "a split of train, test, got 'dev'"),
        ({"split": "train", "families": ("documents",)}, CorpusError, "held out"),
        ({"lengths": (20,)}, CorpusError, "at least 64"),
    ],
)
def test_settings_that_cannot_be(settings, tmp_path, fields, error, told):
    with pytest.raises(error, match=told):
        eval_reference(settings(**fields))
    assert list(tmp_path.iterdir()) == []


def test_results_are_never_overwritten(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputExistsError):
        eval_reference(settings())
