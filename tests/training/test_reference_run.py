"""Runs of the reference model: stopped and resumed bit by bit, what they leave in a folder, and that they learn."""

import json
from dataclasses import replace

import pytest
import torch

from kv_retract.engine.models import load_model
from kv_retract.errors import DeviceError
from kv_retract.training.checkpoint import CheckpointError, RunFolder
from kv_retract.training.config import read_config
from kv_retract.training.reference import probe_accuracy, train_reference
from kv_retract.training.texts import TextError, digest_of


@pytest.fixture
def run(tokenizer):
    """Train in float32 on the CPU, where a run is the same bit by bit; no validation."""

    def run(config, out, **options):
        options = {"tokenizer": tokenizer, "dtype": torch.float32, "validation": 0, **options}
        return train_reference(config, out, **options)

    return run


def state(out):
    return torch.load(out / "state.pt", weights_only=True)


def flat(values):
    """All tensors of a nested state, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    nested = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return [tensor for value in nested for tensor in flat(value)]


def test_a_run_in_pieces_equals_an_uninterrupted_one(run, tiny, tmp_path):
    config = tiny(steps=6, notes_first=0.2, notes_share=0.5)
    assert run(config, tmp_path / "whole") == 6
    for done in range(1, 7):
        assert run(config, tmp_path / "pieces", seconds=0.0) == done
    whole, pieces = state(tmp_path / "whole"), state(tmp_path / "pieces")
    assert whole["step"] == pieces["step"] == 6
    assert len(flat(whole)) > 60 and all(map(torch.equal, flat(whole), flat(pieces)))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "pieces")]
    assert weights[0] == weights[1]


def test_the_folder_of_a_finished_run(run, tiny, tmp_path, tokenizer):
    out, config, ticks = tmp_path / "run", tiny(steps=2, families=("needles",)), []
    assert run(config, out, progress=lambda done, total: ticks.append((done, total)), validation=1) == 2
    assert {path.name for path in out.iterdir()} == {"config.json", "log.jsonl", "model", "state.pt"}
    assert json.loads((out / "config.json").read_text()) == json.loads(json.dumps(config.to_json()))
    entries = RunFolder(out, config.to_json()).entries()
    assert entries[-1]["step"] == 2 and all(
        set(entries[-1][name]) == {"needles"} for name in ("clean", "notes", "test")
    )
    assert ticks == [(1, 2), (2, 2)]
    loaded = load_model(str(out / "model"))
    assert not loaded.is_random and loaded.tokenizer.chat_template == tokenizer.chat_template
    assert all(torch.equal(a, state(out)["model"][n].bfloat16().float()) for n, a in loaded.model.state_dict().items())


def test_a_compiled_run_trains_the_same_weights(run, tiny, tmp_path, monkeypatch):
    """Traced, and run as traced: without a compiler that may round otherwise."""
    traced, compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, dynamic: traced.append(part) or compile(part, dynamic=dynamic, backend="eager")
    )
    config = tiny(steps=2)
    run(config, tmp_path / "plain")
    run(config, tmp_path / "compiled", compiled=True)
    plain, compiled = (flat(state(tmp_path / name)["model"]) for name in ("plain", "compiled"))
    assert len(traced) == 1 and len(plain) == len(compiled)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, compiled, strict=True))


def test_a_stopped_run_has_no_model(run, tiny, tmp_path):
    assert run(tiny(), tmp_path / "run", seconds=0.0) == 1
    assert not (tmp_path / "run" / "model").exists()


def test_a_folder_belongs_to_one_configuration(run, tiny, tmp_path):
    run(tiny(), tmp_path / "run", seconds=0.0)
    with pytest.raises(CheckpointError, match=r"another configuration \(seed\)"):
        run(tiny(seed=1), tmp_path / "run")


def test_a_run_goes_on_with_its_text_only(run, tiny, tmp_path):
    texts = ["some text of people " * 50, "other text " * 80]
    run(tiny(), tmp_path / "run", texts=texts, seconds=0.0)
    config = read_config(tmp_path / "run" / "config.json")
    assert config == replace(tiny(), text_digest=digest_of(texts))
    assert run(config, tmp_path / "run", texts=texts, seconds=0.0) == 2
    with pytest.raises(TextError, match="name the same files"):
        run(config, tmp_path / "run", seconds=0.0)
    with pytest.raises(CheckpointError, match="text_digest"):
        run(tiny(), tmp_path / "run", texts=texts[::-1], seconds=0.0)


def test_a_damaged_state(run, tiny, tmp_path):
    run(tiny(), tmp_path / "run", seconds=0.0)
    (tmp_path / "run" / "state.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="remove it"):
        run(tiny(), tmp_path / "run")


def test_a_device_that_is_not_there(run, tiny, tmp_path):
    with pytest.raises(DeviceError, match="expected a device .* got 'nope'"):
        run(tiny(), tmp_path / "run", device="nope")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_small_model_learns_to_look_things_up(run, tiny, tmp_path, tokenizer, encoder, model_of):
    """In under a minute on one core: facts of a thread are told for names that training never saw."""
    config = tiny(
        hidden_size=128, intermediate_size=256, num_layers=3, head_dim=32, families=("needles",), steps=750,
        batch_tokens=640, lengths=((0.0, 400),), learning_rate=1e-3, warmup=30, text_share=0.1, text_from=0.0,
        notes_first=0.0, notes_share=0.0, removed_share=0.0,
    )  # fmt: skip

    def accuracy(model, split):
        common = dict(length=128, seed=10**9, n=40, dtype=torch.float32, families=("needles",))
        return probe_accuracy(model, encoder, split=split, **common)["needles"]

    out = tmp_path / "run"
    assert [accuracy(model_of(config), split) for split in ("train", "test")] == [0.0, 0.0]
    assert run(config, out) == 750
    losses = [entry["answer"] for entry in RunFolder(out, config.to_json()).entries()]
    assert losses[0] > 3 and losses[-1] < 0.5 and sum(losses[-3:]) < 0.2 * sum(losses[:3])
    model = load_model(str(out / "model")).model
    new_threads, new_names = accuracy(model, "train"), accuracy(model, "test")
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, accuracy 0 to {new_threads:.2f} and {new_names:.2f}")
    # Two facts in a thread: one in two is what a model has that finds its values, but not which is which.
    assert new_threads > 0.6 and new_names > 0.4
