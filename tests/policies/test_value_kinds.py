import pytest

from kv_retract.policies.value_kinds import value_kinds


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a window seat", {"seat": {"window"}}),
        ("on 12 May or Friday", {"day": {"12 may", "friday"}}),
        ("May I?", {}),
        ("at 3:30 pm", {"time": {"3:30 pm"}}),
        ("for $1,200", {"money": {"$1,200"}}),
        ("40 euros for two", {"money": {"40 euros"}, "number": {"two"}}),
        ("a.b@x.org", {"email": {"a.b@x.org"}}),
        ("the windows of 14C", {}),
    ],
)
def test_kinds_of_values(text, kinds):
    assert value_kinds(text) == kinds
