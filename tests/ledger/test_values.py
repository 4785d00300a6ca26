import pytest

from kv_retract.ledger.values import capitalised, names, values
from kv_retract.ledger.views import view


def keys(text):
    return [value.key for value in values(view(text), min_characters=4, min_digits=3)]


@pytest.mark.parametrize(
    ("one", "other", "key"),
    [
        ("order #W2378156.", "(w2378156)", "w2378156"),
        ("$1,234.50", "1234.5 EUR", "1234.5"),
        ('{"price": 207.0}', "207 dollars", "207"),
        ("567kg", "567 kg", "567"),
        ("-2,580", "2580", "2580"),
        ("2024-05-14T06:33:04", "on May 14, 2024", "05/14"),
        ("at 10:04 May 14", "(May 14)", "05/14"),
        ("the 3rd of September", "Sept. 3", "09/03"),
        ("Anna.Lee@Example.org", "<anna.lee@example.org>", "anna.lee@example.org"),
        ('{"id": "UHDAHF"}', '"UHDAHF"', "uhdahf"),
        ("gift_card_8887175", "GIFT_CARD_8887175", "gift_card_8887175"),
        ("00712", "'00712'", "00712"),
        ("call 555-0123!", "555-0123", "555-0123"),
        ("see src/app/main.py:", "src/app/main.py", "src/app/main.py"),
        ("https://a.example/x1?y", "(https://a.example/x1)", "https://a.example/x1"),
        ('{"a": "\\nM05KNL"}', "M05KNL", "m05knl"),
    ],
)
def test_a_value_has_one_key_however_it_is_written(one, other, key):
    assert keys(one) == keys(other) == [key]


@pytest.mark.parametrize(
    "text",
    [
        "1, 2 and 10, 62 or 150; 2000",
        "at 10:30am or 14:00:00, in 24h",
        "24/7, 10-12, v2, 3-5 days, 1.2.3",
        "true False null N/A and/or e.g. U.S. Dr.Lee",
        "step1 item_2 option-3",
        "round_trip basic_economy follow-up one-stop-flight",
        "JSON ATL is NOT",
        '{"flight_number_1234": "economy", "id5678" : true}',
        "May we? 99 May",
    ],
)
def test_what_says_little_is_no_value(text):
    assert keys(text) == []


def test_numbers_of_a_list_without_spaces_stay_apart():
    assert keys("[105,102,1936]") == ["105", "102", "1936"]
    assert keys("105,102 people") == ["105102"]


def test_a_value_says_where_it_stands():
    text = '{"a": "x\\u00e9 HAT227"}'
    [value] = values(view(text), min_characters=4, min_digits=3)
    assert text[value.start : value.end] == "HAT227"


def test_thresholds():
    assert list(values("AB12 1234", min_characters=5, min_digits=5)) == []
    assert [v.key for v in values("A12 17", min_characters=3, min_digits=2)] == ["a12", "17"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Passengers: Lei Ito, and others.", ["lei", "ito"]),
        ("The owner is Vus.", ["vus"]),
        ("Zürich. Élodie Durand", ["élodie", "durand"]),
        ("Total: Yes.\nPrice: No", []),
        ("Great. Thanks! I do.", []),
        ("on Monday in May, IN ORD", []),
        ('{"city": "Denver", "ok": "yes"}', ["denver"]),
        ('{"first": "Lei", "last": "Ito", "class": "economy"}', ["lei", "ito"]),
        ('{"text": "Denver. Then"}', []),
    ],
)
def test_names(text, found):
    shown = view(text)
    assert [name.key for name in names(shown, capitalised(shown))] == found
