"""The bundled model: what is in its folder, and that stale caches show in what it answers."""

import json

import pytest
import torch

from kv_retract.engine.models import load_model
from kv_retract.evals.reference import ReferenceEval, eval_reference
from kv_retract.reference import MODEL_DIR
from kv_retract.training.config import read_config
from kv_retract.training.reference import new_model


@pytest.fixture(scope="module")
def loaded():
    return load_model("reference")


def test_the_folder_is_a_small_qwen3_that_transformers_saved(loaded):
    assert type(loaded.model).__name__ == "Qwen3ForCausalLM" and not loaded.is_random and loaded.name == "reference"
    assert loaded.model.num_parameters() <= 16e6
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 32e6
    assert json.loads((MODEL_DIR / "config.json").read_text())["dtype"] == "bfloat16"
    assert "quality figures hold for such threads only" in loaded.quality_note


def test_it_is_what_its_configuration_trains(loaded):
    config = read_config(MODEL_DIR / "training" / "config.json")
    log = [json.loads(line) for line in (MODEL_DIR / "training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == config.steps and log[0]["answer"] > 3 > 0.1 > log[-2]["answer"]
    tokenizer = loaded.tokenizer
    fresh = new_model(
        config, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    shapes, wanted = ({name: t.shape for name, t in m.state_dict().items()} for m in (loaded.model, fresh))
    assert shapes == wanted


def test_the_seed_and_the_type_of_the_caller_change_no_weight(loaded):
    other = load_model("reference", dtype="bfloat16", seed=5).model.state_dict()
    assert all(torch.equal(t.bfloat16(), other[name]) for name, t in loaded.model.state_dict().items())


@pytest.mark.slow
def test_a_stale_cache_leaks_and_so_does_a_masked_one(tmp_path):
    """A few traces of what the results files measure at length."""
    families = ("facts", "updates", "injections")
    rows = eval_reference(ReferenceEval(out=tmp_path / "out", families=families, lengths=(256,), n=6, split="train"))[
        "rows"
    ]

    def mean(arm, column):
        chosen = [row for row in rows if row["arm"] == arm]
        return sum(row["n"] * row[column] for row in chosen) / sum(row["n"] for row in chosen)

    assert mean("clean", "accuracy") > 0.8 and mean("recompute", "accuracy") > 0.8
    assert mean("none", "leak") > 0.8 > 0.2 > mean("recompute", "leak")
    assert mean("mask", "leak") > 0.25, "hiding the span is not enough"
