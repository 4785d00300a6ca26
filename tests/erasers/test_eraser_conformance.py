"""The public conformance suite over every built-in eraser."""

import pytest
import torch

from kv_retract.engine.working import fingerprint_of
from kv_retract.erasers import (
    ERASERS,
    ErratumEraser,
    InPlaceEraser,
    KVEraserEraser,
    MaskEraser,
    NoneEraser,
    RecomputeEraser,
    RepairEraser,
    SelectiveEraser,
    ShiftEraser,
)
from kv_retract.erasers.kveraser import VARIANTS, KVEraserConfig
from kv_retract.erasers.kveraser.model import new_net
from kv_retract.testing.erasers import EraserConformance
from kv_retract.testing.models import tiny_model

BUILT_IN = [
    ErratumEraser(), InPlaceEraser(), MaskEraser(), NoneEraser(), RecomputeEraser(), RepairEraser(tokens=6),
    SelectiveEraser(), ShiftEraser(),
]  # fmt: skip


class TestBuiltIn(EraserConformance):
    @pytest.fixture(params=BUILT_IN, ids=lambda e: e.name)
    def eraser(self, request):
        return request.param


class TestLearned(EraserConformance):
    """With weights drawn at random: what holds for every eraser does not depend on what it has learned."""

    @pytest.fixture(params=VARIANTS)
    def eraser(self, request, tmp_path_factory):
        model = tiny_model()
        config = KVEraserConfig(variant=request.param, rank=4, fingerprint=fingerprint_of(model), base="tiny")
        net = new_net(model, config)
        generator = torch.Generator().manual_seed(0)
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp("eraser")
        net.save(folder)
        return KVEraserEraser(path=str(folder))


def test_every_registered_eraser_is_held_to_the_suite():
    assert {e.name for e in BUILT_IN} | {KVEraserEraser.name} == set(ERASERS.names())
    assert all(isinstance(ERASERS.create(e.name), type(e)) for e in BUILT_IN)


@pytest.mark.parametrize(
    ("eraser", "fields"),
    [(RepairEraser, {"tokens": -1}), (SelectiveEraser, {"ratio": 1.5}), (SelectiveEraser, {"layer": -1})],
)
def test_parameters_out_of_range(eraser, fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} must"):
        eraser(**fields)
