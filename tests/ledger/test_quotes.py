from hypothesis import given
from hypothesis import strategies as st

from kv_retract.ledger.quotes import runs, words_and_runs
from kv_retract.ledger.views import view


def test_runs_know_where_they_stand_and_forget_case_and_punctuation():
    text = "One, TWO (three)  four"
    assert [(run.words, text[run.start : run.end]) for run in runs(text, 3)] == [
        (("one", "two", "three"), "One, TWO (three"),
        (("two", "three", "four"), "TWO (three)  four"),
    ]


def test_runs_do_not_go_over_strings_of_json_nor_into_names_of_members():
    text = view('{"one two three": "four five", "x": "six seven eight \\u00e9t\\u00e9"}')
    assert [run.words for run in runs(text, 3)] == [("six", "seven", "eight"), ("seven", "eight", "été")]


@given(st.text("aBß .\x01\u3164é\n", max_size=60))
def test_the_quick_way_finds_the_same(text):
    quick = words_and_runs(text, 2)
    assert {run.words for run in runs(text, 2)} == {key for key in quick if isinstance(key, tuple)}
