"""The benchmark of the kernels: what it tells, and that it does not time a kernel that is wrong."""

import json

import pytest
import torch

from kv_retract.errors import DeviceError
from kv_retract.evals import kernels as module
from kv_retract.evals.kernels import KernelBench, KernelParityError, bench_kernels
from kv_retract.evals.results import dump
from kv_retract.kernels.reference import TorchKernels

SMALL = {"tokens": (48, 16), "layers": 2, "kv_heads": 2, "head_dim": 16, "hidden": 8, "repeats": 2}
MOVES = ["gather_pages", "copy_pages", "steer_scatter", "gather_rotate"]


class Fused(TorchKernels):
    """A fake of fused kernels, for one more arm."""


class Wrong(Fused):
    def gather_rotate(self, kv, slots, old, new, rotary):
        super().gather_rotate(kv, slots, old, new + 1, rotary)


@pytest.fixture
def second_arm(monkeypatch):
    def use(kernels):
        monkeypatch.setattr(module, "kernels_for", lambda device: kernels)
        monkeypatch.setattr(module, "TorchKernels", Plain)

    return use


class Plain(TorchKernels):
    """What the benchmark takes for torch's, so that `Fused` is another arm."""


@pytest.mark.parametrize("page_size", [1, 5])
def test_every_kernel_at_every_size(page_size):
    done = []
    document = bench_kernels(KernelBench(**SMALL, page_size=page_size), progress=lambda *step: done.append(step))
    assert done == [(i, 11) for i in range(1, 12)]
    expected = [(kernel, n) for n in (48, 16) for kernel in MOVES] + [("kv_map", n) for n in module.MAP_TOKENS]
    assert [(row["kernel"], row["tokens"]) for row in document["rows"]] == expected
    for row in document["rows"]:
        assert row["arm"] == "torch" and 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert (row["of_copy"] is None) == (row["kernel"] == "kv_map")
    assert json.loads(dump(document))["machine"]["device"] == "cpu"


def test_bytes_are_those_that_have_to_move():
    rows = {(row["kernel"], row["tokens"]): row for row in bench_kernels(KernelBench(**SMALL))["rows"]}
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, dimensions, bytes
    assert {rows[kernel, 48]["bytes"] for kernel in MOVES[:3]} == {2 * 48 * token}
    assert rows["gather_rotate", 48]["bytes"] == 48 * token
    weights = 4 * (2 * 32 * 8 + 8 + 32)
    assert rows["kv_map", 128]["bytes"] == 2 * 128 * token + 4 * weights


def test_arms_are_timed_beside_each_other(second_arm):
    second_arm(Fused())
    rows = bench_kernels(KernelBench(**SMALL, dtype="bfloat16"))["rows"]
    assert [row["arm"] for row in rows[:4]] == ["torch", "triton", "torch", "triton"]
    assert len(rows) == 22


def test_a_kernel_that_is_wrong_is_not_timed(second_arm):
    second_arm(Wrong())
    with pytest.raises(KernelParityError, match="gather_rotate of 16 tokens differs from its twin"):
        bench_kernels(KernelBench(**SMALL))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match="cuda"):
        bench_kernels(KernelBench(**SMALL, device="cuda"))
