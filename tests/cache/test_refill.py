"""What is brought back from L2 and where it stands, against slow twins."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.cache.refill import Layout, Look, MatchPooling, PlainPooling, choose, landmark_attention
from kv_retract.kernels.rope import Rotary, rotate_keys

# -- choosing -------------------------------------------------------------------------------------------------------


def slow_choice(scores, sizes, budget):
    """Of one layer: the tokens of the blocks behind each other, the best block first, cut at the budget."""
    tokens = iter(range(sum(sizes)))
    blocks = [[next(tokens) for _ in range(size)] for size in sizes]
    best_first = sorted(range(len(sizes)), key=lambda block: (-scores[block], block))
    return sorted([token for block in best_first for token in blocks[block]][:budget])


@given(data=st.data(), sizes=st.lists(st.integers(0, 4), max_size=8), num_layers=st.integers(1, 3))
def test_a_choice_equals_its_slow_twin(data, sizes, num_layers):
    of_layer = st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes))  # few values: many ties
    scores = data.draw(st.lists(of_layer, min_size=num_layers, max_size=num_layers))
    budget = data.draw(st.integers(0, sum(sizes) + 3))
    found = choose(torch.tensor(scores, dtype=torch.float32), np.array(sizes, dtype=np.int64), budget)
    assert found.shape == (num_layers, min(budget, sum(sizes)))
    assert found.tolist() == [slow_choice(layer, sizes, budget) for layer in scores]


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (0, []),
        (1, [5]),
        (3, [5, 6, 7]),
        (4, [0, 5, 6, 7]),  # of the second best block its beginning
        (5, [0, 1, 5, 6, 7]),
        (6, [0, 1, 2, 5, 6, 7]),
        (99, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_best_block_comes_whole_and_the_last_one_is_cut(budget, tokens):
    scores = torch.tensor([[0.5, 0.1, 0.9]])
    assert choose(scores, np.array([2, 3, 3]), budget).tolist() == [tokens]


def test_each_layer_chooses_for_itself():
    scores = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert choose(scores, np.array([3, 2]), 2).tolist() == [[0, 1], [3, 4]]


# -- positions ------------------------------------------------------------------------------------------------------


@given(
    sinks=st.integers(0, 5), landmarks=st.integers(1, 9), refilled=st.integers(0, 9), count=st.integers(0, 40),
    data=st.data(),
)  # fmt: skip
def test_everything_stands_inside_of_its_region_and_in_order(sinks, landmarks, refilled, count, data):
    layout = Layout(sinks=sinks, landmarks=landmarks, refilled=refilled)
    positions = layout.of_landmarks(count)
    assert len(positions) == count and set(positions) <= set(range(sinks, sinks + landmarks))
    assert (np.diff(positions) >= 0).all()
    shared = np.bincount(positions - sinks, minlength=landmarks)
    assert shared.max() - shared.min() <= 1, "no position is shared by many while another is free"

    back = data.draw(st.integers(0, refilled))
    assert layout.local == sinks + landmarks + refilled
    assert layout.of_refilled(back).tolist() == list(range(layout.local - back, layout.local))


def test_few_landmarks_stand_next_to_what_is_refilled():
    layout = Layout(sinks=4, landmarks=6, refilled=3)
    assert layout.of_landmarks(2).tolist() == [8, 9]
    assert layout.of_landmarks(6).tolist() == [4, 5, 6, 7, 8, 9]
    assert layout.of_landmarks(9).tolist() == [4, 4, 5, 6, 6, 7, 8, 8, 9]
    assert layout.of_refilled(2).tolist() == [11, 12] and layout.local == 13


# -- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_others", [0, 5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_shares_are_those_of_plain_attention(num_heads, num_kv_heads, num_others):
    torch.manual_seed(0)
    q = torch.randn(num_heads, 3, 8)
    landmark_k, other_k = torch.randn(4, num_kv_heads, 8), torch.randn(num_others, num_kv_heads, 8)
    found = landmark_attention(q, landmark_k, other_k, scale=0.3)
    assert found.shape == (num_heads, 3, 4)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        for query in range(3):
            weights = [
                math.exp(0.3 * sum(float(a * b) for a, b in zip(q[head, query], key[kv_head], strict=True)))
                for key in [*landmark_k, *other_k]
            ]
            wanted = [weight / sum(weights) for weight in weights[:4]]
            assert found[head, query].tolist() == pytest.approx(wanted, abs=1e-5)


def test_shares_are_computed_in_float32():
    torch.manual_seed(0)
    parts = [torch.randn(shape).bfloat16() for shape in ((4, 3, 8), (4, 2, 8), (5, 2, 8))]
    found = landmark_attention(*parts, scale=0.3)
    assert found.dtype == torch.float32
    assert torch.equal(found, landmark_attention(*(part.float() for part in parts), scale=0.3))


# -- pooling --------------------------------------------------------------------------------------------------------

ROTARY = Rotary(10_000.0 ** -torch.arange(0, 1, 0.25))


def look_of(seed, *, moved=0):
    """Three tokens, two heads each of two KV heads, five landmarks; the same, but for where everything stands."""
    q, marks, others = (torch.randn(n, heads, 8, generator=torch.Generator().manual_seed(seed + n))
                        for n, heads in ((3, 4), (5, 2), (6, 2)))  # fmt: skip
    start, at = 40 + moved, np.array([2, 3, 3, 4, 9]) + 7 * moved
    q = rotate_keys(q, torch.zeros(3, dtype=torch.long), start + torch.arange(3), ROTARY).transpose(0, 1)
    return Look(q, marks, others, 0.35, start, at, ROTARY)


def test_what_is_taken_without_positions_does_not_depend_on_them():
    look, moved = look_of(0), look_of(0, moved=25)
    assert look.without_positions().shape == (4, 3, 8)
    torch.testing.assert_close(look.without_positions(), moved.without_positions(), atol=1e-5, rtol=0)
    torch.testing.assert_close(look.matches(), moved.matches(), atol=1e-5, rtol=0)
    assert not torch.allclose(look.q, moved.q, atol=0.1)
    assert not torch.allclose(look.shares(), moved.shares(), atol=0.01), "attention knows where everything stands"


def test_what_all_landmarks_have_in_common_does_not_match():
    look = look_of(0)
    shifted = replace(look, landmark_k=look.landmark_k + 3.0)
    torch.testing.assert_close(look.matches(), shifted.matches(), atol=1e-4, rtol=0)
    torch.testing.assert_close(look.matches().sum(-1), torch.zeros(4, 3), atol=1e-4, rtol=0)
    turned = look.matches(-torch.eye(8).expand(4, 8, 8))
    torch.testing.assert_close(turned, -look.matches())


def test_a_landmark_that_is_singled_out_scores_in_standard_deviations():
    look = look_of(1)
    found, pooling = look.matches(), MatchPooling()
    each = [(row - row.mean()) / row.std(correction=0) for head in found for row in head]
    torch.testing.assert_close(pooling.scores(1, look), torch.stack(each).amax(0), atol=1e-4, rtol=0)
    assert not pooling.scores(0, look).any(), "single tokens"
    alone = replace(look, landmark_k=look.landmark_k[:1], landmarks_at=look.landmarks_at[:1])
    assert pooling.scores(1, alone).tolist() == [0.0]


POOLED = {"max": max, "mean": lambda values: sum(values) / len(values)}


@pytest.mark.parametrize("queries", POOLED)
@pytest.mark.parametrize("heads", POOLED)
def test_queries_are_pooled_then_heads(heads, queries):
    look = look_of(0)
    shares = look.shares()
    found = PlainPooling(heads=heads, queries=queries).scores(0, look)
    of_heads = [[POOLED[queries](shares[head, :, mark].tolist()) for mark in range(5)] for head in range(4)]
    wanted = [POOLED[heads]([of_head[mark] for of_head in of_heads]) for mark in range(5)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_layers_choose_together_by_the_sum_of_their_scores():
    looks = [look_of(layer) for layer in range(3)]
    alone = PlainPooling().all_scores(looks)
    assert alone.shape == (3, 5) and not torch.equal(alone[0], alone[1])
    together = PlainPooling(together=True).all_scores(iter(looks))
    assert together.shape == (3, 5)
    for layer in together:
        torch.testing.assert_close(layer, alone[0] + alone[1] + alone[2])


@pytest.mark.parametrize("axis", ["heads", "queries"])
def test_unknown_names_are_refused(axis):
    with pytest.raises(ValueError, match=f"expected {axis} pooled by max or mean, got 'sum'"):
        PlainPooling(**{axis: "sum"})
