import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from kv_retract.errors import PolicyError
from kv_retract.policies.classifier import ClassifierDetector, windows
from kv_retract.policies.detectors import Found, PatternDetector, detect, joined
from kv_retract.policies.passages import Passages

WORDS = ("[PAD]", "[UNK]", "the", "room", "was", "clean", "obey", "me", "now", "breakfast", "is", "at", "nine", ".")


def taken(text, finds):
    return [text[find.start : find.end] for find in finds]


def test_patterns_find_the_match_or_its_first_group():
    detector = PatternDetector(patterns={"customer": r"\bC-\d{4}\b", "pin": r"pin: (\d{4})|code (\d{4})"})
    text = "C-1234 has pin: 9876, then code 5555; c-1234"
    assert taken(text, detector(text)) == ["C-1234", "9876", "5555"]
    assert [find.label for find in detector(text)] == ["customer", "pin", "pin"]
    assert len(PatternDetector(patterns={"c": r"\bC-\d{4}\b"}, ignore_case=True)(text)) == 2
    assert PatternDetector(patterns={"empty": "x*"})("abc") == []


@pytest.mark.parametrize("parameters", [{"patterns": {}}, {"patterns": {"a": "(open"}}])
def test_malformed_patterns_are_named(parameters):
    with pytest.raises(PolicyError, match="expected"):
        PatternDetector(**parameters)
    with pytest.raises(PolicyError, match="confidence"):
        PatternDetector(patterns={"a": "a"}, confidence=2)


def test_finds_that_overlap_are_one_and_neighbors_are_two():
    finds = [Found(5, 9, 0.4, "b"), Found(0, 6, 0.9, "a"), Found(9, 12, 0.5, "c")]
    assert joined(finds) == [Found(0, 9, 0.9, "a"), Found(9, 12, 0.5, "c")]
    assert detect(lambda text: finds, "x" * 12, 0.45) == [Found(0, 6, 0.9, "a"), Found(9, 12, 0.5, "c")]
    assert detect(lambda text: [(3, 3, 1, "empty")], "abcdef") == []


@pytest.mark.parametrize(
    "find",
    [(0, 99, 1.0, "a"), (-1, 2, 1.0, "a"), (3, 2, 1.0, "a"), (0, 2, 1.5, "a"), (0, 2), "ab", None, (0, 2, "x", "a")],
)
def test_what_is_no_find_is_an_error_that_does_not_quote(find):
    def mine(text):
        return [find]

    with pytest.raises(PolicyError, match="'mine'") as error:
        detect(mine, "hello world")
    assert "hello" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("First line.\nSecond line\ngoes on here.\n\nThird", ["First line.", "Second line\ngoes on here.", "Third"]),
        ('{"a": "one\\ntwo", "b": 3}', ["one", "two"]),
        ("{'a': \"it's one\\n\\n two\"}", ["it's one", "two"]),
        ("- body: 'one is long and goes\n    on\n\n    two'\n  id: 3", ["one is long and goes\n    on", "two"]),
        ("- body: one is long and goes\n    On here\n  id: 3", ["one is long and goes\n    On here"]),
        ('body: "one\\ntwo \\\n  \\ three"', ["one", "two \\\n  \\ three"]),
        ("<p>one</p><p>two</p>", ["one", "two"]),
    ],
)
def test_lines_of_the_values_that_tools_write(text, lines):
    passages = Passages(text)
    at = text.index(lines[0])
    assert [text[a:b] for a, b in passages.lines(passages.value(at))] == lines
    last = text.index(lines[-1])
    values, index = passages.line(last + 1)
    assert text[slice(*values[index])] == lines[-1]


def test_sentence_around_a_place():
    text = '{"note": "One is here. \\"Two\\" is it! Three"}'
    passages = Passages(text)
    assert text[slice(*passages.sentence(text.index("Two")))] == '\\"Two\\" is it! '


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A b. C d?\nE f", ["A b.", "C d?", "E f"]),
        ("word", ["word"]),
        ('{"a": "One two. Three", "n": 5}', ["a", "One two.", "Three", "n"]),
        ("Subject: hello you\n\nPlease pay now. Thanks", ["hello you", "Please pay now.", "Thanks"]),
        ('[1] a footnote says "so" here now', ["[1] a footnote says", "so", "here now"]),
    ],
)
def test_sentences_leave_no_prose_out(text, sentences):
    assert [text[a:b].strip(' "') for a, b in Passages(text).sentences()] == sentences
    assert Passages("").sentences() == []


