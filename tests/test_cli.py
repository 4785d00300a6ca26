"""The command `kv-retract`: in this process through `main`, and as a process of its own where that is the point."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from kv_retract import __version__, cli
from kv_retract.cli import app
from kv_retract.cli.lists import describe
from kv_retract.engine.models import MODELS
from kv_retract.erasers import ERASERS
from kv_retract.errors import KVRetractError
from kv_retract.evals.narrate import ARMS
from kv_retract.evals.replay import replay
from kv_retract.policies import POLICIES
from kv_retract.registry import Registry

SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "tau_bench_airline_sample.jsonl"
PROGRAM = [sys.executable, "-c", "from kv_retract.cli import main; main()"]
REGISTRIES = {"policies": POLICIES, "erasers": ERASERS, "models": MODELS}

CHAT = [
    {"role": "user", "content": "What does a flight cost?"},
    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "fare", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "a", "content": "Error: busy"},
    {"role": "assistant", "tool_calls": [{"id": "b", "function": {"name": "fare", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "b", "content": "440"},
    {"role": "assistant", "content": "It costs 440."},
]


@pytest.fixture
def traces(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(CHAT))
    return path


def process(*arguments, **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **kw.pop("env", {})}
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=env, **kw)


# -- help and version -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ((), ("replay", "bench", "policies", "erasers", "models", "--version")),
        (
            ("replay",),
            ("--policy", "--arm", "--model", "--out", "--limit", "--json", "--pool-tokens", "--score-tokens"),
        ),
        (("bench",), ("edit", "latency", "step", "radix", "memory", "kernels")),
        (("bench", "edit"), ("--context", "--span", "--depth", "--repeats", "--json", "--out")),
        *(((listing,), ("--json",)) for listing in REGISTRIES),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, told, flag):
    done = CliRunner().invoke(app, [*command, flag], env={"COLUMNS": "120"})
    assert done.exit_code == 0 and "Usage:" in done.output
    for word in told:
        assert word in done.output


def test_version(kv_retract):
    assert kv_retract("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", [(), ("bench",)])
def test_no_command_prints_the_help(kv_retract, command):
    code, out, err = kv_retract(*command)
    assert code == 2 and "Commands" in out + err and "error:" not in err


# -- listings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listing", REGISTRIES)
def test_listings(listing):
    registry = REGISTRIES[listing]
    text, document = CliRunner().invoke(app, [listing]), CliRunner().invoke(app, [listing, "--json"])
    assert text.exit_code == document.exit_code == 0 and document.stderr == ""
    parts = json.loads(document.stdout)
    assert [part["name"] for part in parts] == registry.names()
    assert all(set(part) == {"name", "summary", "parameters"} and part["summary"] for part in parts)
    shown = " ".join(text.stdout.split())
    for part in parts:
        assert part["name"] in shown and part["summary"].split()[0] in shown
        assert not [name for name in part["parameters"] if name.startswith("_")], "what nobody can pass"


def test_parameters_are_told_with_their_defaults():
    parts = {part["name"]: part["parameters"] for part in describe(ERASERS)}
    assert parts["repair"] == {"tokens": "32"} and parts["mask"] == {}
    policies = {part["name"]: part["parameters"] for part in describe(POLICIES)}
    assert policies["tool_error"]["guarantee"] == "steered" and policies["superseded"]["same_arguments"] == "{}"
    assert policies["tool_error"]["error_pattern"].endswith("...")
    assert {part["name"]: part["parameters"] for part in describe(MODELS, hidden={"device", "dtype", "seed"})} == {
        "random": {}, "random-200m": {}, "random-256": {}, "random-8b": {}, "reference": {}
    }  # fmt: skip

    def needs(x, y=2):
        """Make it."""

    registry = Registry("thing", "kv_retract.things_of_a_test")
    registry.register("one")(needs)
    assert describe(registry) == [{"name": "one", "summary": "Make it.", "parameters": {"x": "(required)", "y": "2"}}]


def test_broken_plugins_are_listed_as_unusable(tmp_path):
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kv_retract.erasers]\nbroken = no_such_module:Eraser\n"
        "wrong = broken_plugin:NUMBER\nfine = broken_plugin:make\n"
    )
    (tmp_path / "broken_plugin.py").write_text('NUMBER = 3\ndef make(x=1):\n    """Make one."""\n')
    done = process("erasers", "--json", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and done.stderr == ""
    parts = {part["name"]: part for part in json.loads(done.stdout)}
    assert {"mask", "recompute", "broken", "wrong", "fine"} <= set(parts)
    assert re.match(r"\(unusable\) eraser 'broken' of broken-plugin cannot be imported", parts["broken"]["summary"])
    assert "no_such_module" in parts["broken"]["summary"] and parts["wrong"]["summary"].startswith("(unusable) ")
    assert parts["fine"] == {"name": "fine", "summary": "Make one.", "parameters": {"x": "1"}}


# -- replay and bench -----------------------------------------------------------------------------------------------


def test_replay_of_the_sample_prints_one_document(tmp_path):
    out = tmp_path / "out"
    done = process("replay", SAMPLE, "--limit", 1, "--arm", "none", "--score-tokens", 4, "--json", "--out", out)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout) == json.loads((out / "metrics.json").read_text())
    assert [row["arm"] for row in json.loads(done.stdout)["rows"]] == ["none", "recompute"] * 3


def test_replay_into_a_pipe(tmp_path, traces):
    done = process("replay", traces, "--score-tokens", 4, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", "no progress bar where nobody looks"
    assert "\x1b" not in done.stdout and "1 traces, 3 steps, 1 spans retracted" in done.stdout
    (report,) = (tmp_path / "runs").glob("replay-*/report.html")
    assert done.stdout.splitlines()[-1] == f"Report: {report.relative_to(tmp_path)}"
    assert re.fullmatch(r"replay-\d{8}T\d{6}Z", report.parent.name)


def test_replay_passes_every_option_on(kv_retract, traces, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "kv_retract.evals.replay.replay", lambda settings, progress: seen.append(settings) or replay(settings)
    )
    code, out, _ = kv_retract(
        "replay", traces, "-p", 'tool_error:exclude=["x","y"]', "-a", "mask,repair:tokens=3", "-a", "shift",
        "--limit", 5, "--max-context", 400, "--pool-tokens", 8000, "--score-tokens", 3, "--seed", 7,
        "--dtype", "bfloat16", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    config = json.loads(out)["config"]
    assert code == 0 and list(config["arms"]) == ["mask", "repair:tokens=3", "shift", "recompute"]
    assert config["policies"] == [{"name": "tool_error", "parameters": {"exclude": ["x", "y"]}}]
    values = ("limit", "max_context", "pool_tokens", "score_tokens", "seed", "dtype", "device", "model")
    assert [config[key] for key in values] == [5, 400, 8000, 3, 7, "bfloat16", "cpu", "reference"]
    assert seen[0].paths == (traces,)


def test_bench_writes_and_prints_one_document(kv_retract, tmp_path):
    sizes = ("--context", 64, "--span", 8, "--repeats", 1, "--model", "random", "--arm", "mask")
    code, out, err = kv_retract("bench", "edit", *sizes, "--json", "--out", tmp_path / "new" / "b.json")
    assert (code, err) == (0, "") and list(json.loads(out)["arms"]) == ["mask", "recompute"]
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == json.loads(out)
    code, out, _ = kv_retract("bench", "edit", *sizes)
    assert code == 0 and "Erase 8 of 64 tokens" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("memory", "--context", 64, "--forks", 3), "3 forks of 64 tokens"),
        (("kernels", "--layers", 1, "--kv-heads", 1, "--head-dim", 16, "--tokens", 8, "--repeats", 1), "gather_rotate"),
        (("radix", "--threads", 20, "--repeats", 1), "kv_retract"),
        (("step", "--model", "random", "--context", 1024, "--repeats", 1), "all but the model"),
    ],
)
def test_benchmarks_print_a_table_or_a_document(kv_retract, command, told):
    code, out, err = kv_retract("bench", *command)
    assert (code, err) == (0, "") and told in out and "\x1b" not in out
    code, out, err = kv_retract("bench", *command, "--json")
    assert (code, err) == (0, "") and json.loads(out)["machine"]["device"] == "cpu"


# -- what a caller can get wrong ------------------------------------------------------------------------------------

NO_MODEL = ("expected a registered model", "random-256", "or a directory", "nothing is downloaded")
MISTAKES = {
    "missing file": (["replay", "no.jsonl"], ("'no.jsonl'", "check path and permissions")),
    "unknown policy": (["replay", SAMPLE, "-p", "nope"], ("unknown policy 'nope'", "superseded, tool_error")),
    "unknown eraser": (["replay", SAMPLE, "-a", "nope"], ("unknown eraser 'nope'", "mask, none")),
    "unknown model": (["replay", SAMPLE, "--model", "nope"], (*NO_MODEL, "'nope'")),
    "bench: unknown model": (["bench", "edit", "--model", "nope"], NO_MODEL),
    "bench: unknown eraser": (["bench", "edit", "-a", "nope"], ("unknown eraser 'nope'",)),
    "model that is none": (["replay", SAMPLE, "--model", "."], ("causal language model", "save_pretrained")),
    "bad parameter": (["replay", SAMPLE, "-a", "repair:width=3"], ("'repair:width=3'", "width")),
    "bad value": (["replay", SAMPLE, "-a", "repair:tokens=-1"], ("'repair:tokens=-1'", "must not be negative")),
    "malformed": (["replay", SAMPLE, "-a", "mask,,none"], ("'mask,,none'", "name:key=value")),
    "existing folder": (["replay", SAMPLE, "--out", "taken"], ("'taken'", "is there already", "choose another")),
    "existing file": (["bench", "edit", "--out", "taken/file"], ("'taken/file'", "choose another")),
    "file for a folder": (["replay", SAMPLE, "--out", "taken/file/out"], ("'taken/file/out'", "choose another")),
    "small pool": (["replay", SAMPLE, "--pool-tokens", 64], ("a pool of 64 tokens", "--pool-tokens")),
    "bad device": (["replay", SAMPLE, "--device", "abacus"], ("'abacus'", "cpu, cuda")),
    "bad dtype": (["replay", SAMPLE, "--dtype", "int4"], ("'--dtype'", "'int4'", "bfloat16", "replay --help")),
    "bad depth": (["bench", "edit", "--depth", 1.5], ("'--depth'", "bench edit --help")),
    "depth that is no number": (["bench", "edit", "--depth", "nan"], ("depth",)),
    "bad seed": (["bench", "edit", "--seed", -1], ("'--seed'",)),
    "huge seed": (["replay", SAMPLE, "--seed", 2**63], ("'--seed'",)),
    "span too long": (["bench", "edit", "--context", 20, "--span", 30], ("got 30 tokens", "--span")),
    "thread too long": (["bench", "edit", "--context", 40_000], ("32768 positions", "pass a smaller --context")),
    "limit": (["replay", SAMPLE, "--limit", 0], ("'--limit'", "replay --help")),
    "no traces": (["replay"], ("paths", "kv-retract replay --help")),
    "unknown command": (["nope"], ("'nope'", "kv-retract --help")),
    "unknown option": (["erasers", "--nope"], ("--nope", "kv-retract erasers --help")),
}  # fmt: skip


def check_told(code, out, err, words):
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and "\x1b" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(kv_retract, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("kept")
    arguments, words = MISTAKES[mistake]
    check_told(*kv_retract(*arguments), words)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left <= {"taken", "taken/file", "runs"} and (tmp_path / "taken" / "file").read_text() == "kept"
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = process("replay", "no\x1b[31m\n.jsonl", cwd=tmp_path)
    check_told(done.returncode, done.stdout, done.stderr, (r"'no\x1b[31m\n.jsonl'", "check path"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there, so asking for it is no mistake")
@pytest.mark.parametrize("command", [("replay", SAMPLE), ("bench", "edit")])
def test_cuda_that_is_not_there(kv_retract, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    check_told(*kv_retract(*command, "--device", "cuda"), ("'cuda'", "expected a device that torch can use here"))


def test_a_message_of_several_lines_becomes_one(kv_retract, monkeypatch):
    def fail(*_, **__):
        raise KVRetractError("what\n  another \x1b[31mlibrary\u202e says")

    monkeypatch.setattr("kv_retract.cli.lists.describe", fail)
    assert kv_retract("erasers") == (2, "", "error: what another ⌈U+001B⌋[31mlibrary⌈U+202E⌋ says\n")


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kv-retract", "erasers"])
    monkeypatch.setattr("kv_retract.cli.lists.describe", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


# -- interrupted ----------------------------------------------------------------------------------------------------


def heed_interrupts():
    """In the new process: a shell's background jobs ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_no_half_results(tmp_path):
    out = tmp_path / "runs" / "out"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*PROGRAM, "replay", str(SAMPLE), "--out", str(out)], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out.parent.exists() and list(out.parent.iterdir())):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    printed, told = running.communicate(timeout=120)
    assert running.returncode == 130 and printed == b""
    assert (
        told.decode()
        == "error: interrupted: no results were written; a training run goes on from its newest checkpoint\n"
    )
    assert list(out.parent.iterdir()) == []


