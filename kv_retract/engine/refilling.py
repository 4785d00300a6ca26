"""One answer on a long thread: what the newest tokens look at is brought back, and decoding goes on there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..cache.base import IntArray
from ..cache.refill import Look, Pooling
from ..errors import UnsupportedError
from ..kernels.rope import Rotary
from .window_store import Parts, WindowStore
from .windows import States
from .working import ModelRunner, WorkingSet


class Queries(TorchFunctionMode):
    """While it is entered, keeps the rotated queries of each attention of this Python thread.

    Attributes:
        layers: of each layer. Shape of each: (num_heads, num_tokens, head_dim)
        scale: of the scores.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self.layers: list[torch.Tensor] = []
        self.scale = 1.0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; look at its queries where it is attention."""
        if func is functional.scaled_dot_product_attention:
            query = args[0]  # transformers packs a single token as (1, KV heads, heads per KV head, head_dim)
            self.layers.append(query.reshape(-1, self._num_tokens, query.shape[-1]))
            self.scale = (kwargs or {}).get("scale") or query.shape[-1] ** -0.5
        return func(*args, **(kwargs or {}))

    def part(self, index: IntArray) -> Queries:
        """Return those of some of the tokens."""
        some = Queries(len(index))
        some.layers, some.scale = [q[:, torch.from_numpy(index).to(q.device)] for q in self.layers], self.scale
        return some

    def looks(
        self, landmark_k: torch.Tensor, other_k: torch.Tensor, start: int, landmarks_at: IntArray, rotary: Rotary
    ) -> Iterator[Look]:
        """Yield how the tokens look at landmarks in each layer.

        Args:
            landmark_k: keys of landmarks, without rotation. Shape: (num_layers, num_landmarks, num_kv_heads, head_dim)
            other_k: keys of what else all of the tokens see, rotated. Shape: (num_layers, num_others, ...)
            start: position of the first of the tokens.
            landmarks_at: positions of the landmarks. Shape: (num_landmarks,)
            rotary: of the model.
        """
        for q, marks, others in zip(self.layers, landmark_k, other_k, strict=True):
            yield Look(q, marks, others, self.scale, start, landmarks_at, rotary)


class Answering:
    """The working cache of one answer, and the tokens in its local part.

    Args:
        windows: where L2 is.
        runner: runs the model.
        parts: what the thread's windows offer; L2 must stay where it is while more may be brought back.
        ids: tokens of the local part. Shape: (num_tokens,)
        local: keys, rotated, and values of the first of them; the others are read by `begin`.
        num_queries: how many of the newest tokens choose.
        num_last: return logits of so many tokens.
        budget: most tokens to bring back.
        pooling: what makes scores of attention.
        rounds: how often the newest tokens choose.
        refresh: as in `BiLayer`.
        chunk_size: most tokens in one forward pass.
    """

    def __init__(
        self,
        windows: WindowStore,
        runner: ModelRunner,
        parts: Parts,
        ids: IntArray,
        local: States,
        *,
        num_queries: int,
        num_last: int,
        budget: int,
        pooling: Pooling,
        rounds: int,
        refresh: int,
        chunk_size: int,
    ) -> None:
        self._windows, self._runner, self._parts = windows, runner, parts
        self._ids, self._decoded = ids, 0
        self._num_queries, self._num_last, self._budget, self._pooling = num_queries, num_last, budget, pooling
        self._rounds, self._refresh, self._chunk = rounds, refresh, chunk_size
        self._before: int  # rows of the working cache ahead of the local part
        self._working = self._behind(parts.context, local, room=len(ids) - len(local))
        self._queries = Queries(0)

    @property
    def next_position(self) -> int:
        """Of the token that comes next."""
        return self._windows.start + len(self._ids)

    @property
    def rows(self) -> int:
        """Tokens and landmarks in the working cache, which lies on the device."""
        return self._working.length

    def begin(self) -> States:
        """Read the tokens whose states were not given, without anything brought back; return the states of all."""
        known = self._working.length - self._before
        newest = len(self._ids) - self._newest
        for start in range(known, newest, self._chunk):
            self._read(start, min(start + self._chunk, newest))
        self._read_newest()
        return States(self._working.k, self._working.v).part(slice(self._before, self._working.length))

    def refill(self) -> torch.Tensor:
        """Let the newest tokens choose, and read them again with what comes back in sight.

        Returns:
            Logits of the last tokens. Shape: (num_last, vocab_size), float32
        """
        logits = torch.empty(0)
        for _ in range(self._rounds):
            old, parts = self._working, self._parts
            end = self._before + len(self._ids) - self._newest
            back = self._windows.refilled(parts, self._scores(end), self._budget)
            local = States(old.k, old.v).part(slice(self._before, end))
            self._working = self._behind(parts.attended, parts.sinks, back, parts.overlap, local, room=self._newest)
            logits = self._read_newest()
        return logits

    def read(self, token: int) -> torch.Tensor:
        """Read a decoded token; return logits of the next. Shape: (vocab_size,), float32."""
        self._ids = np.append(self._ids, token)
        self._decoded += 1
        logits = self._read(len(self._ids) - 1, len(self._ids))
        if self._refresh and self._decoded % self._refresh == 0:
            logits = self.refill()
        return logits[-1]

    def _behind(self, *parts: States, room: int) -> WorkingSet:
        """Return a working cache of parts, the local one last, with room for more tokens."""
        self._before = sum(map(len, parts[:-1]))
        return WorkingSet.of([(p.k, p.v) for p in parts], capacity=self._before + len(parts[-1]) + room)

    @property
    def _newest(self) -> int:
        return min(len(self._ids), self._num_queries)

    def _scores(self, end: int) -> torch.Tensor:
        """Return what the newest tokens give each landmark. Shape: (num_layers, num_landmarks)."""
        windows, parts = self._windows, self._parts
        looks = self._queries.looks(
            parts.landmarks.k, self._working.k[:, len(parts.attended) : end], windows.start + end - self._before,
            windows.layout.of_landmarks(len(parts.landmarks)), windows.rotary,
        )  # fmt: skip
        return self._pooling.all_scores(looks)

    def _read_newest(self) -> torch.Tensor:
        newest = self._newest
        self._working.length = self._before + len(self._ids) - newest
        with Queries(newest) as self._queries:
            logits = self._read(len(self._ids) - newest, len(self._ids))
        if len(self._queries.layers) != self._runner.num_layers:
            raise UnsupportedError(
                f"queries were seen in {len(self._queries.layers)} of the model's {self._runner.num_layers} layers: "
                "for long threads, load the model with attn_implementation='sdpa' and do not compile it"
            )
        return logits

    def _read(self, start: int, end: int) -> torch.Tensor:
        """Run tokens of the local part behind the others; return logits of the last."""
        index = np.arange(start, end)
        logits = self._runner.forward(
            self._working, self._ids[index], self._windows.start + index, self._before + index,
            num_logits=min(self._num_last, len(index)),
        )  # fmt: skip
        assert logits is not None, "no stop layer was asked for"
        return logits