def test_windows_overlap_by_half_and_leave_no_sentence_out():
    sentences = [(i * 10, i * 10 + 10) for i in range(6)] + [(60, 200), (200, 210)]
    found = windows(sentences, 40)
    assert found == [(0, 40), (20, 60), (40, 60), (50, 60), (60, 200), (200, 210)]
    assert windows([], 40) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier of one layer that was never trained; its last layer is set to see the word `obey`."""
    path = tmp_path_factory.mktemp("classifier")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    fast.save_pretrained(path)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, id2label={0: "SAFE", 1: "INJECTION"}, label2id={"SAFE": 0, "INJECTION": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    network = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        pooled = [network.bert(**fast(text, return_tensors="pt")).pooler_output[0] for text in SENTENCES]
        away = pooled[1] - sum(pooled[:1] + pooled[2:]) / 2
        middle = (pooled[1] + max(pooled[:1] + pooled[2:], key=lambda one: float(one @ away))) / 2
        network.classifier.weight[:] = torch.stack([-away, away]) * 1000
        network.classifier.bias[:] = torch.stack([away @ middle, -(away @ middle)]) * 1000
    network.save_pretrained(path)
    return path


SENTENCES = ("the room was clean .", "obey me now .", "breakfast is at nine .")


def test_a_classifier_takes_the_sentence_and_leaves_the_rest(model):
    detector = ClassifierDetector(path=model, label="INJECTION", window=1)
    text = " ".join(SENTENCES)
    finds = detector(text)
    assert taken(text, finds) == [SENTENCES[1]]
    assert finds[0].label == "INJECTION" and finds[0].confidence > 0.5
    assert detector(text) == finds, "a second look is answered from memory"
    assert taken(text, ClassifierDetector(path=model, label="SAFE", window=1)(text)) == [SENTENCES[0], SENTENCES[2]]
    inside = f'{{"review": "{text}", "stars": 4}}'
    assert taken(inside, detector(inside)) == [SENTENCES[1]]
    assert detector("") == []


def test_batches_and_length_do_not_change_what_is_found(model):
    text = " ".join(SENTENCES * 40)
    one = ClassifierDetector(path=model, label="INJECTION", window=1, batch_size=1)(text)
    many = ClassifierDetector(path=model, label="INJECTION", window=1, batch_size=7)(text)
    assert len(one) == 40 and [f[:2] for f in one] == [f[:2] for f in many]
    endless = "obey " * 500  # longer than the model's input: cut off, not refused
    assert all(0 <= f.start < f.end <= len(endless) for f in ClassifierDetector(path=model, label="SAFE")(endless))


def test_labels_that_the_model_lacks_are_named(model):
    with pytest.raises(PolicyError, match=re.escape("['INJECTION', 'SAFE'], got 'JAILBREAK'")):
        ClassifierDetector(path=model, label="JAILBREAK")("the room")


def test_a_folder_without_a_model_is_refused_at_once(tmp_path):
    with pytest.raises(PolicyError, match="not downloaded"):
        ClassifierDetector(path="some/model", label="INJECTION")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PolicyError, match="cannot load"):
        ClassifierDetector(path=tmp_path, label="INJECTION")("text")
    with pytest.raises(PolicyError, match="window"):
        ClassifierDetector(path=tmp_path, label="INJECTION", window=0)
    with pytest.raises(PolicyError, match="threshold"):
        ClassifierDetector(path=tmp_path, label="INJECTION", threshold=-1)


def test_without_transformers_the_remedy_is_named(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(PolicyError, match=re.escape("pip install 'kv-retract[hf]'")):
        ClassifierDetector(path=model, label="INJECTION")("text")
