"""What is remembered is bounded, and the newest stays."""

from kv_retract.ledger.recent import MOST_CHARACTERS, SHORT, Kept, Recent, remembered
from kv_retract.types import Message, ToolCall


def test_what_was_not_asked_for_longest_goes():
    recent = Recent(10)
    recent.keep([("a", 1, 4), ("b", 2, 4)])
    assert recent.find(["a", "b", "c"]) == [1, 2, None]
    recent.find(["a"])
    recent.keep([("c", 3, 4)])
    assert recent.find(["a", "b", "c"]) == [1, None, 3] and len(recent) == 2


def test_what_is_too_large_is_not_kept_and_takes_nothing_with_it():
    recent = Recent(10)
    recent.keep([("a", 1, 4), ("b", 2, 11)])
    assert recent.find(["a", "b"]) == [1, None]


def test_a_key_that_is_kept_again_counts_once():
    recent = Recent(10)
    for value in range(9):
        recent.keep([("a", value, 4)])
    recent.keep([("b", 0, 6)])
    assert recent.find(["a", "b"]) == [8, 0]


def test_a_function_is_asked_once_for_short_and_long_texts():
    asked = []

    @remembered
    def size(text):
        """Docstring."""
        asked.append(text)
        return len(text) or None

    long = "x" * (SHORT + 1)
    for _ in range(3):
        assert (size("ab"), size(""), size(long)) == (2, None, SHORT + 1)
    assert asked == ["ab", "", long] and size.__name__ == "size" and size.__doc__ == "Docstring."


def test_texts_beyond_all_bounds_are_asked_for_again():
    asked = []
    size = remembered(lambda text: asked.append(1) or len(text))
    huge = "x" * (MOST_CHARACTERS + 1)
    assert size(huge) == size(huge) == len(huge) and len(asked) == 2


def test_an_error_is_not_remembered():
    asked = []

    @remembered
    def fails(text):
        asked.append(text)
        raise KeyError(text)

    for text in ("a", "x" * (SHORT + 1)):
        for _ in range(2):
            try:
                fails(text)
            except KeyError:
                pass
    assert len(asked) == 4


def test_a_digest_is_that_of_all_fields_and_no_field_itself():
    import copy
    import dataclasses
    import hashlib
    import json
    import pickle

    message = Message("assistant", "é", (ToolCall("1", "f", "{}"),), None, "n", "why")
    data = json.dumps(dataclasses.astuple(message), ensure_ascii=False, separators=(",", ":")).encode()
    assert message.digest() == message.digest() == hashlib.sha256(data).hexdigest()
    for twin in (copy.copy(message), copy.deepcopy(message), pickle.loads(pickle.dumps(message))):
        assert twin == message and hash(twin) == hash(message) and twin.digest() == message.digest()
    other = dataclasses.replace(message, content="e")
    assert other.digest() != message.digest() and "_digest" not in dataclasses.asdict(message)


def test_tool_calls_given_as_a_list_are_kept_as_a_tuple():
    message = Message("assistant", "", tool_calls=[ToolCall("1", "f", "{}")])
    assert message.tool_calls == (ToolCall("1", "f", "{}"),) and hash(message)


def test_what_is_made_of_settings_is_made_anew_once_these_change():
    import copy

    made = []
    kept = Kept(lambda *settings: made.append(settings) or len(made))
    assert [kept.of(1, "a"), kept.of(1, "a"), kept.of(2, "a"), kept.of(1, "a")] == [1, 2 - 1, 2, 3]
    assert copy.deepcopy(kept).of(1, "a") == 4, "a copy makes its own"


def test_a_copy_of_a_memory_begins_empty():
    import copy

    memory = Recent(10)
    memory.keep([("a", 1, 1)])
    assert len(copy.deepcopy(memory)) == 0 and len(memory) == 1
