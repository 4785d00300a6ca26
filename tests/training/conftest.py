"""The bundled tokenizer, and sizes at which a model trains in a second."""

import pytest
from transformers import AutoTokenizer

from kv_retract.reference import MODEL_DIR
from kv_retract.training.config import ReferenceConfig
from kv_retract.training.corpus import generate
from kv_retract.training.encoding import RowEncoder
from kv_retract.training.reference import new_model


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="session")
def encoder(tokenizer):
    return RowEncoder(tokenizer)


@pytest.fixture(scope="session")
def make(encoder):
    """`generate` with the tokenizer's lengths; the held-out family from its only split."""

    def make(family, seed=0, **options):
        options.setdefault("split", "test" if family == "documents" else "train")
        return generate(family, seed=seed, tokens=encoder.length, **options)

    return make


@pytest.fixture(scope="session")
def tiny():
    """A configuration of seconds; fields may be replaced."""

    def tiny(**fields):
        small = dict(
            hidden_size=48, intermediate_size=32, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16,
            steps=6, batch_tokens=256, lengths=((0.0, 128),), warmup=2,
        )  # fmt: skip
        return ReferenceConfig(**{**small, **fields})

    return tiny


@pytest.fixture(scope="session")
def model_of(tokenizer):
    """The fresh model of a configuration."""

    def model_of(config):
        return new_model(
            config, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )

    return model_of
