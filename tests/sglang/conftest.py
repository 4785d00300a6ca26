"""Fixtures on a real SGLang server; `make test-sglang` builds its environment."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import pytest

from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model

from .servers import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sglang")
    with serving(folder, "--ledger", str(folder / "spans.sqlite")) as running:
        yield running


@pytest.fixture(scope="session")
def loaded():
    return load_model("reference")


@pytest.fixture
def engine(loaded) -> HFEngine:
    """The embedded engine on the same model."""
    return HFEngine(loaded.model, max_tokens=16_384, name="reference")


@pytest.fixture
def thread(request):
    """Random tokens that no other test uses, and a namespace of the test's own."""
    rng = np.random.default_rng(int(sha256(request.node.nodeid.encode()).hexdigest()[:8], 16))
    return rng.integers(3, 2000, 400), request.node.name
