"""The example on a server runs as a user would run it, and says what happened in the server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.enable_socket]

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_sglang_server.py"


@pytest.fixture(scope="module")
def printed(server, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), server.url], cwd=empty, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, f"{ran.stderr}\n{server.tail()}"
    assert list(empty.iterdir()) == [], "an example leaves nothing behind"
    server.assert_alive()
    return ran.stdout


def test_the_answer_changes(printed):
    answers = re.findall(r"^agent: (.*)$", printed, re.MULTILINE)
    assert len(answers) == 4 and all(answer.startswith("get_gate({'flight': 'Kel-42'}) -> ") for answer in answers[:2])
    assert answers[2:] == ["The gate of flight Kel-42 is Sol.", "The gate of flight Kel-42 is Mar."]


def test_the_answers_come_token_by_token(printed):
    pieces = [int(number) for number in re.findall(r"streamed in (\d+) pieces", printed)]
    assert len(pieces) == 4 and min(pieces) > 5


def test_the_server_edits_its_cache_and_the_next_step_runs_on_it(printed):
    tokens, cached = map(int, re.findall(r"(\d+) tokens in, (\d+) from", printed)[-1])
    erased = int(re.search(r"^erased in http://\S+: (\d+) tokens by kveraser", printed, re.MULTILINE).group(1))
    spans = re.findall(r"^  message (\d+): (\d+) tokens, steered, of another day$", printed, re.MULTILINE)
    assert [message for message, _ in spans] == ["7", "10"]
    assert erased == sum(int(span) for _, span in spans)
    assert 0 < tokens - cached < 40, "all but the new turn comes from the cache"
