import json
import sys
from importlib.util import find_spec

import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies import POLICIES, Explicit, SupersededToolResult, ToolErrorRecovered, register_policy
from kv_retract.policies.composed import AnyOf, MinConfidence
from kv_retract.policies.reading import PolicySpecError, policies_from, policy_from, read_policies
from kv_retract.types import Guarantee

needs_yaml = pytest.mark.skipif(find_spec("yaml") is None, reason="PyYAML is not installed")


def test_a_policy_a_name_and_a_mapping():
    policy = ToolErrorRecovered()
    assert policy_from(policy) is policy
    assert policy_from("tool_error") == policy
    spec = {"name": "tool_error", "exclude": ["run"], "guarantee": "exact"}
    assert policy_from(spec) == ToolErrorRecovered(exclude=["run"], guarantee=Guarantee.EXACT)
    assert spec == {"name": "tool_error", "exclude": ["run"], "guarantee": "exact"}, "the spec is not changed"


def test_wrappers_are_built_from_plain_data():
    spec = {
        "name": "any_of",
        "policies": [
            {"name": "superseded", "readers": ["get_*"]},
            {"name": "min_confidence", "policy": "tool_error", "at_least": 0.5},
        ],
    }
    inner = MinConfidence(policy=ToolErrorRecovered(), at_least=0.5)
    assert policy_from(json.loads(json.dumps(spec))) == AnyOf(policies=[SupersededToolResult(readers=["get_*"]), inner])


@pytest.mark.parametrize(
    ("spec", "place", "problem"),
    [
        (7, "policy", "expected a policy, its name, or a mapping with a name, got 7"),
        ({"readers": []}, "policy", "expected a mapping with the name of a policy"),
        ({"name": "tool_error", 3: 1}, "policy", "expected a mapping with the name of a policy"),
        ("tool_eror", "policy", "unknown policy 'tool_eror'; known: .*tool_error"),
        ({"name": "superseded", "reader": 1}, "policy", "no parameter 'reader'; known: .*readers"),
        ({"name": "superseded", "guarantee": "maybe"}, "policy", "maybe"),
        ({"name": "min_confidence", "policy": "tool_error"}, "policy", "at_least"),
        ({"name": "any_of", "policies": "tool_error"}, "policy.policies", "expected a list of policies"),
        ({"name": "any_of", "policies": []}, "policy", "no inner policies"),
        ({"name": "any_of", "policies": ["tool_error", "nope"]}, r"policy.policies\[1\]", "unknown policy 'nope'"),
        (
            {"name": "all_of", "policies": [{"name": "any_of", "policies": [{"name": "explicit", "mach": 1}]}]},
            r"policy.policies\[0\].policies\[0\]",
            "no parameter 'mach'; known: .*match",
        ),
    ],
)
def test_errors_say_where_and_what_is_known(spec, place, problem):
    with pytest.raises(PolicySpecError, match=rf"^{place}: .*{problem}"):
        policy_from(spec)


def test_factories_that_are_functions_are_checked_too():
    @register_policy("of_a_function")
    def build(exclude=()):
        return ToolErrorRecovered(exclude=exclude)

    @register_policy("of_nothing")
    def nothing(**anything):
        return anything

    try:
        assert policy_from({"name": "of_a_function", "exclude": ["x"]}) == ToolErrorRecovered(exclude=["x"])
        with pytest.raises(PolicySpecError, match="no parameter 'other'; known: exclude"):
            policy_from({"name": "of_a_function", "other": 1})
        with pytest.raises(PolicySpecError, match="makes a dict"):
            policy_from({"name": "of_nothing", "a": 1})
    finally:
        del POLICIES._factories["of_a_function"], POLICIES._factories["of_nothing"]


def test_a_list_names_the_item():
    with pytest.raises(PolicySpecError, match=r"^policies\[1\]: unknown policy"):
        policies_from(["tool_error", "nope"])
    with pytest.raises(PolicySpecError, match="^policies: expected a list"):
        policies_from({"name": "tool_error"})


def test_a_file_of_json(tmp_path):
    file = tmp_path / "policies.json"
    file.write_text(json.dumps(["tool_error", {"name": "explicit", "match": "x"}]))
    assert read_policies(file) == (ToolErrorRecovered(), Explicit(match="x"))
    assert read_policies(str(file)) == read_policies(file)


@needs_yaml
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".YML"])
def test_a_file_of_yaml(tmp_path, suffix):
    file = tmp_path / f"policies{suffix}"
    file.write_text("- tool_error\n- name: any_of\n  policies:\n    - {name: superseded, readers: ['get_*']}\n")
    assert read_policies(file) == (
        ToolErrorRecovered(),
        AnyOf(policies=[SupersededToolResult(readers=["get_*"])]),
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.json",
            '["tool_error",\n {"name": "any_of", "policies": ["nope"]}]',
            r"^p.json\[1\].policies\[0\]: unknown",
        ),
        ("p.json", '{"name": "tool_error"}', "^p.json: expected a list of policies"),
        ("p.json", "[1,", "expected JSON in .*p.json.*line 1"),
        pytest.param("p.yaml", "- a: [1", "expected YAML in .*p.yaml", marks=needs_yaml),
        pytest.param("p.yaml", "", r"^p.yaml: expected a list of policies, got None", marks=needs_yaml),
        pytest.param("p.yaml", "- !!python/object:os.x {}", "expected YAML", marks=needs_yaml),
        ("p.toml", "", r"ends with .json, .yaml or .yml, got .*p.toml"),
    ],
)
def test_errors_name_the_file_and_the_place_in_it(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(PolicyError, match=message):
        read_policies(file)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(PolicyError, match="cannot read .*nothing.json"):
        read_policies(tmp_path / "nothing.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(PolicyError, match="cannot read .*UTF-8"):
        read_policies(tmp_path / "latin.json")


def test_yaml_without_pyyaml_says_what_to_install(tmp_path, monkeypatch):
    file = tmp_path / "p.yaml"
    file.write_text("- tool_error")
    monkeypatch.setitem(sys.modules, "yaml", None)  # as if it were not installed
    with pytest.raises(PolicyError, match="needs PyYAML.*pip install pyyaml"):
        read_policies(file)
