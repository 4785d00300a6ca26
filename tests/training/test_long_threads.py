"""A long thread with gradients is what the engine keeps of it on a cache."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from kv_retract.cache.keys import build_key
from kv_retract.cache.refill import Pooling
from kv_retract.engine.bilayer import BiLayer, BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.support import inspect_model
from kv_retract.errors import UnsupportedModelError
from kv_retract.landmarks import LandmarkNet
from kv_retract.testing.models import tiny_model
from kv_retract.training.long_threads import LongStudent, brought_back
from kv_retract.types import SamplingParams

SETTINGS = BiLayer(
    window=16, ratio=4, overlap=3, local=48, sinks=2, queries=10, refill=12, landmark_positions=12, max_tokens=320
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Heard(Pooling):
    """A pooling whose scores are kept."""

    pooling: Pooling
    heard: list = field(default_factory=list)
    together: bool = True

    def scores(self, layer, look):
        return self.pooling.scores(layer, look)

    def all_scores(self, looks):
        scores = super().all_scores(looks)
        self.heard.append(scores[0])
        return scores


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request):
    return tiny_model(request.param).requires_grad_(False)


@pytest.fixture(params=[True, False])
def student(model, request):
    """With landmarks that training has moved, attended to or not."""
    net, generator = LandmarkNet.for_model(model), torch.Generator().manual_seed(3)
    net.attended = request.param
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return LongStudent(model, inspect_model(model)[1], net)


def ids_of(n, seed):
    return np.random.default_rng(seed).integers(3, 211, n)


def is_clear(student, thread, asked, settings):
    """Whether no two blocks are nearly as good as each other: which comes back would be up to rounding."""
    with torch.no_grad():
        rounds, _ = student.ask(student.read(thread, settings), asked, asked[:1])
    return all(float(scores.sort().values.diff().min()) > 1e-4 for scores in rounds)


def close(found, wanted, atol):
    print(f"max {(found - wanted).abs().max():.2e} mean {(found - wanted).abs().mean():.2e}")
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("length", "asks"), [(66, 10), (114, 10), (178, 10), (114, 4)])
def test_scores_and_answers_equal_the_engines(student, length, asks, rounds):
    """A question of fewer tokens than choose: the end of the thread chooses with it."""
    settings = replace(SETTINGS, rounds=rounds)
    # Where a question makes another window of the oldest tokens, the engine cuts the thread anew, a student does not.
    assert settings.moved(length + asks) == settings.moved(length) > 0
    seeds = ((ids_of(length, 2 * seed), ids_of(asks, 2 * seed + 1)) for seed in range(20))
    thread, asked = next(drawn for drawn in seeds if is_clear(student, *drawn, settings))
    told = ids_of(5, 99)
    pooling, logits = Heard(pooling=student.net.pooling), []
    engine = BiLayerEngine(
        HFEngine(student.model, max_tokens=600), replace(settings, pooling=pooling), landmarks=student.net
    )

    def teach(ids, found):
        """Keep the logits, and let the answer go on with what it is told."""
        logits.append(found.clone())
        return torch.full_like(found, -torch.inf).index_fill(0, torch.tensor(told[len(ids)]), 0)

    with torch.no_grad():
        key = build_key(np.concatenate([thread, asked]), ())
        list(engine.generate(key, SamplingParams(max_tokens=len(told)), logits_processor=teach))
        scores, found = student.ask(student.read(thread, settings), asked, told)
    assert len(scores) == len(pooling.heard) == rounds
    close(torch.stack(scores), torch.stack(pooling.heard), atol=1e-4)
    close(found, torch.stack(logits), atol=1e-4)


@torch.no_grad()
def test_what_is_brought_back_is_neither_a_first_token_nor_the_end_of_the_last_window(student):
    thread = student.read(ids_of(114, 0), SETTINGS)  # 5 windows, 20 landmarks
    assert len(thread.landmarks) == 20 and len(thread.tokens) == 80 and len(thread.local) == 34
    assert brought_back(thread, torch.arange(20.0)).tolist() == [64, 65, 66, *range(68, 77)]
    assert brought_back(thread, -torch.arange(20.0)).tolist() == list(range(2, 14))


@torch.no_grad()
def test_questions_do_not_see_each_other(student):
    thread, questions = student.read(ids_of(114, 0), SETTINGS), [ids_of(10, 1), ids_of(7, 2)]
    first = [student.ask(thread, asked, ids_of(3, 3)) for asked in questions]
    for (scores, logits), asked in zip(reversed(first), reversed(questions), strict=True):
        again = student.ask(thread, asked, ids_of(3, 3))
        assert torch.equal(again[1], logits) and all(map(torch.equal, again[0], scores))


@torch.no_grad()
@pytest.mark.parametrize("length", [66, 114])  # fewer tokens behind the windows than choose, and more
def test_all_questions_in_one_pass_look_as_each_by_itself(student, length):
    thread = student.read(ids_of(length, 0), replace(SETTINGS, queries=21, local=48))
    questions = [ids_of(n, n) for n in (10, 3, 21, 30)]
    found = student.look(thread, questions)
    for scores, asked in zip(found, questions, strict=True):
        close(scores, student.ask(thread, asked, ids_of(2, 1))[0][0], atol=1e-4)


@torch.no_grad()
def test_logits_are_kept_of_whole_windows_from_the_second_one_on(student):
    ids = ids_of(114, 0)
    whole = student.read(ids, SETTINGS, num_predicted=len(ids)).logits
    assert [len(part) for part in whole] == [16] * 4
    some = student.read(ids, SETTINGS, num_predicted=50).logits
    assert len(some) == 2 and all(map(torch.equal, some, whole))
    assert not student.read(ids, SETTINGS).logits and not student.read(ids, SETTINGS, num_predicted=31).logits


def test_a_model_whose_attention_cannot_be_watched_is_refused(student):
    student.model.set_attn_implementation("eager")
    try:
        thread = student.read(ids_of(70, 0), SETTINGS)
        with pytest.raises(UnsupportedModelError, match="0 of the model's 3 layers.*load the model with attn_impl"):
            student.ask(thread, ids_of(5, 1), ids_of(2, 2))
    finally:
        student.model.set_attn_implementation("sdpa")
