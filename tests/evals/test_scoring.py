import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kv_retract.evals.scoring import divergence


def test_against_scipy():
    generator = torch.Generator().manual_seed(0)
    reference, edited = torch.randn(2, 5, 40, generator=generator)
    p, q = softmax(reference.double().numpy(), axis=-1), softmax(edited.double().numpy(), axis=-1)
    kl, top1 = divergence(reference, edited)
    assert kl == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-9)
    assert top1 == np.mean(p.argmax(-1) == q.argmax(-1))


def test_it_is_not_symmetric_and_the_first_is_the_reference():
    reference, edited = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    assert divergence(reference, edited)[0] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert divergence(edited, reference)[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_the_same_logits_and_shifted_logits_do_not_diverge():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    assert divergence(logits, logits) == (0.0, 1.0)
    kl, top1 = divergence(logits, logits + 7)
    assert kl == pytest.approx(0, abs=1e-9) and top1 == 1.0


def test_agreement_is_a_mean_over_tokens():
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    edited = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    assert divergence(reference, edited)[1] == 0.75


def test_impossible_tokens():
    never, even = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert divergence(never, never)[0] == 0
    assert divergence(never, even)[0] == pytest.approx(math.log(3 / 2))
    assert divergence(even, never)[0] == math.inf


@pytest.mark.parametrize(
    ("reference", "edited"),
    [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((0, 3), (0, 3)), ((3,), (3,)), ((1, 2, 3), (1, 2, 3))],
)
def test_shapes_that_do_not_fit(reference, edited):
    with pytest.raises(ValueError, match=r"expected logits of one shape .*got"):
        divergence(torch.zeros(reference), torch.zeros(edited))
