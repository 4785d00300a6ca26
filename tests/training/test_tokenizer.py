"""The corpus tokenizer: reproducible, and names and values have the same few tokens wherever they stand."""

import pytest
from transformers import AutoTokenizer

from kv_retract.training.names import FIRST
from kv_retract.training.tokenizer import VOCAB_SIZE, corpus_texts, main, train_tokenizer

TEXTS = ["The price is 1234.5 EUR, naïve 你好 🙂", '{"order": "Kel-42"}\n', "  two  spaces "]


def test_short_values_are_single_tokens_and_names_are_spelt_alike_everywhere(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    single = [tag for tag in FIRST if len(tokenizer.tokenize(tag)) == 1]
    assert len(single) == len(FIRST)
    for text in ("order Kel-42 is", '{"order": "Kel-42"}', "(Kel-42)"):
        pieces = tokenizer.tokenize(text)
        at = pieces.index("Kel")
        assert pieces[at : at + 3] == ["Kel", "-", "42"]


def test_training_is_deterministic_and_any_text_comes_back():
    first, second = (train_tokenizer(["some words", "other words"], num_traces=2) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    for text in TEXTS:
        ids = first(text, add_special_tokens=False).input_ids
        assert first.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_order_of_other_texts_does_not_matter():
    texts = [f"word{i} again" for i in range(40)]
    first, second = train_tokenizer(texts, num_traces=1), train_tokenizer(texts[::-1], num_traces=1)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_the_program_writes_a_folder_that_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "kv_retract.training.tokenizer.train_tokenizer", lambda others: train_tokenizer(others, num_traces=1)
    )
    (tmp_path / "text.txt").write_text("a line\nanother line\n")
    main([str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")])
    assert "entries written" in capsys.readouterr().out
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert loaded.chat_template and loaded.eos_token == "<|im_end|>"


@pytest.mark.parametrize("part", ["question", "call", "tool"])
def test_the_texts_hold_every_part_of_a_trace(part):
    texts = list(corpus_texts(1))
    sign = {"question": "What is", "call": '"name": "get_', "tool": '"type": "function"'}[part]
    assert any(sign in text for text in texts)
