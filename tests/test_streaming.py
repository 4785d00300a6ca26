"""Token ids to text deltas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.streaming import TextStream


def decode(ids):
    """A byte-level tokenizer: one token per byte, as bad as it gets."""
    return bytes(ids).decode("utf-8", "replace")


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_deltas_join_to_the_text_up_to_the_first_stop(text, stop):
    stream = TextStream(decode, stop)
    out = ""
    for token in text.encode("utf-8", "replace"):
        delta = stream.push(token)
        assert "\ufffd" not in delta or "\ufffd" in text
        out += delta
        if stream.stopped:
            break
    out += stream.finish()
    clean = text.encode("utf-8", "replace").decode()
    first = min((clean.index(s) for s in stop if s in clean), default=None)
    # A stop string that ends earlier may hide one that begins earlier but ends later.
    assert out == clean[:first] or (stream.stopped and any(clean.startswith(out + s) for s in stop))
    assert stream.text == out


def test_a_character_is_held_back_until_it_is_whole():
    stream = TextStream(decode)
    deltas = [stream.push(b) for b in "né€😀".encode()]
    assert deltas == ["n", "", "é", "", "", "€", "", "", "", "😀"]


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(decode, ["STOP"])
    assert [stream.push(b) for b in b"aSTaSTOPx"] == ["a", "", "", "STa", "", "", "", "", ""]
    assert stream.stopped and stream.text == "aSTa"


def test_the_end_releases_what_was_held():
    stream = TextStream(decode, ["STOP"])
    out = "".join(stream.push(b) for b in b"abcST")
    assert out == "abc" and stream.finish() == "ST" and stream.text == "abcST"


def test_broken_bytes_do_not_stall_the_stream():
    stream = TextStream(decode)
    out = "".join(stream.push(b) for b in b"\xff\xff\xff\xff\xffabc") + stream.finish()
    assert out.endswith("abc")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        TextStream(decode, [""])
