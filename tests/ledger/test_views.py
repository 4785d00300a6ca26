import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.ledger.views import BREAK, FILLER, blank, view


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('He said "x, y": {1,2}', 'He said "x, y": {1,2}'),
        ('{"id": "A1", "n": [1,2]}', "{      |A1|       [1 2]}"),
        ("{'it': \"it's\"}", "{      |it's|}"),
        ('{"a": "x\\ny \\"z\\""}', '{     |x\n y " z" |}'),
        ('{"a": "caf\\u00e9s \\u2013"}', "{     |cafe_____s -     |}"),
        ('"line\\nline"', "|line\n line|"),
        ('{"open: 1, 2', "{|open: 1, 2"),
        ('["a\\', "[|a\\"),
    ],
)
def test_what_a_text_means(text, shown):
    plain = view(text).replace(BREAK, "|").replace(FILLER, "_").replace("é", "e").replace("–", "-")  # noqa: RUF001
    assert plain == shown


@given(st.text("\"'\\{[,: u0e9nab\n\ud800", max_size=60))
def test_places_in_a_view_are_places_in_the_text(text):
    for whole in (text, "{" + text, f'"{text}"'):
        assert len(view(whole)) == len(whole)


def test_what_is_blank_joins_nothing_and_keeps_its_length():
    assert blank("abcdef", [(4, 5), (-1, 2), (1, 3)]) == BREAK * 3 + "d" + BREAK + "f"
    assert blank("abc", []) == "abc"
