"""See what text reaches a model: the check behind "a retracted text is never prefilled again"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..engine.hf import HFEngine
from ..session import KVRetractSession


@contextmanager
def prefilled_texts(session: KVRetractSession) -> Iterator[list[str]]:
    """Record, decoded, every run of tokens that the session's embedded engine sends through its model.

    Yields a list that grows; the engine is restored afterwards. The forward passes are real.
    """
    engine = session.engine
    assert isinstance(engine, HFEngine), "only the embedded engine shows its forward passes"
    runner, texts = engine._runner, list[str]()
    forward = runner.forward

    def watched(working: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        texts.append(session.renderer.decode(ids.tolist()))
        return forward(working, ids, *args, **kwargs)

    runner.forward = watched  # type: ignore[method-assign]
    try:
        yield texts
    finally:
        runner.forward = forward  # type: ignore[method-assign]
