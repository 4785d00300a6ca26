"""How much of a model's attention lies on a span, measured while tokens run once more on the cached prefix.

Attention to values that are 1 on the span's rows and 0 elsewhere *is* the share of attention on the span. So every
attention of a forward pass is asked a second time, with such values: kernel, mask, scale and grouping of heads are
those of the model, and no matrix of weights is ever kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..cache.base import NO_SLOT, IntArray, ThreadKey
from ..cache.keys import is_tombstone
from ..errors import SpanError, UnsupportedError
from ..types import Interval
from .working import ModelRunner, WorkingSet


class StrongestShares(TorchFunctionMode):
    """While it is entered, asks each attention of this Python thread for its share on the rows `[start, end)`.

    A mode belongs to the thread that entered it: neither the model nor transformers is changed, not even for a moment.

    Attributes:
        layers: the share in the head that pays most, of each layer. Shape of each: (num_tokens,)
    """

    def __init__(self, rows: Interval, num_tokens: int) -> None:
        super().__init__()
        self._rows, self._num_tokens = slice(*rows), num_tokens
        self.layers: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, and attention once more."""
        if func is functional.scaled_dot_product_attention:
            query, keys, values, *rest = args
            marked = torch.zeros_like(values)  # as wide as the values: fused kernels want heads of one width
            marked[..., self._rows, :] = 1
            shares = func(query, keys, marked, *rest, **(kwargs or {}))[..., 0]
            # (1, heads, tokens); transformers packs a single token as (1, KV heads, heads per KV head)
            self.layers.append(shares.reshape(-1, self._num_tokens).amax(0))
        return func(*args, **(kwargs or {}))


def strongest_shares(
    runner: ModelRunner,
    working: WorkingSet,
    key: ThreadKey,
    slots: IntArray,
    span: Interval,
    entries: IntArray,
    *,
    chunk_size: int,
) -> torch.Tensor:
    """Run entries of a thread through the model again, and return what share of attention each pays to a span.

    The head that pays most counts, of all heads of all layers: copying is the work of a few heads, and the mean over
    all of them mostly tells how near the span is.

    Args:
        runner: runs the model.
        working: the visible entries of `slots`; the rows of `entries` are written again, and its length changes.
        key: the thread.
        slots: of its entries up to the last of `entries` at least, NO_SLOT where hidden. Shape: (num_entries,)
        span: entries of the key; the hidden ones get no attention.
        entries: as in `SupportsAttribution.attention`.
        chunk_size: most tokens in one forward pass.

    Returns:
        Shape: (len(entries),), float32, on the CPU.

    Raises:
        UnsupportedError: the model does not compute its attention with `scaled_dot_product_attention`.
    """
    rows = np.concatenate([[0], np.cumsum(slots != NO_SLOT)])  # row of each entry, or of the next visible one
    shares: list[torch.Tensor] = []
    for at in range(0, len(entries), chunk_size):
        part = entries[at : at + chunk_size]
        working.length = int(rows[part[-1]]) + 1  # nothing behind is seen, so attention need not pass over it
        with StrongestShares((int(rows[span[0]]), int(rows[span[1]])), len(part)) as seen:
            runner.forward(working, key.ids[part], key.positions[part], rows[part])
        if len(seen.layers) != runner.num_layers:
            raise UnsupportedError(
                f"attention was seen in {len(seen.layers)} of the model's {runner.num_layers} layers: to attribute it, "
                "load the model with attn_implementation='sdpa' and do not compile it"
            )
        shares.append(torch.stack(seen.layers).amax(0))
    return torch.cat(shares).float().cpu()


def check_attribution(key: ThreadKey, span: Interval, entries: IntArray) -> None:
    """Check what `SupportsAttribution.attention` was given.

    Raises:
        SpanError: the span is empty, or not before the entries; the entries do not ascend inside of the key, or hold
            tombstones.
    """
    start, end = span
    if (
        not len(entries)
        or not 0 <= start < end <= entries[0]
        or entries[-1] >= len(key)
        or np.any(np.diff(entries) <= 0)
    ):
        got = f"{len(entries)} from {entries[0]} to {entries[-1]}" if len(entries) else "none"
        raise SpanError(
            f"expected ascending entries of a key of {len(key)} behind the span [{start}, {end}), got {got}"
        )
    cold = entries[is_tombstone(key.ids[entries])]
    if len(cold):
        raise SpanError(f"entry {cold[0]} is a tombstone, which cannot run through the model again; leave it out")
