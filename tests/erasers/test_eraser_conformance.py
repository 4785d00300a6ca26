"""The public conformance suite over every built-in eraser."""

import pytest

from kv_retract.erasers import (
    ERASERS,
    ErratumEraser,
    MaskEraser,
    NoneEraser,
    RecomputeEraser,
    RepairEraser,
    SelectiveEraser,
    ShiftEraser,
)
from kv_retract.testing.erasers import EraserConformance

BUILT_IN = [
    ErratumEraser(), MaskEraser(), NoneEraser(), RecomputeEraser(), RepairEraser(tokens=6),
    SelectiveEraser(), ShiftEraser(),
]  # fmt: skip


class TestBuiltIn(EraserConformance):
    @pytest.fixture(params=BUILT_IN, ids=lambda e: e.name)
    def eraser(self, request):
        return request.param


def test_every_registered_eraser_is_held_to_the_suite():
    assert {e.name for e in BUILT_IN} == set(ERASERS.names())
    assert all(isinstance(ERASERS.create(e.name), type(e)) for e in BUILT_IN)


@pytest.mark.parametrize(
    ("eraser", "fields"),
    [(RepairEraser, {"tokens": -1}), (SelectiveEraser, {"ratio": 1.5}), (SelectiveEraser, {"layer": -1})],
)
def test_parameters_out_of_range(eraser, fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} must"):
        eraser(**fields)
