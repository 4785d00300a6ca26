"""Real text for training, beside the corpus: recorded agent threads in the bundled chat form, and plain text files."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from ..errors import KVRetractError, TraceError
from ..trace import Trace, read_traces
from .encoding import IntArray, thread_text


class TextError(KVRetractError, ValueError):
    """A text for training cannot be read, or is not the one that a run was begun with."""


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Read texts in the order of the paths: of every recorded thread one, of a file that holds none one as it is.

    Args:
        paths: trace files as `read_traces` takes them, folders of such files, or any files of text in UTF-8.

    Raises:
        TextError: a path cannot be read, or holds no text.
    """
    return [text for path in paths for text in _texts_of(path)]


def digest_of(texts: Sequence[str]) -> str:
    """Return a short digest of texts in their order; empty for none."""
    digest = sha256()
    for text in texts:
        digest.update(sha256(text.encode()).digest())
    return digest.hexdigest()[:16] if texts else ""


def check_texts(texts: Sequence[str], wanted: str) -> str:
    """Return the digest of texts.

    Raises:
        TextError: another one is wanted.
    """
    digest = digest_of(texts)
    if wanted and digest != wanted:
        raise TextError(
            f"the configuration was used with the text of digest {wanted}, got {digest or 'none'}: name the same files "
            "in the same order, or empty text_digest in the configuration"
        )
    return digest


def draw_text(texts: Sequence[IntArray], rng: random.Random) -> IntArray:
    """Draw one of some encoded texts, a longer one the more likely."""
    return rng.choices(texts, weights=[len(text) for text in texts])[0]


def piece_of(text: IntArray, length: int, rng: random.Random) -> IntArray:
    """Draw `length` tokens in a row of an encoded text; all of it where it is shorter."""
    start = rng.randrange(max(1, len(text) - length + 1))
    return text[start : start + length]


def _texts_of(path: Path) -> list[str]:
    try:
        traces = [trace for trace in read_traces(path) if isinstance(trace, Trace)]
    except TraceError as error:
        if path.is_dir():
            raise TextError(str(error)) from error
        traces = []
    if traces:
        return [thread_text(trace.messages, trace.tools)[0] for trace in traces]
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TextError(f"cannot read text of {str(path)!r}: {error}") from error
    if not content.strip():
        raise TextError(f"expected text in {str(path)!r}, got none")
    return [content]
