"""Decoded tokens to text, piece by piece: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns token ids into text deltas.

    Text is held back while its last character is incomplete (a byte-level token may end inside of one) and while it
    may be the beginning of a stop string. Decodes a short window per token, so the cost does not grow with the answer.

    Args:
        decode: ids to text.
        stop: strings that end the answer; none of them is ever emitted.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise ValueError("a stop string must not be empty")
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._window, self._read = 0, 0  # text of ids[:_read] is out; decoding starts at _window for context
        self._held = ""
        self.text = ""
        """Everything emitted so far."""
        self.stopped = False
        """Whether a stop string came; nothing is emitted after it."""

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        if after.endswith(_REPLACEMENT) and len(self._ids) - self._read < 4:  # UTF-8 characters have at most 4 bytes
            return ""
        self._window, self._read = self._read, len(self._ids)
        return self._emit(after[len(before) :])

    def finish(self) -> str:
        """Return what was held back."""
        rest = self._decode(self._ids[self._window :])[len(self._decode(self._ids[self._window : self._read])) :]
        self._read = len(self._ids)
        out = self._emit(rest)
        held, self._held = self._held, ""
        self.text += held
        return out + held

    def _emit(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
        else:
            keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text
