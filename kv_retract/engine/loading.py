"""From the name of a model to an embedded engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Engine
from .hf import HFEngine
from .models import load_model

if TYPE_CHECKING:
    from .bilayer import BiLayer


def load_engine(
    model: str,
    device: str,
    dtype: str,
    max_tokens: int,
    page_size: int,
    seed: int,
    long_thread: str | BiLayer | None,
) -> tuple[Engine, Any]:
    """Load a model into an engine; return it and the tokenizer. Arguments as of `KVRetractSession.from_pretrained`.

    Raises:
        UnknownNameError: neither a registered name nor a directory.
        UnsupportedModelError: the model cannot be edited correctly.
        DeviceError: torch cannot use the device.
        ValueError: there is no such way of keeping long threads, or no room for it in the model's positions.
    """
    if isinstance(long_thread, str) and long_thread != "bilayer":
        raise ValueError(f"expected long_thread 'bilayer', a BiLayer or None, got {long_thread!r}")
    loaded = load_model(model, device=device, dtype=dtype, seed=seed)
    engine = HFEngine(loaded.model, max_tokens=max_tokens, page_size=page_size, name=loaded.name)
    if long_thread is None:
        return engine, loaded.tokenizer
    from .bilayer import BiLayerEngine

    return BiLayerEngine(engine, None if isinstance(long_thread, str) else long_thread), loaded.tokenizer