DELETES = """
import signal, sys, time, weakref
from kv_retract.cli.interrupts import sure_interrupts

def interrupt(*_):
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.2)  # so that the second signal comes too early as well

class Thing:
    if sys.argv[1] == "finalizer":
        def __del__(self):
            interrupt()

try:
    with sure_interrupts():
        thing = Thing()
        watched = weakref.ref(thing, interrupt) if sys.argv[1] == "callback" else None
        if sys.argv[1] == "work":
            interrupt()
        del thing
        time.sleep(90)
except KeyboardInterrupt:
    print("interrupted")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize("where", ["work", "finalizer", "callback"])
def test_ctrl_c_is_not_lost_while_an_object_is_deleted(where):
    """Python ignores what is raised there, and the program would go on."""
    done = subprocess.run(
        [sys.executable, "-c", DELETES, where], capture_output=True, text=True, timeout=80, preexec_fn=heed_interrupts
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt, typer.Abort])
def test_interrupts_in_the_middle_of_the_work(kv_retract, tmp_path, traces, monkeypatch, error):
    def interrupt(self, *_):
        assert list((tmp_path / "runs").iterdir()), "the draft is there"
        raise error

    monkeypatch.setattr("kv_retract.evals.walk.Walker.walk", interrupt)
    told = "error: interrupted: no results were written; a training run goes on from its newest checkpoint\n"
    assert kv_retract("replay", traces, "--out", tmp_path / "runs" / "out", "--json") == (130, "", told)
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_demo_tells_a_run_in_which_the_answer_changes(kv_retract):
    code, text, _ = kv_retract("demo")
    assert code == 0 and "is retracted" in text and "Note: a small model" in text
    answers = {arm: next(line for line in text.splitlines() if line.split()[:1] == [arm]) for arm in ARMS}
    assert "leaks" in answers["none"] and "right" in answers["recompute"] and answers["mask"]
    code, text, _ = kv_retract("demo", "--model", "random")
    assert code == 0 and "Note: seeded random weights" in text
