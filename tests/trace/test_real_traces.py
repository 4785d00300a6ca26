"""Real traces: the sample that ships with the examples, and the full sets where a checkout has them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kv_retract.policies import PolicyContext, SupersededToolResult, ToolErrorRecovered
from kv_retract.trace import Trace, read_traces

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "examples" / "data" / "tau_bench_airline_sample.jsonl"
DATA = ROOT.parent / "shared" / "data"

POLICIES = (ToolErrorRecovered(), SupersededToolResult())


def full_set(*parts):
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the public data set {'/'.join(parts)} is not beside this checkout")
    return path


def proposals(trace):
    context = PolicyContext(thread_id=trace.trace_id, messages=trace.messages)
    return {policy.name: [r.span.message for r in policy.propose(context)] for policy in POLICIES}


def by_hand(raw):
    """The tau-bench rules, said again on the raw JSON: a result follows its call directly."""
    errors, reads, found = [], {}, {"tool_error": [], "superseded": []}
    for index, (message, result) in enumerate(zip(raw, raw[1:], strict=False)):
        for call in message.get("tool_calls") or ():
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            entity = arguments.get("reservation_id")
            if result["content"].startswith("Error"):
                errors.append((index + 1, name))
                continue
            found["tool_error"] += [at for at, tool in errors if tool == name]
            errors = [(at, tool) for at, tool in errors if tool != name]
            if name == "cancel_reservation" or name.startswith("update_reservation_"):
                found["superseded"] += reads.pop(entity, [])
            elif name == "get_reservation_details":
                reads.setdefault(entity, []).append(index + 1)
    return {name: sorted(messages) for name, messages in found.items()}


@pytest.mark.parametrize("which", ["sample", "full"])
def test_tau_bench_follows_its_rules(which):
    path = SAMPLE if which == "sample" else full_set("tau_bench", "airline_trajectories.jsonl")
    counts = Counter()
    for trace, line in zip(read_traces(path), path.read_text().splitlines(), strict=True):
        assert isinstance(trace, Trace)
        raw = json.loads(line)["traj"]
        assert [m.content for m in trace.messages] == [m["content"] or "" for m in raw]
        found = proposals(trace)
        assert found == by_hand(raw), trace.source
        counts.update({name: len(messages) for name, messages in found.items()})
    assert counts == ({"tool_error": 9, "superseded": 7} if which == "sample" else {"tool_error": 15, "superseded": 71})


def test_swe_agent():
    found = {t.trace_id: proposals(t) for t in read_traces(full_set("swe_agent"))}
    assert found == {
        "marshmallow-code__marshmallow-1867": {"tool_error": [15], "superseded": [3, 13]},
        "pydicom__pydicom-1458": {"tool_error": [7, 13, 15, 17], "superseded": [3, 11]},
    }


def test_reflexion_log():
    path = full_set("reflexion_hotpotqa")
    traces = list(read_traces(path))
    text = next(path.glob("*.txt")).read_text()
    assert len(traces) == text.count("\nQuestion:") and {t.format for t in traces} == {"react"}
    failed = [m for t in traces for m in t.messages if m.role == "tool" and m.content.startswith("Could not find [")]
    assert len(failed) == text.count(": Could not find [")
