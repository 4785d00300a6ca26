"""Every example runs as a user would run it: in a process of its own, from an empty folder, without a network.

The one that needs an SGLang server is run by tests/sglang/test_example.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("0*.py"))
ON_A_SERVER = ROOT / "examples" / "04_sglang_server.py"
ALONE = [path for path in EXAMPLES if path != ON_A_SERVER]
# Imported by every Python process that finds it: a connection to anywhere is an error.
NO_NETWORK = "import pytest_socket\npytest_socket.disable_socket(allow_unix_socket=True)\n"

FACTS = {
    "01_take_back_a_tool_result.py": (
        r"^first step: \d+ tokens, 0 of them cached$",
        r"^retracted tokens \[\d+, \d+\): the fare is last year's$",
        r"^the edit: [\d.]+ ms, 0 tokens through the model$",
        r"^history: explicit steered \d+ tokens, because the fare is last year's$",
    ),
    "02_langchain_agent.py": (
        r"^24 messages: \d+ tokens in, \d+ from the cache, 1 spans retracted so far$",
        r"^33 messages: \d+ tokens in, \d+ from the cache, 3 spans retracted so far$",
        r"^  superseded: \d+ tokens of message 7, ",
        r"^  superseded: \d+ tokens of message 19, ",
        r"^  tool_error: \d+ tokens of message 24, ",
    ),
    "03_langgraph_restart.py": (
        r"^first process: 1 retraction, in the checkpoint$",
        r"^after a restart: [1-9]\d* tokens left out, status exact$",
        r"^fork from before: 0 retractions apply$",
    ),
    "05_approval_by_interrupt.py": (
        r"^asked: may superseded take back message 2\? ",
        r"^taken back before the answer: 0$",
        r"^taken back after it: superseded, message 2, exact$",
    ),
    "06_undo_and_audit.py": (
        r"^retracted: Your preferred hotel is Kel\.$",
        r"^undone: Your preferred hotel is Tal\.$",
        r"^audit 3: status_changes by alice$",
        r"^the chain of 3 entries holds$",
    ),
    "07_injected_result_with_cascade.py": (
        r"^hop: message 3 -> call in message 4 \(value\)$",
        r"^hop: message 3 -> quote in message 6 \(value\)$",
        r"^hop: message 4 -> result in message 5 \(call_id\)$",
        r"^spans of the plan: 4, nothing applied yet: True$",
        r"^the account is still read: False$",
        r"^the bill is still read: True$",
    ),
    "08_a_secret_is_erased.py": (
        r"^secret: \d+ tokens, guarantee exact, status exact$",
        r"^the key is still read: False$",
        r"^the bucket is still read: True$",
        r"^states that had read it are gone: True$",
        r"^as if it had never been there: True$",
    ),
    "09_a_thread_of_fifty_windows.py": (
        r"^2[56]\d{3} tokens, 5\d windows, \d+ messages$",
        r"^before: The owner of order Kel-42 is Tal\.$",
        r"^withdrawn: \d+ tokens of message 2, steered$",
        r"^after: I do not know\.$",
    ),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Run an example once; return what it prints."""
    done = {}

    def run(example):
        if example not in done:
            guard, empty = tmp_path_factory.mktemp("guard"), tmp_path_factory.mktemp("empty")
            (guard / "sitecustomize.py").write_text(NO_NETWORK)
            env = {**os.environ, "PYTHONPATH": str(guard), "OMP_NUM_THREADS": "1"}
            ran = subprocess.run(
                [sys.executable, str(example)], cwd=empty, env=env, capture_output=True, text=True, timeout=300
            )
            assert ran.returncode == 0, ran.stderr
            assert list(empty.iterdir()) == [], "an example leaves nothing behind"
            done[example] = ran.stdout
        return done[example]

    return run


def named(name):
    (example,) = [path for path in EXAMPLES if path.name == name]
    return example


def test_facts_are_known_of_every_example():
    assert [path.name for path in ALONE] == list(FACTS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize("example", ALONE, ids=lambda path: path.name)
def test_it_runs_and_says_what_happened(example, output):
    printed = output(example)
    for fact in FACTS[example.name]:
        assert re.search(fact, printed, re.MULTILINE), f"{fact}\n{printed}"


def test_the_next_step_is_served_from_the_edited_cache(output):
    printed = output(named("01_take_back_a_tool_result.py"))
    tokens, cached = map(int, re.search(r"^next step: (\d+) tokens, (\d+) of", printed, re.MULTILINE).groups())
    first = int(re.search(r"^first step: (\d+)", printed).group(1))
    assert 0.9 * first < cached < tokens


def test_the_agents_second_answer_comes_mostly_from_the_cache(output):
    found = re.findall(r"messages: (\d+) tokens in, (\d+) from the cache", output(named("02_langchain_agent.py")))
    tokens, cached = map(int, found[1])
    assert cached > 0.5 * tokens


def test_it_says_that_it_needs_a_server(tmp_path):
    ran = subprocess.run([sys.executable, str(ON_A_SERVER)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "URL" in ran.stderr and "kv-retract serve" in ran.stderr and "Traceback" not in ran.stderr


def test_connections_would_have_failed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode != 0 and "SocketBlockedError" in ran.stderr
