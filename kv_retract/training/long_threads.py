"""A long thread with landmarks, with gradients: read window by window, searched, and answered.

What the engine does step by step on a cache (`engine.bilayer`), in memory and for one thread; the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.refill import choose
from ..engine.bilayer import BiLayer
from ..engine.refilling import Queries
from ..engine.windows import EncodedWindow, States, encode_window, joined, run_behind
from ..errors import UnsupportedModelError
from ..kernels.rope import Rotary
from ..landmarks import LandmarkNet
from .encoding import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class LongThread:
    """A thread that was read, with what questions to it need."""

    settings: BiLayer
    """How it is cut and laid out."""
    landmarks: States
    """L1 of its windows, keys without rotation."""
    context: States
    """What is read before local tokens, keys rotated: landmarks where they are attended to, then the first tokens and
    the last window's end."""
    tokens: States
    """L2 of all windows, keys without rotation."""
    local: IntArray
    """Tokens behind the windows. Shape: (num_tokens,)"""
    states: States
    """Of these, keys rotated."""
    logits: tuple[torch.Tensor, ...]
    """Of whole windows, from the second one on, as far as was asked for. Shape of each: (window, vocab_size)"""

    @property
    def candidates(self) -> IntArray:
        """Tokens that may be brought back: those of the windows that are not read anyway. Shape: (num_tokens,)."""
        return np.arange(self.settings.sinks, len(self.tokens) - self.settings.overlap)


