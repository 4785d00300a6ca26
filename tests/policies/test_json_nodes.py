import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.policies.json_items import item_starts
from kv_retract.policies.json_nodes import parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
FORMS = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])


def plain(node):
    if isinstance(node.value, dict):
        return {key: plain(member) for key, member in node.value.items()}
    return [plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def every(node):
    yield node
    if isinstance(node.value, dict | list):
        for member in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from every(member)


@given(value=st.lists(VALUES, max_size=4) | st.dictionaries(st.text(), VALUES, max_size=4), form=FORMS)
def test_every_value_is_what_its_characters_say(value, form):
    text = f"\n {json.dumps(value, **form)} "
    root = parse(text)
    assert plain(root) == value
    for node in every(root):
        assert json.loads(text[node.start : node.end]) == plain(node)


def test_strings_that_look_like_json():
    text = r'{"a": "say \"{\" ]", "b": [-1.5e3, true, null]}'
    root = parse(text)
    b = root.value["b"].value
    assert [text[n.start : n.end] for n in (root.value["a"], *b)] == [r'"say \"{\" ]"', "-1.5e3", "true", "null"]
    assert [n.value for n in b] == [-1500.0, True, None]


@pytest.mark.parametrize("text", ["", "5", '"text"', "{", '{"a": 1} and more', "[1,]", "Error: {}", "[" * 100_000])
def test_what_is_no_object_or_list(text):
    assert parse(text) is None


@given(items=st.lists(VALUES), form=FORMS)
def test_items_begin_where_they_stand(items, form):
    text = json.dumps(items, **form)
    assert item_starts(text) == [node.start for node in parse(text).value]


def test_items_of_the_longest_value_of_an_object():
    rows = [{"row": n} for n in range(3)]
    text = json.dumps({"total": 3, "tags": ["a"], "rows": rows, "next": [4]})
    assert [text[at : at + 10] for at in item_starts(text)] == ['{"row": 0}', '{"row": 1}', '{"row": 2}']
    assert item_starts(json.dumps({"tags": ["a"], "text": "long, longer, longest"})) == []


@pytest.mark.parametrize(
    ("text", "starts"), [("[1, 2, oops", [1, 4]), ("", []), ("{}", []), ("[]", []), ("{1: 2}", []), ('{"a" 1}', [])]
)
def test_malformed_lists_end_at_the_fault(text, starts):
    assert item_starts(text) == starts
