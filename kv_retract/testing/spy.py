"""See what text reaches a model: the check behind "a retracted text is never prefilled again"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..session import KVRetractSession


@contextmanager
def prefilled_texts(session: KVRetractSession) -> Iterator[list[str]]:
    """Record, decoded, every run of tokens that the session's engine sends through its model.

    Yields a list that grows; the model is as before afterwards. The forward passes are real.
    """
    model = getattr(session.engine, "model", None)
    assert model is not None, "only an engine in this process shows what its model runs"
    texts = list[str]()

    def watched(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        texts.extend(session.renderer.decode(row) for row in kwargs["input_ids"].tolist())

    handle = model.register_forward_pre_hook(watched, with_kwargs=True)
    try:
        yield texts
    finally:
        handle.remove()
