"""One replay of real traces for all tests that only look at it, and small traces of every format."""

import json
from pathlib import Path

import pytest

from kv_retract.evals.replay import ReplaySettings, replay
from kv_retract.evals.specs import parse_specs

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "tau_bench_airline_sample.jsonl"


@pytest.fixture(scope="session")
def make_settings():
    """Settings of a small replay; arms and policies as on the command line."""

    def make(*paths, out, policies=("tool_error", "superseded"), arms=("none", "mask"), **kw):
        kw = {"score_tokens": 8, "model": "random", **kw}
        return ReplaySettings(
            paths=tuple(paths), policies=tuple(parse_specs(policies)), arms=tuple(parse_specs(arms)), out=out, **kw
        )

    return make


@pytest.fixture(scope="session")
def sample_run(make_settings, tmp_path_factory):
    """Two real traces under four arms: the folder, and what `replay` returned."""
    out = tmp_path_factory.mktemp("replay") / "out"
    result = replay(make_settings(SAMPLE, out=out, arms=("none", "mask", "shift"), limit=2))
    return out, result


@pytest.fixture
def chat():
    """Messages of a thread in which the second call of a tool repairs the first, and the agent goes on."""

    def make(*, error="Error: no such city", tool="get_fare", user="What does a flight cost?"):
        def call(id, city):
            function = {"name": tool, "arguments": json.dumps({"city": city})}
            return {"role": "assistant", "content": "", "tool_calls": [{"id": id, "function": function}]}

        return [
            {"role": "system", "content": "You are a travel agent."},
            {"role": "user", "content": user},
            call("c1", "Olso"),
            {"role": "tool", "tool_call_id": "c1", "content": error},
            call("c2", "Oslo"),
            {"role": "tool", "tool_call_id": "c2", "content": '{"fare": 440}'},
            {"role": "assistant", "content": "It costs 440 NOK, and that is all that I could find out for you."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "You are welcome."},
        ]

    return make
