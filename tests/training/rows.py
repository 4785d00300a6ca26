"""Rows of random tokens for tests of batches and of the loss."""

import random

import numpy as np

from kv_retract.training.batches import collate
from kv_retract.training.encoding import Row


def row(n, *, hidden=(), probes=2, seed=0):
    """A thread of `n` random tokens, and probes of four tokens of which three are the answer."""
    ids = np.random.default_rng(seed).integers(3, 2000, n + 4 * probes)
    owner = np.concatenate([np.full(n, -1), np.repeat(np.arange(probes), 4)])
    answer = np.concatenate([np.zeros(n, bool), np.tile([False, True, True, True], probes)])
    return Row(ids, answer, owner, hidden)


def together(rows, text_share, text_weight=0.2):
    """Rows as one batch, the same for the same arguments."""
    return collate(rows, random.Random(0), text_share=text_share, text_weight=text_weight)
