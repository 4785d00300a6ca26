import pytest

from kv_retract.ledger.sentences import clauses, content_words, sentences, stem, words


def parts(text):
    return [sentence.of(text) for sentence in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ("no stop at the end", ["no stop at the end"]),
        ("first line\n\n  second line", ["first line", "second line"]),
        ("It costs 3.50 euros. Fine.", ["It costs 3.50 euros.", "Fine."]),
        ("Dr. Weber is here. Come.", ["Dr. Weber is here.", "Come."]),
        ("At 9 a.m. please. Or at 5 p.m. Thanks.", ["At 9 a.m. please.", "Or at 5 p.m.", "Thanks."]),
        ("Fruit, e.g. Apples. Yes.", ["Fruit, e.g. Apples.", "Yes."]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("Really?! Well...  ok", ["Really?!", "Well...", "ok"]),
        ("Grüße. Ça va?", ["Grüße.", "Ça va?"]),
        ("see main.py and a@b.org", ["see main.py and a@b.org"]),
    ],
)
def test_sentences(text, expected):
    assert parts(text) == expected


def test_ranges_are_apart_in_order_and_leave_only_white_space():
    text = "  One.  Two, e.g. this.\n\nThree!  "
    left, at = "", 0
    for start, end in sentences(text):
        assert at <= start < end
        left, at = left + text[at:start], end
    assert not (left + text[at:]).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'd like the aisle, and I need a wheelchair.", ["I'd like the aisle", "I need a wheelchair."]),
        ("My hotel is A; my airline is B.", ["My hotel is A", "my airline is B."]),
        ("I am vegan but my wife eats meat", ["I am vegan", "my wife eats meat"]),
        ("Salt and pepper and I", ["Salt and pepper and I"]),
        ("Two beds and a desk, please.", ["Two beds and a desk, please."]),
        ("By the way, my hotel is A.", ["By the way, my hotel is A."]),
    ],
)
def test_clauses(text, expected):
    [sentence] = sentences(text)
    assert [clause.of(text) for clause in clauses(text, sentence)] == expected


def test_words_keep_numbers_addresses_and_dates_whole():
    assert words("Mail a.b@x.org on 2024-05-12, at 9:30!") == ["mail", "a.b@x.org", "on", "2024-05-12", "at", "9:30"]


def test_content_words_leave_out_what_says_nothing():
    assert content_words("Please forget what I've said about my hotels") == ["forget", "hotel"]
    assert content_words("I'd rather not, thanks") == []


@pytest.mark.parametrize(
    "same",
    [
        ("hotel", "hotels"),
        ("book", "booked", "booking"),
        ("prefer", "preferred"),
        ("city", "cities"),
        ("note", "noted"),
    ],
)
def test_forms_of_a_word_have_one_stem(same):
    assert len({stem(word) for word in same}) == 1


@pytest.mark.parametrize("word", ["gas", "bus", "ring", "red", "may", "b2b", "class"])
def test_short_and_odd_words_stay_apart(word):
    assert stem(word) == word
