"""Each kernel in Triton does what its twin in torch does, to any shape, and writes nothing else."""

import numpy as np
import pytest
import torch

from kv_retract.kernels import HeadMap, PagedKV
from kv_retract.kernels.rope import Rotary

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
POISON = float("nan")
CASES = range(12)


class Case:
    """A random cache with poison in every slot that is free, random slots in use, and states for them."""

    def __init__(self, seed, device):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.device = device
        self.dtype = (torch.float32, torch.bfloat16)[seed % 2]
        self.page_size = int(rng.choice([1, 2, 3, 16, 64]))
        self.dim = int(rng.choice([32, 64, 80, 96, 128, 256]))
        self.heads = int(rng.choice([1, 2, 3, 8]))
        self.layers = int(rng.integers(1, 4))
        self.pages = int(rng.integers(6, 12)) if self.page_size > 3 else int(rng.integers(60, 120))
        rotary_dim = self.dim if seed % 3 else self.dim // 2
        self.rotary = Rotary(
            10_000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim), interleaved=seed % 4 == 0
        )
        slots = rng.permutation(self.pages * self.page_size)
        self.count = int(rng.integers(1, min(50, len(slots) // 2)))
        self.used = torch.from_numpy(slots[: self.count]).to(device)
        self.other = torch.from_numpy(slots[self.count : 2 * self.count]).to(device)
        self.old, self.new = (torch.from_numpy(rng.integers(0, 30_000, self.count)).to(device) for _ in range(2))
        shape = (self.layers, self.pages * self.page_size, self.heads, self.dim)
        self.k, self.v = (torch.full(shape, POISON, dtype=self.dtype, device=device) for _ in range(2))
        for states in (self.k, self.v):
            states[:, self.used] = self.states().to(self.dtype)

    def states(self, count=None):
        return torch.randn(self.layers, count or self.count, self.heads, self.dim, device=self.device)

    def cache(self):
        """A copy, as one tensor for all layers or one for each."""
        k, v = self.k.clone(), self.v.clone()
        if self.page_size == 1:
            return PagedKV(tuple(x.clone() for x in k), tuple(x.clone() for x in v))
        return PagedKV.of(k, v, self.page_size)

    def weights(self, hidden):
        heads = self.layers * self.heads
        shapes = ((2 * self.dim, hidden), (1, hidden), (hidden, 2 * self.dim), (1, 2 * self.dim))
        return HeadMap(*(torch.randn(heads, *shape, device=self.device) * shape[0] ** -0.5 for shape in shapes))


@pytest.fixture(params=CASES)
def case(request, device):
    return Case(request.param, device)


def assert_same(found, wanted, dtype):
    found, wanted = (torch.stack([*x.k, *x.v]) if isinstance(x, PagedKV) else x for x in (found, wanted))
    assert torch.equal(found.isnan(), wanted.isnan()), "poison in one, a value in the other"
    found, wanted = found.nan_to_num().float(), wanted.nan_to_num().float()
    assert (found - wanted).abs().max() <= BOUND[dtype] * wanted.abs().max()


def assert_untouched(kv, case, written, *, values=True):
    """Every slot that was not to be written holds, bit for bit, what it held."""
    rest = torch.ones(case.k.shape[1], dtype=torch.bool, device=case.device)
    rest[written] = False
    for layers, before in ((kv.k, case.k), (kv.v, case.v)):
        kept = rest if layers is kv.k or values else torch.ones_like(rest)
        for layer, was in zip(layers, before, strict=True):
            assert torch.equal(layer[kept].nan_to_num(7.25), was[kept].nan_to_num(7.25))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_steer_scatter_rotates_casts_and_writes(case, twins, given):
    k, v = (case.states().to(given) for _ in range(2))
    caches = [case.cache(), case.cache()]
    for kernels, kv in zip(twins, caches, strict=True):
        kernels.steer_scatter(kv, case.other, k, v, positions=case.new, rotary=case.rotary)
    assert_same(*caches, case.dtype)
    assert_untouched(caches[0], case, case.other)
    assert not torch.stack(caches[0].k)[:, case.other].isnan().any()


def test_steer_scatter_writes_what_is_rotated_already(case, twins):
    capacity = case.count + 5  # layers of a larger buffer: not contiguous as a whole
    k, v = (case.states(capacity).to(case.dtype)[:, : case.count] for _ in range(2))
    caches = [case.cache(), case.cache()]
    for kernels, kv in zip(twins, caches, strict=True):
        kernels.steer_scatter(kv, case.other, k, v)
    assert_same(*caches, case.dtype)
    assert torch.equal(caches[0].v[0][case.other], v[0])
    assert_untouched(caches[0], case, case.other)


def test_gather_rotate_moves_keys_in_place(case, twins):
    caches = [case.cache(), case.cache()]
    for kernels, kv in zip(twins, caches, strict=True):
        kernels.gather_rotate(kv, case.used, case.old, case.new, case.rotary)
    assert_same(*caches, case.dtype)
    assert_untouched(caches[0], case, case.used, values=False)


def test_gather_rotate_there_and_back_is_the_same_key(case, twins):
    triton, kv = twins[0], case.cache()
    triton.gather_rotate(kv, case.used, case.old, case.new, case.rotary)
    triton.gather_rotate(kv, case.used, case.new, case.old, case.rotary)
    assert_same(torch.stack(kv.k), case.k, case.dtype)


@pytest.mark.parametrize(("hidden", "in_place"), [(8, True), (128, False)])
def test_kv_map_maps_every_head(case, twins, hidden, in_place):
    weights, target = case.weights(hidden), case.used if in_place else case.other
    caches = [case.cache(), case.cache()]
    for kernels, kv in zip(twins, caches, strict=True):
        kernels.kv_map(kv, case.used, target, case.old, weights, case.rotary)
    assert_same(*caches, case.dtype)
    assert_untouched(caches[0], case, target)
    assert not torch.equal(caches[0].k[0][target], case.k[0][case.used])


def test_copy_pages_copies_whole_pages(case, twins):
    source, target = torch.randperm(case.pages, device=case.device)[:6].chunk(2)
    caches = [case.cache(), case.cache()]
    for kernels, kv in zip(twins, caches, strict=True):
        kernels.copy_pages(kv, source, target)
    assert_same(*caches, case.dtype)
    assert_untouched(caches[0], case, caches[0].slots_of(target))


def test_gather_pages_leaves_zeros_where_there_is_nothing(case, twins):
    slots = torch.cat([case.used, torch.full((3,), -1, device=case.device)])[torch.randperm(case.count + 3)]
    room = [torch.full((case.layers, case.count + 9, case.heads, case.dim), POISON, dtype=case.dtype) for _ in range(2)]
    out = tuple(x.to(case.device)[:, : len(slots)] for x in room)
    found = twins[0].gather_pages(case.cache(), slots, out=out)
    wanted = twins[1].gather_pages(case.cache(), slots)
    for part, states in zip(found, wanted, strict=True):
        assert torch.equal(part, states)
        assert not part[:, slots < 0].any()
    assert found[0] is out[0]


def test_gather_batch_pads_short_spans(case, twins):
    spans = [case.used[: case.count // 2], case.used, case.used[:1]]
    found, wanted = (kernels.gather_batch(case.cache(), spans) for kernels in twins)
    for part, states in zip(found, wanted, strict=True):
        assert part.shape == (case.layers, 3, case.count, case.heads, case.dim)
        assert torch.equal(part, states)
        assert not part[:, 2, 1:].any()


def test_wipe_zeroes_slots(case, twins):
    kv = case.cache()
    twins[0].wipe(kv, case.used)
    assert not torch.stack([*kv.k, *kv.v])[:, case.used].any()
    assert_untouched(kv, case, case.used)


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_to_do_is_no_error(device, twins, which):
    case, none = Case(1, device), torch.empty(0, dtype=torch.int64, device=device)
    kernels, kv = twins[which], case.cache()
    states = case.states()[:, :0]
    kernels.steer_scatter(kv, none, states, states, positions=none, rotary=case.rotary)
    kernels.steer_scatter(kv, none, states, states)
    kernels.gather_rotate(kv, none, none, none, case.rotary)
    kernels.kv_map(kv, none, none, none, case.weights(8), case.rotary)
    kernels.copy_pages(kv, none, none)
    kernels.wipe(kv, none)
    assert kernels.gather_pages(kv, none)[0].shape == (case.layers, 0, case.heads, case.dim)
    assert_untouched(kv, case, none)
