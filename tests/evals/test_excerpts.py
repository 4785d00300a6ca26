import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from kv_retract.evals.excerpts import excerpt, visible
from kv_retract.types import Message, SpanRef, ToolCall

THREAD = (
    Message("user", "Where  is\n it?"),
    Message("assistant", "", tool_calls=(ToolCall("c1", "find", '{"q": "it"}'), ToolCall("c2", "ask", "{}"))),
    Message("tool", "0123456789", tool_call_id="c1"),
    Message("tool", "x", tool_call_id="c9"),
    Message("assistant", "Here.", name="guide"),
)


def test_part_of_a_result_and_what_stands_around_it():
    found = excerpt(SpanRef(2, start=3, end=6), THREAD)
    assert (found.before, found.text, found.after, found.num_chars) == ("012", "345", "6789", 3)
    assert (found.message, found.role, found.name) == (2, "tool", "find")
    assert found.previous == 'assistant: find({"q": "it"}), ask({})' and found.following == "tool: x"


def test_first_and_newest_message_have_one_neighbour():
    first, newest = excerpt(SpanRef(0), THREAD), excerpt(SpanRef(4), THREAD)
    assert first.previous == "" and first.following.startswith("assistant: find")
    assert newest.following == "" and newest.previous == "tool: x"
    assert excerpt(SpanRef(1, "tool_call"), THREAD).previous == "user: Where is it?"


def test_names_of_tools_and_speakers():
    names = [excerpt(SpanRef(i), THREAD).name for i in range(5)]
    assert names == ["", "", "find", "", "guide"]


def test_a_whole_call_shows_its_name_a_part_of_it_does_not():
    whole = excerpt(SpanRef(1, "tool_call", 0), THREAD)
    assert (whole.text, whole.name, whole.role) == ('find {"q": "it"}', "find", "assistant (call)")
    assert whole.num_chars == len(whole.text)
    part = excerpt(SpanRef(1, "tool_call", 0, 7, 9), THREAD)
    assert (part.before, part.text, part.after) == ('{"q": "', "it", '"}')


def test_long_texts_are_cut_and_say_so():
    text = "a" * 1000 + "b" * 1000 + "c" * 1000
    found = excerpt(SpanRef(0, start=1000, end=2000), (Message("user", text), Message("user", "d" * 1000)))
    assert found.num_chars == 1000
    assert found.text == "b" * 300 + " … " + "b" * 100
    assert found.before == "… " + "a" * 120 and found.after == "c" * 120 + " …"
    assert found.following == "user: " + "d" * 120 + " …"


def test_invisible_characters_are_shown_by_their_names():
    assert visible("a\u202eb\0c\x1b[31m\u200bd\ud800") == "a⌈U+202E⌋b⌈U+0000⌋c⌈U+001B⌋[31m⌈U+200B⌋d⌈U+D800⌋"
    assert visible("two\nlines\tand é 漢 🙂") == "two\nlines\tand é 漢 🙂"
    hidden = Message("tool", "\u202eevil", name="\x1b]0;t\x07")
    found = excerpt(SpanRef(0), (hidden,))
    assert found.text == "⌈U+202E⌋evil" and found.name == "⌈U+001B⌋]0;t⌈U+0007⌋"


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Co", "L", "S", "Z"])))
def test_nothing_invisible_is_left(text):
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\n\t"]
    assert visible(shown) == shown
