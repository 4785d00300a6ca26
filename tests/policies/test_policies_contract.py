"""The public conformance suite over every built-in policy."""

import subprocess
import sys
from pathlib import Path

import pytest

from kv_retract.errors import SpanError
from kv_retract.policies import POLICIES, Explicit, PolicyContext, SupersededToolResult, ToolErrorRecovered
from kv_retract.testing.policies import PolicyConformance
from kv_retract.types import Message, ToolCall


def calls(*parts):
    thread = []
    for number, (tool, arguments, result) in enumerate(parts):
        thread.append(Message("assistant", tool_calls=(ToolCall(f"c{number}", tool, arguments),)))
        thread.append(Message("tool", result, tool_call_id=f"c{number}"))
    return thread


class OfToolMessages(PolicyConformance):
    """What these policies take back is a tool's result, or the call itself."""

    def check(self, policy, messages, proposals):
        super().check(policy, messages, proposals)
        for span in (r.span for r in proposals):
            assert messages[span.message].role == ("tool" if span.part == "content" else "assistant")


class TestSuperseded(OfToolMessages):
    @pytest.fixture
    def policy(self):
        return SupersededToolResult()

    @pytest.fixture
    def thread(self):
        return calls(("get_item", '{"item_id": 1}', "price 5"), ("get_item", '{"item_id": 1}', "price 6"))


class TestToolError(OfToolMessages):
    @pytest.fixture(params=[False, True], ids=["result", "with call"])
    def policy(self, request):
        return ToolErrorRecovered(include_call=request.param)

    @pytest.fixture
    def thread(self):
        return calls(("run", "{}", "Error: no such file"), ("run", "{}", "done"))


def test_a_call_with_two_failed_results_is_proposed_once():
    call, error = calls(("run", "{}", "Error: no such file"))
    thread = [call, error, error, *calls(("run", "{}", "done"))]
    proposals = ToolErrorRecovered(include_call=True).propose(PolicyContext(thread_id="t", messages=thread))
    assert len({r.span for r in proposals}) == len(proposals)


class TestExplicit(PolicyConformance):
    may_raise = (SpanError,)
    results = ("a value", "another value", "twice a value, a value", "")
    arguments = ('{"q": "a value"}', "{broken a value", "")

    @pytest.fixture
    def policy(self):
        return Explicit(match="a value", notice="withdrawn")

    @pytest.fixture
    def thread(self):
        return calls(("get_item", '{"q": "a value"}', "here is a value"))


HERE = {"explicit", "superseded", "tool_error"}
WRAPPERS = {
    "all_of": "composed", "any_of": "composed", "cooldown": "composed", "min_confidence": "composed",
    "dry_run": "supervised", "require_approval": "supervised",
}  # fmt: skip


def test_every_built_in_policy_is_held_to_the_suite():
    """Here, with the wrappers, or in the tests of its own module."""
    names = {name for name in POLICIES.names() if POLICIES.factory(name).__module__.startswith("kv_retract.")}
    assert names >= HERE | WRAPPERS.keys()
    for name in names - HERE:
        kind = POLICIES.factory(name)
        file = Path(__file__).with_name(f"test_{WRAPPERS.get(name, name)}.py")
        text = file.read_text(encoding="utf-8")
        assert "PolicyConformance" in text and f"{kind.__name__}(" in text, f"{file.name} does not test {name}"


def test_built_in_policies_are_registered_without_torch():
    code = (
        "import sys; from kv_retract.policies import POLICIES as P; print(','.join(P.names()), 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"explicit", "superseded", "tool_error"} <= set(printed[0].split(","))
    assert printed[1] == "False"


def test_factories_carry_their_names():
    for name in ("explicit", "superseded", "tool_error"):
        assert POLICIES.factory(name).name == name