class LongStudent:
    """Runs a frozen model with landmarks that learn.

    Args:
        model: frozen, with `attn_implementation='sdpa'`.
        rotary: of the model.
        net: the landmarks.
    """

    def __init__(self, model: Any, rotary: Rotary, net: LandmarkNet) -> None:
        self.model, self.net = model, net
        self._rotary = rotary

    def read(self, ids: IntArray, settings: BiLayer, *, num_predicted: int = 0) -> LongThread:
        """Read a thread: its windows with their landmarks, then what is behind them.

        Args:
            ids: at least so many that one window is kept apart. Shape: (num_tokens,)
            settings: how the thread is cut and laid out.
            num_predicted: keep the logits of the windows that end within so many first tokens.
        """
        size, num_windows = settings.window, settings.moved(len(ids))
        windows: list[EncodedWindow] = []
        context, logits = States(*torch.empty(2, 0, 0)), []
        sizes = torch.full((size // settings.ratio,), settings.ratio)
        for number in range(num_windows):
            part = torch.from_numpy(ids[number * size : (number + 1) * size]).to(self.model.device)
            kept = number > 0 and (number + 1) * size <= num_predicted
            windows.append(
                encode_window(
                    self.model, self._rotary, self.net, context, part, sizes, start_of(settings),
                    num_logits=size if kept else 1,
                )
            )  # fmt: skip
            logits += [windows[-1].logits] if kept else []
            context = self._context(windows, settings)
        local = ids[num_windows * size :]
        states, _, _ = self._run(context, local, start_of(settings))
        tokens = joined([window.tokens for window in windows])
        landmarks = joined([window.landmarks for window in windows])
        return LongThread(settings, landmarks, context, tokens, local, states, tuple(logits))

    def look(self, thread: LongThread, questions: Sequence[IntArray]) -> list[torch.Tensor]:
        """Return what each question gives the landmarks before anything is brought back, as `ask` does, in one pass.

        Args:
            thread: it stays as it is; questions do not see each other.
            questions: Shape of each: (num_asked,)

        Returns:
            Shape of each: (num_landmarks,), float32

        Raises:
            UnsupportedModelError: the model's attention cannot be watched.
        """
        most = thread.settings.queries
        known = max(0, len(thread.local) - most)
        tail, start = thread.local[known:], start_of(thread.settings) + known
        past = joined([thread.context, thread.states.part(slice(known))])
        ends = len(tail) + np.cumsum([len(asked) for asked in questions])
        begins = ends - [len(asked) for asked in questions]
        owner = np.concatenate([np.full(len(tail), -1), *(np.full(len(q), n) for n, q in enumerate(questions))])
        at = start + np.concatenate([np.arange(len(tail)), *(len(tail) + np.arange(len(q)) for q in questions)])
        own = np.tril((owner[None] == owner[:, None]) | (owner[None] < 0))
        _, _, queries = self._run_at(past, np.concatenate([tail, *questions]), at, own)
        self._check(queries, past)
        scores = []
        for begin, end in zip(begins, ends, strict=True):
            newest = np.r_[max(0, len(tail) - max(0, most - (end - begin))) : len(tail), begin:end]
            scores.append(self._scores(thread, queries.part(newest), past.k, int(at[newest[0]])))
        return scores

    def ask(self, thread: LongThread, asked: IntArray, told: IntArray) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Let a question choose what is brought back, `settings.rounds` times, and read its answer.

        The newest `settings.queries` tokens choose, or the whole question where it is longer.

        Args:
            thread: it stays as it is; questions do not see each other.
            asked: the question. Shape: (num_asked,)
            told: the answer. Shape: (num_told,)

        Returns:
            The scores of the landmarks in each round, shape of each: (num_landmarks,), float32; and the logits of the
            answer's tokens, shape: (num_told, vocab_size), float32.

        Raises:
            UnsupportedModelError: the model's attention cannot be watched.
        """
        settings = thread.settings
        known = max(0, len(thread.local) - max(0, settings.queries - len(asked)))
        newest, start = np.concatenate([thread.local[known:], asked]), start_of(settings) + known
        ahead = joined([thread.context, thread.states.part(slice(known))])
        past, scores = ahead, []
        for _ in range(settings.rounds):
            _, _, queries = self._run(past, newest, start)
            self._check(queries, past)
            scores.append(self._scores(thread, queries, past.k, start))
            back = thread.tokens.part(torch.from_numpy(brought_back(thread, scores[-1])))
            past = joined([ahead, back.placed(settings.layout.of_refilled(len(back)), self._rotary)])
        _, logits, _ = self._run(past, np.concatenate([newest, told[:-1]]), start, num_logits=len(told))
        return scores, logits

    def _context(self, windows: Sequence[EncodedWindow], settings: BiLayer) -> States:
        landmarks, first, last = joined([w.landmarks for w in windows]), windows[0].tokens, windows[-1].tokens
        read = landmarks.part(slice(None if self.net.attended else 0))
        sinks, overlap = settings.sinks, settings.overlap
        parts = (
            (read, settings.layout.of_landmarks(len(read))),
            (first.part(slice(sinks)), np.arange(sinks)),
            (last.part(slice(len(last) - overlap, None)), start_of(settings) - overlap + np.arange(overlap)),
        )
        return joined([states.placed(positions, self._rotary) for states, positions in parts])

    def _scores(self, thread: LongThread, queries: Queries, past: torch.Tensor, start: int) -> torch.Tensor:
        at = thread.settings.layout.of_landmarks(len(thread.landmarks))
        others = past[:, len(thread.landmarks) if self.net.attended else 0 :]
        looks = queries.looks(thread.landmarks.k, others, start, at, self._rotary)
        return self.net.pooling.all_scores(looks)[0]

    def _check(self, queries: Queries, past: States) -> None:
        if len(queries.layers) != len(past.k):
            raise UnsupportedModelError(
                f"queries were seen in {len(queries.layers)} of the model's {len(past.k)} layers: to train landmarks, "
                "load the model with attn_implementation='sdpa' and do not compile it"
            )

    def _run(
        self, past: States, ids: IntArray, start: int, *, num_logits: int = 1
    ) -> tuple[States, torch.Tensor, Queries]:
        """Run tokens behind a past; return their states, keys rotated, the last logits, and their queries."""
        own = np.tri(len(ids), dtype=np.bool_)
        return self._run_at(past, ids, start + np.arange(len(ids)), own, num_logits=num_logits)

    def _run_at(
        self, past: States, ids: IntArray, positions: IntArray, own: NDArray[np.bool_], *, num_logits: int = 1
    ) -> tuple[States, torch.Tensor, Queries]:
        """As `_run`; which of them each sees is `own`, shape: (num_tokens, num_tokens)."""
        seen = np.concatenate([np.ones((len(ids), len(past)), np.bool_), own], axis=1)
        part, at, mask = (torch.from_numpy(x).to(self.model.device) for x in (ids, positions, seen))
        with Queries(len(ids)) as queries:
            states, logits = run_behind(self.model, past, part, at, mask, num_logits=num_logits)
        return states, logits, queries


def start_of(settings: BiLayer) -> int:
    """Return the position of the first token of a window, and of what comes after the last one."""
    return settings.layout.local + settings.overlap


def brought_back(thread: LongThread, scores: torch.Tensor) -> IntArray:
    """Return which tokens of the windows scores bring back, ascending. Shape: (at most `settings.refill`,)."""
    candidates = thread.candidates
    sizes = np.bincount(candidates // thread.settings.ratio, minlength=len(scores))
    chosen: IntArray = candidates[choose(scores.detach()[None], sizes, thread.settings.refill)[0]]
    return chosen
