"""Runs that train an eraser: the same batches, stopped and resumed, what they leave, and that the loss falls."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import LoadedModel
from kv_retract.erasers import KVEraserEraser
from kv_retract.erasers.kveraser import VARIANTS
from kv_retract.errors import EraserMismatchError
from kv_retract.testing.erasers import erase
from kv_retract.training.checkpoint import CheckpointError, read_log
from kv_retract.training.config import ConfigError
from kv_retract.training.eraser import train_eraser
from kv_retract.training.eraser_batches import edit_batches
from kv_retract.training.eraser_config import EraserTraining, read_eraser_training
from kv_retract.training.frozen import BEST
from kv_retract.training.texts import TextError

SMALL = EraserTraining(
    rank=4, hidden=16, pretrain_steps=2, finetune_steps=4, batch_tokens=400, lengths=((0.0, 200),), warmup=1,
    learning_rate=5e-3,
)  # fmt: skip
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def loaded(tiny, model_of, tokenizer):
    return LoadedModel(model_of(tiny(num_layers=3)).eval(), tokenizer, "tiny", is_random=True)


@pytest.fixture
def run(loaded):
    def run(config, out, **options):
        return train_eraser(loaded, config, out, **{"validation": 0, **options})

    return run


def state(out):
    return torch.load(out / "state.pt", weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__slots__)


def test_a_batch_depends_on_its_step_only(encoder):
    texts = [np.random.default_rng(0).integers(3, 2000, 900)]
    whole = list(edit_batches(SMALL, encoder, texts))
    assert len(whole) == SMALL.steps == 6 and not same(whole[2], whole[3])
    for step in range(6):
        assert all(
            same(a, b) for a, b in zip(edit_batches(SMALL, encoder, texts, start=step), whole[step:], strict=True)
        )
    assert not same(next(edit_batches(replace(SMALL, seed=1), encoder, texts)), whole[0])


def test_a_step_may_have_several_batches(encoder):
    config = replace(SMALL, accumulate=2)
    whole = list(edit_batches(config, encoder, []))
    assert len(whole) == 12 and not same(whole[0], whole[1])
    assert all(same(a, b) for a, b in zip(edit_batches(config, encoder, [], start=4), whole[8:], strict=True))


def test_workers_draw_the_same_batches(encoder):
    config = replace(SMALL, reuse=2, kept_batches=2)
    texts = [np.random.default_rng(0).integers(3, 2000, 900)]
    alone, ahead = (list(edit_batches(config, encoder, texts, start=1, workers=workers)) for workers in (0, 2))
    assert len(alone) == 5 and all(same(a, b) for a, b in zip(alone, ahead, strict=True))


def test_batches_are_learnt_from_again_in_rounds_and_prepared_once(encoder):
    """Rounds of 4 batches, each learnt from three times, the last one cut short by the end of the run."""
    config, made = replace(SMALL, finetune_steps=16, reuse=3, kept_batches=4), []

    def prepared(batch):
        made.append(batch)
        return batch

    whole = list(edit_batches(config, encoder, [], prepared=prepared))
    numbers = [next(i for i, batch in enumerate(made) if batch is found) for found in whole]
    assert len(whole) == 18 and len(made) == 8, "prepared once each"
    assert numbers[:4] == [0, 1, 2, 3] and numbers[12:16] == [4, 5, 6, 7], "new ones come in order"
    assert sorted(numbers[:12]) == sorted([0, 1, 2, 3] * 3) and numbers[4:12] != [0, 1, 2, 3] * 2
    assert not any(same(a, b) for i, a in enumerate(made) for b in made[:i])
    for step in (3, 5, 11, 14):
        assert all(same(a, b) for a, b in zip(edit_batches(config, encoder, [], start=step), whole[step:], strict=True))


def test_a_run_that_learns_from_batches_again_in_pieces_equals_an_uninterrupted_one(run, tmp_path):
    config = replace(SMALL, variant="kv_map", reuse=2, kept_batches=2, accumulate=2)
    run(config, tmp_path / "whole")
    while not (tmp_path / "pieces" / "eraser").exists():
        run(config, tmp_path / "pieces", seconds=0.0)
    whole, pieces = state(tmp_path / "whole"), state(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_stages(encoder):
    def affected(config):
        return [bool((batch.weight == SMALL.affected_weight).any()) for batch in edit_batches(config, encoder, [])]

    config = replace(SMALL, pretrain_steps=3, finetune_steps=3, text_share=0.0)
    assert affected(config) == [False] * 3 + [True] * 3
    assert affected(replace(config, stage="pretrain")) == [False] * 3
    assert affected(replace(config, stage="finetune")) == [True] * 3
    assert affected(replace(config, stage="finetune", text_share=1.0)) == [False] * 3


@each_variant
def test_a_run_in_pieces_equals_an_uninterrupted_one(run, loaded, tmp_path, variant):
    config, weights = replace(SMALL, variant=variant), deepcopy(loaded.model.state_dict())
    assert run(config, tmp_path / "whole") == 6
    for done in range(1, 7):
        assert run(config, tmp_path / "pieces", seconds=0.0) == done
    whole, pieces = state(tmp_path / "whole"), state(tmp_path / "pieces")
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert any(bool((tensor != 0).any()) for name, tensor in whole.items() if name.startswith(("b.", "w2")))
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), "the base model stays bit by bit"
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loaded.model.parameters())


def test_steps_of_several_batches_with_validations_in_pieces(run, tmp_path):
    """A validation changes nothing of the training, and finds the same best one."""
    config, options = replace(SMALL, finetune_steps=2, accumulate=2), {"validation": 1, "validate_every": 2}
    run(config, tmp_path / "bare")
    run(config, tmp_path / "whole", **options)
    while not (tmp_path / "pieces" / "eraser").exists():
        run(config, tmp_path / "pieces", seconds=0.0, **options)
    whole, *others = (state(tmp_path / name) for name in ("whole", "bare", "pieces"))
    assert all(torch.equal(whole[name], other[name]) for other in others for name in whole)
    logs = [read_log(tmp_path / name) for name in ("whole", "pieces")]
    assert logs[0] == logs[1] and [entry["step"] for entry in logs[0]] == [2, 4]
    ids = {KVEraserEraser(path=str(tmp_path / name / "eraser")).eraser_id for name in ("whole", "pieces")}
    assert len(ids) == 1


def test_the_seed_draws_the_fresh_net_and_leaves_other_chance_alone(run, tmp_path):
    before, drawn = torch.get_rng_state(), []
    for number, seed in enumerate((0, 0, 1)):
        run(replace(SMALL, seed=seed, learning_rate=0.0), tmp_path / str(number), seconds=0.0)
        drawn.append(state(tmp_path / str(number)))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert all(not torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0] if name.startswith("a."))
    assert torch.equal(torch.get_rng_state(), before)


@each_variant
def test_the_eraser_of_a_finished_run_works(run, loaded, tmp_path, variant):
    out = tmp_path / "run"
    run(replace(SMALL, variant=variant), out, validation=1, validate_every=3)
    assert {path.name for path in out.iterdir()} == {"config.json", "log.jsonl", "state.pt", "eraser", BEST}
    eraser = KVEraserEraser(path=str(out / "eraser"))
    assert eraser.variant == variant and eraser.config.base == "tiny"
    engine = HFEngine(loaded.model, max_tokens=512)
    erase(engine, np.random.default_rng(0).integers(3, 2000, 80), [(20, 27)], eraser)
    engine.check_integrity()
    found = [entry for entry in read_log(out) if "validation_kl" in entry]
    assert [entry["step"] for entry in found] == [3, 6] and len(found[0]["validation_kl"]) == 7
    assert set(found[0]) == {
        "step",
        "validation_kl",
        "affected",
        "leak",
        "unaffected",
        "teacher_affected",
        "teacher_unaffected",
    }


def test_the_best_validation_is_kept_and_a_run_stops_early(run, tmp_path, monkeypatch):
    """Scripted validations: worse and worse from the second one on."""
    scores = iter([5.0, 3.0, 4.0, 6.0, 7.0])
    monkeypatch.setattr(
        "kv_retract.training.eraser.validation_of", lambda *a, **kw: {"validation_kl": {"facts": next(scores)}}
    )
    config, out = replace(SMALL, finetune_steps=50, patience=2), tmp_path / "run"
    assert run(config, out, validation=1, validate_every=1) == 4, "two after the best"
    assert run(config, out, validation=1, validate_every=1) == 4, "and does not go on"
    best = KVEraserEraser(path=str(out / BEST))
    assert KVEraserEraser(path=str(out / "eraser")).eraser_id == best.eraser_id
    run(config, tmp_path / "two", seconds=0.0)
    run(config, tmp_path / "two", seconds=0.0)
    assert not (tmp_path / "two" / "eraser").exists(), "stopped, not finished"


def test_a_folder_belongs_to_one_run(run, loaded, tiny, model_of, tmp_path):
    run(SMALL, tmp_path / "run", seconds=0.0, texts=["a text " * 200])
    with pytest.raises(CheckpointError, match="another configuration"):
        run(replace(SMALL, seed=1), tmp_path / "run", texts=["a text " * 200])
    with pytest.raises(CheckpointError, match=r"another configuration \(base\)"):
        other = LoadedModel(model_of(tiny(num_layers=3, seed=1)).eval(), loaded.tokenizer, "tiny", is_random=True)
        train_eraser(other, SMALL, tmp_path / "run", texts=["a text " * 200])
    given = read_eraser_training(tmp_path / "run" / "config.json")
    with pytest.raises(TextError, match="name the same files"):
        run(given, tmp_path / "other")
    with pytest.raises(ConfigError, match="on a model of fingerprint abc, got 'tiny'"):
        run(replace(given, base="abc"), tmp_path / "other")


@each_variant
def test_an_eraser_is_trained_further(run, tmp_path, variant):
    config = replace(SMALL, variant=variant)
    run(config, tmp_path / "first")
    eraser = tmp_path / "first" / "eraser"
    further = replace(config, finetune_steps=2, stage="finetune", learning_rate=0.0)
    run(further, tmp_path / "same", start=eraser)
    first, same_one = state(tmp_path / "first"), state(tmp_path / "same")
    assert all(torch.equal(first[name], same_one[name]) for name in first), "no step at a learning rate of 0"
    run(replace(further, learning_rate=1e-3), tmp_path / "whole", start=eraser)
    while not (tmp_path / "pieces" / "eraser").exists():
        run(replace(further, learning_rate=1e-3), tmp_path / "pieces", start=eraser, seconds=0.0)
    whole, pieces = state(tmp_path / "whole"), state(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert any(not torch.equal(whole[name], first[name]) for name in whole)
    with pytest.raises(CheckpointError, match=r"another configuration \(start\)"):
        run(replace(further, learning_rate=1e-3), tmp_path / "whole")
    given = read_eraser_training(tmp_path / "whole" / "config.json")
    assert given.start == KVEraserEraser(path=str(eraser)).eraser_id
    with pytest.raises(ConfigError, match="train .*kveraser.* further, got none: name that one's folder"):
        run(given, tmp_path / "other")


def test_a_map_gets_more_hidden_units_where_a_run_describes_them(run, tmp_path):
    run(replace(SMALL, variant="kv_map"), tmp_path / "first")
    config = replace(SMALL, variant="kv_map", hidden=24, learning_rate=0.0, seed=3)
    run(config, tmp_path / "wider", start=tmp_path / "first" / "eraser")
    first, wider = state(tmp_path / "first"), state(tmp_path / "wider")
    assert wider["w1"].shape[-1] == 24 and torch.equal(wider["w1"][..., :16], first["w1"])
    assert torch.equal(wider["w2"][:, :16], first["w2"]) and not wider["w2"][:, 16:].any()
    assert bool(wider["w1"][..., 16:].any()), "new units are drawn"
    assert KVEraserEraser(path=str(tmp_path / "wider" / "eraser")).config.hidden == 24
    with pytest.raises(EraserMismatchError, match="differ in rank: rank 4 and 2"):
        run(replace(config, rank=2), tmp_path / "other", start=tmp_path / "first" / "eraser")


def test_only_an_eraser_of_the_same_model_and_shape_is_trained_further(run, loaded, tiny, model_of, tmp_path):
    run(replace(SMALL, variant="kv_map"), tmp_path / "first")
    eraser = tmp_path / "first" / "eraser"
    with pytest.raises(EraserMismatchError, match="differ in hidden, variant: hidden 16 and 8, variant 'kv_map' and"):
        run(replace(SMALL, hidden=8), tmp_path / "other", start=eraser)
    other = LoadedModel(model_of(tiny(num_layers=3, seed=1)).eval(), loaded.tokenizer, "tiny", is_random=True)
    with pytest.raises(EraserMismatchError, match="was trained on model 'tiny'"):
        train_eraser(other, replace(SMALL, variant="kv_map"), tmp_path / "other", start=eraser)
    with pytest.raises(EraserMismatchError, match="expected a learned eraser in"):
        run(SMALL, tmp_path / "other", start=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_configurations(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"variant": "kv_map", "hidden": 8, "lengths": [[0, 300]], "restarts": [[0.5, 1e-3]]}))
    assert read_eraser_training(path, stage="finetune") == EraserTraining(
        variant="kv_map", hidden=8, lengths=((0.0, 300),), restarts=((0.5, 1e-3),), stage="finetune"
    )
    assert read_eraser_training(None) == EraserTraining()
    for given, told in (
        ({"stage": "third"}, "a stage of pretrain, finetune, both, got 'third'"),
        ({"steps": 3}, "fields of EraserTraining"),
        ({"lengths": ()}, "lengths that begin at 0"),
        ({"restarts": ((0.0, 1e-3),)}, "restarts at ascending shares"),
        ({"finetune_steps": 0, "pretrain_steps": 0}, "of at least 1"),
        ({"reuse": 0, "kept_batches": 0}, "reuse, kept_batches of at least 1"),
        ({"single_share": 1.5}, "a single_share from 0 to 1, got 1.5"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_eraser_training(None, **given)


@pytest.mark.slow
@each_variant
def test_the_divergence_falls(run, tmp_path, variant):
    """Of a model of random weights, which has few notes: a third of the divergence goes in a few seconds."""
    config = replace(SMALL, variant=variant, stage="finetune", finetune_steps=60, batch_tokens=800, learning_rate=1e-2)
    run(config, tmp_path / "run")
    losses = [entry["kl"] for entry in read_log(tmp_path / "run") if "kl" in entry]
    print(f"{variant}: {losses}")
    assert losses[-1] < 0.8 * losses[0]
