"""Real text for training: what files hold, and that a run is told from another by its text."""

import json

import pytest

from kv_retract.training.encoding import thread_text
from kv_retract.training.texts import TextError, check_texts, digest_of, read_texts
from kv_retract.types import Message

THREAD = (Message("user", "What is the gate?"), Message("assistant", "It is B7."))


@pytest.fixture
def trace(tmp_path):
    messages = [{"role": m.role, "content": m.content} for m in THREAD]
    path = tmp_path / "threads" / "trace.jsonl"
    path.parent.mkdir()
    path.write_text((json.dumps({"messages": messages}) + "\n") * 2)
    return path


def test_a_thread_is_in_the_bundled_chat_form(trace):
    text = thread_text(THREAD)[0]
    assert text.startswith("<|im_start|>user\nWhat is the gate?<|im_end|>\n")
    assert read_texts([trace]) == read_texts([trace.parent]) == [text, text]


def test_any_other_file_is_one_text(trace, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("Some words.\nOf two lines.\n")
    assert read_texts([plain, trace]) == ["Some words.\nOf two lines.\n", *read_texts([trace])]
    assert read_texts([]) == []


def test_what_holds_no_text(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\xff")
    for name, told in (("empty.txt", "expected text"), ("bytes.bin", "cannot read"), ("none.txt", "cannot read")):
        with pytest.raises(TextError, match=f"{told}.*{name}"):
            read_texts([tmp_path / name])
    (tmp_path / "folder").mkdir()
    with pytest.raises(TextError, match="folder"):
        read_texts([tmp_path / "folder"])


def test_texts_are_told_apart_by_their_digest():
    digests = [digest_of(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])]
    assert len(set(digests)) == 4 and digest_of([]) == "" and len(digests[0]) == 16
    assert check_texts(["a", "b"], digests[0]) == check_texts(["a", "b"], "") == digests[0]
    with pytest.raises(TextError, match=f"digest {digests[0]}, got none: name the same files"):
        check_texts([], digests[0])
