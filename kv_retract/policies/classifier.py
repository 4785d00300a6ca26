"""A trained text classifier as a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError
from ..types import Interval
from .detectors import Found, check_share, joined
from .passages import Passages

if TYPE_CHECKING:
    import torch

_KEPT = 4096
"""Texts whose finds are remembered: a thread is looked at again before each of its steps."""


@dataclass(kw_only=True)
class ClassifierDetector:
    """Find passages that a transformers text-classification model gives a label.

    The text is cut into windows of whole sentences that overlap by half; a window that scores at least `threshold` is
    a find, and finds that overlap are one. Nothing is downloaded. The model is loaded at the first text and runs on
    the CPU: count on tens of milliseconds a window. Answers are remembered per text, as many as a few thousand.

    Needs `pip install 'kv-retract[hf]'`.
    """

    path: str | Path
    """Folder of the model with its tokenizer, as `save_pretrained` writes them."""
    label: str
    """Name of the label to look for, as in the model's `id2label`: `INJECTION`."""
    threshold: float = 0.5
    """Smallest probability of the label."""
    window: int = 400
    """Characters in a window; a longer sentence is a window of its own, cut off where the model's input ends."""
    batch_size: int = 16
    """Windows that go through the model together."""
    _loaded: _Classifier | None = field(default=None, init=False, repr=False, compare=False)
    _known: dict[str, tuple[Found, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise PolicyError where there is no model, or a number is out of range."""
        check_share("threshold", self.threshold)
        for name in ("window", "batch_size"):
            if getattr(self, name) < 1:
                raise PolicyError(f"expected at least 1 for {name}, got {getattr(self, name)!r}")
        if not (Path(self.path) / "config.json").is_file():
            raise PolicyError(
                f"expected a folder with a model (config.json, weights, tokenizer), got {str(self.path)!r}; models are "
                "not downloaded: save one there with save_pretrained"
            )

    def __call__(self, text: str, /) -> list[Found]:
        """Return the passages with the label, in order.

        Raises:
            PolicyError: transformers is missing, the model cannot be loaded, or it has no such label.
        """
        if text not in self._known:
            if self._loaded is None:
                self._loaded = _load(Path(self.path), self.label)
            if len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[text] = tuple(self._find(self._loaded, text))
        return list(self._known[text])

    def _find(self, classifier: _Classifier, text: str) -> list[Found]:
        places = windows(Passages(text).sentences(), self.window)
        found = []
        for first in range(0, len(places), self.batch_size):
            batch = places[first : first + self.batch_size]
            for (start, end), score in zip(batch, classifier.scores([text[a:b] for a, b in batch]), strict=True):
                if score >= self.threshold:
                    found.append(Found(start, start + len(text[start:end].rstrip()), score, self.label))
        return joined(found)


def windows(sentences: Sequence[Interval], length: int) -> list[Interval]:
    """Return windows of whole sentences, of at most `length` characters, each beginning in the middle of the last.

    Args:
        sentences: in order, apart.
        length: characters from the first sentence's start to the last one's end.
    """
    found: list[Interval] = []
    first = 0
    while first < len(sentences):
        last = first
        while last + 1 < len(sentences) and sentences[last + 1][1] - sentences[first][0] <= length:
            last += 1
        found.append((sentences[first][0], sentences[last][1]))
        if last + 1 == len(sentences):
            break
        first = first + max(1, (last + 1 - first) // 2)
    return found


@dataclass(kw_only=True)
class _Classifier:
    model: Any
    tokenizer: Any
    index: int
    """Of the label among the model's outputs."""

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Return the probability of the label, for each text."""
        import torch

        inputs = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=self._longest
        )
        with torch.inference_mode():
            logits: torch.Tensor = self.model(**inputs).logits.float()
        several = self.model.config.problem_type == "multi_label_classification" or logits.shape[-1] == 1
        shares = logits.sigmoid() if several else logits.softmax(-1)
        return [float(share) for share in shares[:, self.index]]

    @property
    def _longest(self) -> int:
        positions = getattr(self.model.config, "max_position_embeddings", None) or 512
        return int(min(positions, self.tokenizer.model_max_length))


def _load(path: Path, label: str) -> _Classifier:
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise PolicyError(
            "a ClassifierDetector needs torch and transformers; install them: pip install 'kv-retract[hf]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise PolicyError(f"cannot load a text-classification model from {str(path)!r}: {error}") from error
    labels = dict(model.config.id2label)
    for index, name in labels.items():
        if name == label:
            return _Classifier(model=model, tokenizer=tokenizer, index=int(index))
    raise PolicyError(f"expected one of the model's labels {sorted(labels.values())!r}, got {label!r}")
