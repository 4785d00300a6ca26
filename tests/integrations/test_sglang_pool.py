"""Writes to SGLang's pool stand in line with its batches; a fake runner, since without a GPU streams do nothing."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from kv_retract.integrations.sglang.pool import KVPool
from kv_retract.kernels import HeadMap
from kv_retract.kernels.reference import map_rotated
from kv_retract.kernels.rope import Rotary

LAYERS, SLOTS, HEADS, DIM = 3, 20, 2, 8


class FakeStreams:
    """Notes what waits for what, and on which stream work is queued."""

    def __init__(self):
        self.told = []
        self.now = "scheduling"

    def named(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.told.append(f"{name} waits for {other.name}"))

    def current_stream(self):
        return self.named(self.now)

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before


@pytest.fixture
def buffers():
    torch.manual_seed(0)
    k, v = ([torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)] for _ in range(2))
    return SimpleNamespace(k_buffer=k, v_buffer=v)


@pytest.fixture
def streams():
    return FakeStreams()


@pytest.fixture
def kv(buffers, streams, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    made = KVPool(buffers, SimpleNamespace(forward_stream=streams.named("forward")))
    streams.told.clear()  # of the launch that compiles
    return made


def test_work_is_queued_behind_the_batch_that_runs_and_before_the_next(kv, streams):
    with kv.in_line():
        streams.told.append(f"on {streams.now}")
    assert streams.told == ["forward waits for scheduling", "on forward", "scheduling waits for forward"]


def test_slots_are_copied_and_wiped_in_place(kv, buffers, streams):
    before = [layer.clone() for layer in (*buffers.k_buffer, *buffers.v_buffer)]
    kv.copy(torch.tensor([3, 5], dtype=torch.int32), torch.tensor([7, 1]))
    kv.wipe(torch.tensor([4]))
    for layer, was in zip((*buffers.k_buffer, *buffers.v_buffer), before, strict=True):
        was[[7, 1]] = was[[3, 5]]
        was[4] = 0
        assert torch.equal(layer, was)
    assert len(streams.told) == 4


def test_a_span_is_mapped_into_other_slots(kv, buffers):
    heads, size = LAYERS * HEADS, 2 * DIM
    weights = HeadMap(*(torch.randn(heads, *s) for s in ((size, 5), (1, 5), (5, size), (1, size))))
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.01, 0.001]))
    source, target, positions = torch.tensor([2, 9]), torch.tensor([11, 12]), torch.tensor([40, 41])
    k, v = (torch.stack([layer[source] for layer in x]) for x in (buffers.k_buffer, buffers.v_buffer))
    wanted = map_rotated(k, v, positions, weights, rotary)
    kv.map(source, target, positions, weights, rotary)
    for layers, states in zip((buffers.k_buffer, buffers.v_buffer), wanted, strict=True):
        assert torch.allclose(torch.stack([layer[target] for layer in layers]), states, atol=1e-6)
