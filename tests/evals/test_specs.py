import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.erasers import ERASERS
from kv_retract.errors import PolicyError, UnknownNameError
from kv_retract.evals.specs import Spec, SpecError, parse_specs
from kv_retract.policies import POLICIES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mask", [Spec("mask")]),
        (" mask, shift ", [Spec("mask"), Spec("shift")]),
        ("repair:tokens=16", [Spec("repair", {"tokens": 16})]),
        ("repair:tokens=16,mask", [Spec("repair", {"tokens": 16}), Spec("mask")]),
        ("selective:ratio=0.5,layer=2,none", [Spec("selective", {"ratio": 0.5, "layer": 2}), Spec("none")]),
        (
            'tool_error:exclude=["get_*","a,b=c"],include_call=true',
            [Spec("tool_error", {"exclude": ["get_*", "a,b=c"], "include_call": True})],
        ),
        ("superseded:guarantee=exact", [Spec("superseded", {"guarantee": "exact"})]),
        ("p:a = 1 , b = text with spaces", [Spec("p", {"a": 1, "b": "text with spaces"})]),
        ("p:a=1x,b={not json", [Spec("p", {"a": "1x", "b": "{not json"})]),
        ("p:a=1:b=2", [Spec("p", {"a": "1:b=2"})]),
        ("p:a=", [Spec("p", {"a": ""})]),
        ('p:a="x:y=z"', [Spec("p", {"a": "x:y=z"})]),
        ("p:a=null,b={}", [Spec("p", {"a": None, "b": {}})]),
    ],
)
def test_forms(text, expected):
    assert parse_specs([text]) == expected


BAD = ["", " ", ",", "mask,", "mask,,shift", ":a=1", "p:", "p:a", "mask shift", "p:a=1,b:c", "="]


@pytest.mark.parametrize("text", BAD)
def test_malformed_text_is_told_with_its_place(text):
    with pytest.raises(SpecError, match=r"expected a name, or name:key=value.*\(character \d+\)"):
        parse_specs([text])


def test_repeated_specs_are_kept_once_in_the_first_order():
    specs = parse_specs(["shift,mask", "repair:tokens=16", "mask", "repair:tokens = 16", "repair"])
    assert [spec.label for spec in specs] == ["shift", "mask", "repair:tokens=16", "repair"]


NAMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True)
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
SPECS = st.builds(Spec, NAMES, st.dictionaries(KEYS, VALUES, max_size=3))


@given(st.lists(SPECS, min_size=1, max_size=3, unique_by=lambda spec: spec.label))
def test_a_label_reads_back_as_its_spec(specs):
    assert parse_specs([spec.label for spec in specs]) == specs
    assert parse_specs([",".join(spec.label for spec in specs)]) == specs


@given(st.text(alphabet="ab:,= []{}\"'1\\\n"))
def test_any_text_is_parsed_or_refused(text):
    try:
        specs = parse_specs([text])
    except SpecError as error:
        assert repr(text.strip()) in str(error)
    else:
        assert specs and parse_specs([spec.label for spec in specs]) == specs


def test_create_passes_the_parameters_on():
    (spec,) = parse_specs(["repair:tokens=5"])
    assert spec.create(ERASERS).tokens == 5


@pytest.mark.parametrize(
    ("registry", "text", "error", "told"),
    [
        (ERASERS, "wipe", UnknownNameError, "unknown eraser 'wipe'; known: .*mask"),
        (ERASERS, "repair:width=3", SpecError, "cannot make eraser 'repair:width=3'.*width"),
        (ERASERS, "repair:tokens=-1", SpecError, "'repair:tokens=-1'.*must not be negative"),
        (POLICIES, "tool_error:guarantee=maybe", SpecError, "cannot make policy.*'maybe'"),
        (POLICIES, "explicit", PolicyError, "names nothing"),
    ],
)
def test_what_cannot_be_made(registry, text, error, told):
    (spec,) = parse_specs([text])
    with pytest.raises(error, match=told):
        spec.create(registry)
