"""Cutting before special tokens changes nothing: ids and offsets are those of the whole text, for every tokenizer."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kv_retract.errors import MessageError
from kv_retract.ledger.encode import encode
from kv_retract.ledger.segments import Encoder
from kv_retract.types import Message, ToolCall

from .conftest import CORPUS, SPECIALS

HOSTILE = [*SPECIALS, "<|im_start|>x", "<|im_", "end|>", "<|", "[INST", "<pad><pad>", "</s"]
TEXTS = [
    "",
    " ",
    "\n\n",
    "\t ",
    "a",
    "Ab c",
    " lead",
    "trail ",
    "é😀",
    "日本",
    "e\u0301",
    "\0",
    "{{ m.role }}",
    "0",
    "_x",
]
parts = st.lists(st.sampled_from(HOSTILE) | st.sampled_from(TEXTS) | st.text("ab <|>_\n.", max_size=8), max_size=12)
parts = parts.map("".join)
NAMES = ["chatml", "llama3", "mistral", "phi3", "qwen3", "json_xml", "picky", "sentencepiece"]


def same(one, other):
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in ((one.ids, other.ids), (one.starts, other.starts), (one.ends, other.ends))
    )


def trained(bpe, added=()):
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<pad>"], show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS if s != "<pad>"])
    bpe.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", clean_up_tokenization_spaces=False)


def prefixed():
    """Writes a space before the first word of a text; trims white space off its offsets."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    return trained(bpe)


def metaspace():
    """Marks the first word of a text only."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.normalizer = normalizers.NFKC()
    return trained(bpe)


def crowded():
    """Added tokens that take the white space beside them, are found after normalising, or overlap special ones."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    added = [
        AddedToken("<|user|>", special=True, normalized=False, lstrip=True),
        AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
        AddedToken("[INST]", special=True, normalized=True),
        AddedToken("<|im_start|>x", normalized=False),
        AddedToken("<pad><pad>", normalized=False),
        AddedToken("ab", normalized=True),
    ]
    return trained(bpe, added)


def worded():
    """A token counts only where no letter stands beside it: nothing may be cut."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(bpe, [AddedToken("ab", single_word=True, normalized=False)])


def bare():
    """No special token at all."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)


OTHERS = {make.__name__: make for make in (prefixed, metaspace, crowded, worded, bare)}


@pytest.fixture(scope="module")
def tokenizers(renderers):
    from kv_retract.engine.models import load_reference_tokenizer

    return {
        **{name: renderers[name].tokenizer for name in NAMES},
        **{name: make() for name, make in OTHERS.items()},
        "reference": load_reference_tokenizer(),
    }


@pytest.fixture(scope="module")
def encoders(tokenizers):
    return {name: Encoder(tokenizer) for name, tokenizer in tokenizers.items()}


@pytest.mark.parametrize("name", [*NAMES, *OTHERS, "reference"])
@given(pieces=st.lists(st.tuples(parts.filter(bool), st.booleans()), max_size=4))
@settings(max_examples=60, deadline=None)
def test_pieces_are_encoded_as_without_cuts(tokenizers, encoders, name, pieces):
    whole = encode(tokenizers[name], pieces)
    assert same(encoders[name].encode(pieces), whole)
    assert same(encoders[name].encode(pieces), whole), "and once more, from memory"


messages = st.builds(
    lambda role, content, call: Message(
        role, content, tool_calls=(ToolCall("c", "search", call),) if role == "assistant" else ()
    ),
    st.sampled_from(["system", "user", "assistant", "tool"]),
    parts,
    parts | st.just('{"city": "Oslo"}'),
)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mistral"])
@given(thread=st.lists(messages, min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_rendering_is_encoded_as_without_cuts(renderers, tokenizers, name, thread):
    class Whole:
        def encode(self, pieces):
            return encode(tokenizers[name], pieces)

    renderer = renderers[name]
    try:
        rendering, kept = renderer.render(thread), renderer._encoder
    except MessageError:
        return  # the template refuses it
    renderer._recent.clear()
    renderer._encoder = Whole()
    try:
        assert same(rendering.encoding, renderer.render(thread).encoding)
    finally:
        renderer._encoder = kept
        renderer._recent.clear()


@pytest.mark.parametrize("name", ["chatml", "sentencepiece", "prefixed", "metaspace", "crowded", "reference"])
def test_only_what_is_new_is_encoded(tokenizers, name):
    asked = []

    class Watched:
        added_tokens_decoder = tokenizers[name].added_tokens_decoder

        def __call__(self, texts, **kw):
            asked.extend(texts)
            return tokenizers[name](texts, **kw)

    token = "<|im_start|>"
    encoder, text = Encoder(Watched()), f"{token}user\nHello.{token}tool\nA long result.\n"
    encoder.encode([(text, False)])
    asked.clear()
    found = encoder.encode([(f"{text}{token}new", False), (token, True)])
    assert asked == [f"{token}new", token]
    assert same(found, encode(tokenizers[name], [(f"{text}{token}new", False), (token, True)]))


@pytest.mark.parametrize("name", ["worded", "bare"])
def test_where_nothing_can_be_cut_the_text_is_one_piece(tokenizers, name):
    asked = []

    class Watched:
        added_tokens_decoder = tokenizers[name].added_tokens_decoder

        def __call__(self, texts, **kw):
            asked.extend(texts)
            return tokenizers[name](texts, **kw)

    Encoder(Watched()).encode([("a<|im_start|>b", False)])
    assert asked == ["a<|im_start|>b"]


def test_a_tokenizer_that_is_unlike_others_is_given_whole_texts(tokenizers):
    class Odd:
        """Counts the tokens of the whole text into the first id."""

        added_tokens_decoder = tokenizers["chatml"].added_tokens_decoder

        def __call__(self, texts, **kw):
            output = tokenizers["chatml"](texts, **kw)
            return {
                "input_ids": [[len(ids), *ids[1:]] for ids in output["input_ids"]],
                "offset_mapping": output["offset_mapping"],
            }

    odd, pieces = Odd(), [("<|im_start|>a<|im_end|>b<|im_end|>", False)]
    assert same(Encoder(odd).encode(pieces), encode(odd, pieces))


def test_what_is_kept_is_bounded(tokenizers):
    encoder = Encoder(tokenizers["chatml"], most=200)
    for n in range(50):
        pieces = [(f"<|im_start|>message {n}<|im_end|>\n", False)]
        assert same(encoder.encode(pieces), encode(tokenizers["chatml"], pieces))
    assert len(encoder._recent) < 20


def test_threads_share_a_tokenizer(tokenizers):
    encoders, failed = [Encoder(tokenizers["chatml"], most=300) for _ in range(2)], []
    shown = "<|im_start|>user\nmessage {}<|im_end|>\n"
    texts = [[(shown.format(n % 7) * (1 + n % 3), False), ("<|im_end|>" * (1 + n % 5), n % 2 > 0)] for n in range(60)]
    wanted = [encode(tokenizers["chatml"], pieces) for pieces in texts]

    def work(encoder):
        for pieces, whole in zip(texts, wanted, strict=True):
            if not same(encoder.encode(pieces), whole):
                failed.append(pieces)

    workers = [threading.Thread(target=work, args=(encoders[n % 2],)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
