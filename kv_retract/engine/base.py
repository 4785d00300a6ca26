"""Contracts of engines: they speak token ids and hold the KV cache of many threads (DESIGN D10).

A session needs an `Engine`, which may run in another process. A `LocalEngine` runs in this one, and can also show what
it computes: logits, keys and values, slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, cast, runtime_checkable

import numpy as np

from ..cache.base import EditView, IntArray, ThreadKey
from ..cache.keys import is_tombstone
from ..errors import ColdTombstoneError, SpanError
from ..types import Divergence, EraseResult, Interval, SamplingParams

if TYPE_CHECKING:
    import torch

LogitsProcessor = Callable[[Sequence[int], "torch.Tensor"], "torch.Tensor"]
"""`(ids generated so far, logits of shape (vocab_size,)) -> logits`; may change the logits in place."""


class SupportsErase(Protocol):
    """What an engine needs of an eraser (the contract is `erasers.base.Eraser`)."""

    @property
    def eraser_id(self) -> str:
        """Name and hyper-parameters."""

    @property
    def exact(self) -> bool:
        """Whether the span leaves the key."""

    @property
    def suffix_free(self) -> bool:
        """Whether what the span becomes depends on nothing behind it."""

    def erase(self, view: EditView) -> None:
        """Edit the view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape of a model, as far as a cache must know it."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: str
    """"float32" or "bfloat16"."""
    device: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExtendResult:
    """Outcome of bringing a thread's KV up to date."""

    logits: torch.Tensor
    """Next-token logits. Shape: (num_last, vocab_size), float32; the last row follows the last entry of the key."""
    num_cached_tokens: int
    """Entries of the key that were served from the cache."""
    num_prefilled_tokens: int
    """Tokens that went through the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """One decoded token."""

    id: int
    logprob: float | None = None
    num_cached_tokens: int = 0
    """As in `ExtendResult`; the same on every token of one answer."""
    finish_reason: str | None = None
    """`stop` (an end token, not part of the answer) or `length`; on the last token only."""


class Engine(ABC):
    """Holds a model and the KV of many threads; safe to call from several Python threads.

    A key may contain tombstones only where they are cached: an engine raises ColdTombstoneError rather than feed one to
    the model. What it prefills or decodes it keeps, under eviction, for later calls.
    """

    constrains: ClassVar[bool] = True
    """Whether `generate` takes a logits processor."""

    spec: ModelSpec

    @abstractmethod
    def cached(self, key: ThreadKey) -> int:
        """Return how many leading entries of the key are cached. Changes nothing but the order of eviction."""

    @abstractmethod
    def generate(
        self, key: ThreadKey, sampling: SamplingParams, *, logits_processor: LogitsProcessor | None = None
    ) -> Iterator[GeneratedToken]:
        """Prefill what of the key is not cached, then decode, one token at a time.

        Closing the iterator stops decoding; what was decoded stays cached. `SamplingParams.stop` (strings) is the
        caller's to apply.

        Raises:
            ColdTombstoneError: a tombstone would have to be prefilled.
            PoolExhaustedError: the thread does not fit.
            ValueError: the key is empty or longer than the model's positions, or a sampling parameter is out of range.
            ConstraintError: the engine does not take logits processors, and got one.

        All of them come at the first `next`.
        """

    @abstractmethod
    def erase(
        self, key: ThreadKey, spans: Sequence[Interval], eraser: SupportsErase, new_key: ThreadKey
    ) -> EraseResult:
        """Edit the cached part of `key` and commit it under `new_key`; several spans are one atomic edit.

        Args:
            key: the thread before the edit, spans in place.
            spans: intervals of `key` to erase; those at or past the cached length are ignored.
            eraser: the strategy.
            new_key: the thread after it. As long as `key`, tombstones in place, or, where `eraser.exact`, without
                the spans.

        Other threads and running generations that share the old path keep it: shared slots are copied on write. Where
        `eraser.suffix_free` and another thread's edit of the same spans is cached under the beginning of `new_key`, its
        states are taken over and the eraser does not run.

        Raises:
            PoolExhaustedError: no room for the copies; the old path is intact.
        """

    @abstractmethod
    def drop(self, key: ThreadKey, start: int) -> int:
        """Forget the cached entries of `key` from `start` on that nothing else uses; return the slots freed, zeroed."""

    def purge(self, key: ThreadKey, start: int) -> int:
        """As `drop`, and forget also what other threads, forks and answers cached after reading entry `start` of `key`.

        For guarantees of deletion: no KV that has seen the entry stays, but that of sequences that are running. An
        engine that shares nothing needs no more than `drop`.
        """
        return self.drop(key, start)

    def prefill(self, key: ThreadKey) -> int:
        """Bring a whole key into the cache without an answer; return how many tokens went through the model.

        Raises as `generate`. An engine without a way of its own decodes one token, and throws it away.
        """
        tokens = self.generate(key, SamplingParams(max_tokens=1))
        with closing(cast(Generator[GeneratedToken, None, None], tokens)):
            return len(key) - next(tokens).num_cached_tokens

    def divergence(self, exact: ThreadKey, steered: ThreadKey, num_last: int) -> Divergence | None:
        """Compare the next-token distributions after the last `num_last` entries of two cached keys.

        Args:
            exact: the thread without its retracted spans.
            steered: the same thread with tombstones; the last `num_last` entries of both are the same tokens.
            num_last: at least 1.

        Returns:
            None where the engine does not show distributions, or one of the keys is not cached any more.
        """
        return None


class LocalEngine(Engine):
    """An engine in this process: what the conformance kit, evaluations and experiments look into."""

    @abstractmethod
    def extend(self, key: ThreadKey, *, num_last: int = 1) -> ExtendResult:
        """Prefill what of the key is not cached and return logits of the last `num_last` entries.

        At least `num_last` entries are run through the model, cached or not; they must be ordinary tokens.

        Raises:
            ColdTombstoneError: a tombstone would have to be prefilled.
            PoolExhaustedError: the thread does not fit.
            ValueError: the key is empty or longer than the model's positions.
        """

    def prefill(self, key: ThreadKey) -> int:
        """See the base class."""
        return self.extend(key).num_prefilled_tokens if self.cached(key) < len(key) else 0

    def divergence(self, exact: ThreadKey, steered: ThreadKey, num_last: int) -> Divergence | None:
        """See the base class; on logits in float32."""
        return divergence_of(self.extend, exact, steered, num_last)

    @abstractmethod
    def read_kv(self, key: ThreadKey, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of the cached K (rotated) and V of the visible entries in `[start, end)`.

        Returns:
            Shape of each: (num_layers, num_visible, num_kv_heads, head_dim).

        Raises:
            SpanError: the interval is not cached.
        """

    @abstractmethod
    def write_kv(self, key: ThreadKey, start: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite the cached K and V of `[start, end)`; shapes as `read_kv`; all entries must be visible.

        For tests and experiments: the key does not change, so whoever matches it sees the new states.
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise CacheIntegrityError where the cache breaks a conservation law."""

    @abstractmethod
    def tokens_in_use(self) -> int:
        """Return the number of slots in use, cached or running."""


@runtime_checkable
class SupportsAttribution(Protocol):
    """What an engine can do besides that shows what its model attends to."""

    def attention(self, key: ThreadKey, span: Interval, entries: IntArray) -> torch.Tensor | None:
        """Return what share of attention each of some entries pays to a span before them.

        The entries run through the model once more, on what is cached; nothing in the cache changes.

        Args:
            key: the thread.
            span: entries of the key. Hidden tombstones in it get no attention.
            entries: behind the span, ascending, ordinary tokens. Shape: (n,)

        Returns:
            The share (0 to 1) that the head which pays most gives it, of all heads of all layers. Shape: (n,), float32,
            on the CPU. None where not everything up to the last of the entries is cached.

        Raises:
            SpanError: the span or the entries are not as they should be.
            UnsupportedError: the model does not show its attention.
        """


def divergence_of(
    extend: Callable[..., ExtendResult], exact: ThreadKey, steered: ThreadKey, num_last: int
) -> Divergence | None:
    """Do as `Engine.divergence` says, with what an engine's `extend` returns."""
    try:
        wanted, got = (extend(k, num_last=num_last).logits.log_softmax(-1) for k in (exact, steered))
    except ColdTombstoneError:
        return None
    kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
    top1 = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    return Divergence(kl=float(kl.clamp(min=0)), top1=float(top1), positions=num_last)


def check_warm(ids: IntArray, first: int) -> None:
    """Raise ColdTombstoneError where entries that are not cached, from entry `first` of a key on, hold a tombstone."""
    cold = np.flatnonzero(is_tombstone(ids))
    if len(cold):
        raise ColdTombstoneError(
            f"entry {first + cold[0]} of the key is a tombstone that is not cached: its span must be left out of "
            "the key before the thread can be prefilled"
        )


def check_edit(key: ThreadKey, spans: Sequence[Interval], eraser: SupportsErase, new_key: ThreadKey) -> None:
    """Check what `Engine.erase` was given.

    Raises:
        SpanError: there is no span; spans overlap, are out of order or outside of the key, or hold tombstones.
        ValueError: the new key has another length or namespace than it must have.
    """
    at = 0
    for start, end in spans:
        if not at <= start < end <= len(key):
            raise SpanError(f"span [{start}, {end}) must follow entry {at} inside of a key of {len(key)} entries")
        if np.any(is_tombstone(key.ids[start:end])):
            raise SpanError(f"span [{start}, {end}) is retracted already, wholly or in part")
        at = end
    if not spans:
        raise SpanError("no span to erase")
    if not eraser.exact and len(new_key) != len(key):
        raise ValueError(
            f"{eraser.eraser_id} keeps lengths, but the new key has {len(new_key)} entries instead of {len(key)}"
        )
    if key.extra_key != new_key.extra_key:
        raise ValueError(f"an edit cannot move a thread from namespace {key.extra_key!r} to {new_key.extra_key!r}")


def end_of_edit(cached: int, spans: Sequence[Interval], page_size: int = 1) -> int:
    """Return where the path ends that can be edited: at a border of pages, and inside of no span.

    A span that eviction has cut in half goes as a whole: what is left of the path ends before it.
    """
    while cut := [start for start, end in spans if start < cached < end]:
        cached = min(cut) // page_size * page_size
    return cached
