"""Landmarks by name: pooled, from a folder, bundled; those of another model are refused."""

import json

import pytest
import torch

from kv_retract.engine.bilayer import BiLayer, BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.engine.working import fingerprint_of
from kv_retract.errors import LandmarkMismatchError
from kv_retract.landmarks import SHIPPED, LandmarkNet, PooledLandmarks, find_landmarks
from kv_retract.landmarks.config import CONFIG, WEIGHTS
from kv_retract.testing.models import tiny_model
from kv_retract.training.acre_config import read_acre_training

SMALL = {"window": 16, "ratio": 4, "local": 64, "queries": 8, "refill": 16, "max_tokens": 320}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    net = LandmarkNet.for_model(model)
    with torch.no_grad():
        net.heads.add_(torch.randn_like(net.heads))
    net.save(tmp_path / "landmarks", fingerprint=fingerprint_of(model), base="tiny")
    return tmp_path / "landmarks"


def test_a_folder_gives_what_was_saved_frozen(model, folder):
    found = find_landmarks(str(folder), model, fingerprint_of(model))
    assert isinstance(found, LandmarkNet) and not any(p.requires_grad for p in found.parameters())
    assert found.identity != LandmarkNet.for_model(model).identity
    engine = BiLayerEngine(HFEngine(model, max_tokens=200), BiLayer(**SMALL, landmarks=str(folder)))
    assert engine.landmarks.identity == found.identity


def test_a_model_without_bundled_ones_gets_pooled_ones(model):
    assert isinstance(find_landmarks("", model, fingerprint_of(model)), PooledLandmarks)
    assert isinstance(find_landmarks("pooled", model, fingerprint_of(model)), PooledLandmarks)


def test_the_reference_model_has_bundled_ones():
    loaded = load_model("reference")
    found = find_landmarks("", loaded.model, fingerprint_of(loaded.model))
    assert isinstance(found, LandmarkNet) and found.heads.shape == (6, 6)
    config = read_acre_training(SHIPPED / "training" / "config.json")
    assert config.base == fingerprint_of(loaded.model)
    steps = [json.loads(line)["step"] for line in (SHIPPED / "training" / "log.jsonl").read_text().splitlines()]
    assert 0.8 * config.steps < steps[-1] <= config.steps  # the end, with next to no learning rate, may be cut short


def test_those_of_another_model_are_refused(folder):
    other = tiny_model("qwen3")
    with pytest.raises(LandmarkMismatchError, match="train some for it"):
        find_landmarks(str(folder), other, fingerprint_of(other))


def test_a_folder_without_landmarks_is_named(model, tmp_path):
    with pytest.raises(LandmarkMismatchError, match="kv-retract train acre wrote"):
        find_landmarks(str(tmp_path / "nothing"), model, fingerprint_of(model))


@pytest.mark.parametrize("damage", ["cut", "other shape", "no weights", "no json", "no model"])
def test_damaged_landmarks_are_refused(model, folder, damage):
    if damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    elif damage == "other shape":
        LandmarkNet.for_model(tiny_model("qwen3")).save(folder, fingerprint=fingerprint_of(model), base="")
    elif damage == "no weights":
        (folder / WEIGHTS).unlink()
    elif damage == "no model":
        (folder / CONFIG).write_text("{}")
    else:
        (folder / CONFIG).write_text(json.dumps({"fingerprint": "x", "colour": 1}))
    with pytest.raises(LandmarkMismatchError, match="expected trained landmarks|cannot read the weights"):
        find_landmarks(str(folder), model, fingerprint_of(model))
