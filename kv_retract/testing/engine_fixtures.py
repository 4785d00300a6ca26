"""What the suites of engines share: fixtures, switches, and how a test cleans up behind itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ..cache.base import IntArray, ThreadKey
from ..cache.keys import build_key
from ..engine.base import LocalEngine
from ..types import SamplingParams
from .models import tiny_model

Settle = Callable[..., None]
"""`settle(*keys)` drops the keys and checks that nothing is left of them."""


class EngineFixtures:
    """Fixtures and switches; `EngineConformance` says what they mean."""

    caches: ClassVar[bool] = True
    """Whether the engine keeps KV between calls. What only a cache can do is skipped where it does not, and
    everything else must hold with `cached` answering 0."""
    atol: ClassVar[float] = 1e-4
    """How far logits, keys and values may lie from those of plain transformers, in float32."""

    @pytest.fixture
    def make_engine(self) -> Callable[[Any], LocalEngine]:
        """Return what makes an engine for `model`, with room for 1024 tokens."""
        raise NotImplementedError("give the suite a fixture `make_engine`")

    @pytest.fixture
    def model(self) -> Any:
        """Return the transformers model that the engine runs, in float32; the suite compares with it."""
        return tiny_model()

    @pytest.fixture
    def page_size(self) -> int:
        """Return how many entries are cached at a time, 1, 2, 4, 8 or 16: a tail shorter than that is not cached."""
        return 1

    @pytest.fixture
    def engine(self, make_engine: Callable[[Any], LocalEngine], model: Any) -> Iterator[LocalEngine]:
        """Return the engine under test; its integrity is checked after the test."""
        engine = make_engine(model)
        yield engine
        engine.check_integrity()

    @pytest.fixture
    def settle(self, engine: LocalEngine) -> Settle:
        """Return what drops all that a test has stored, and checks that nothing is left in use."""
        at_start = engine.tokens_in_use()

        def settle(*keys: ThreadKey) -> None:
            engine.check_integrity()
            for key in keys:
                engine.drop(key, 0)
            engine.check_integrity()
            assert [engine.cached(key) for key in keys] == [0] * len(keys)
            assert engine.tokens_in_use() == at_start, "slots are lost: something still holds them"

        return settle

    @pytest.fixture
    def ids(self, model: Any) -> Callable[..., IntArray]:
        """Return what makes random token ids: `ids(num_tokens, seed)`, the same for the same arguments."""

        def ids(num_tokens: int, seed: int = 0) -> IntArray:
            return np.random.default_rng(seed).integers(3, model.config.vocab_size, num_tokens)

        return ids

    def needs_cache(self) -> None:
        """Skip a test that has nothing to say about an engine without a cache."""
        if not self.caches:
            pytest.skip("the engine keeps no cache")

    def kept(self, num_entries: int, page_size: int) -> int:
        """Return how many entries of a thread must be cached once it was prefilled."""
        return num_entries // page_size * page_size if self.caches else 0

    def assert_close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Compare with plain transformers."""
        torch.testing.assert_close(actual.cpu(), expected.cpu(), atol=self.atol, rtol=0)


def key_of(*parts: IntArray, extra_key: str = "") -> ThreadKey:
    """Return the key of a thread without edits."""
    return build_key(np.concatenate(parts), (), extra_key=extra_key)


def answer(engine: LocalEngine, key: ThreadKey, max_tokens: int, **sampling: Any) -> list[int]:
    """Return the ids of one whole answer."""
    return [token.id for token in engine.generate(key, SamplingParams(max_tokens=max_tokens, **sampling))]
