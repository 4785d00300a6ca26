"""The configuration of the bundled chat model: its shape, its data, its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import KVRetractError
from .corpus import training_families
from .wiring import BACK

T = TypeVar("T")


class ConfigError(KVRetractError, ValueError):
    """A training configuration is no JSON object of known fields, or one of them has no possible value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceConfig:
    """Shape and training of a reference model; JSON-able."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    max_positions: int = 32_768
    rope_theta: float = 1e6
    seed: int = 0
    steps: int = 6000
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding not counted."""
    lengths: tuple[tuple[float, int], ...] = (
        (0.0, 160), (0.1, 256), (0.25, 384), (0.45, 512), (0.65, 1024), (0.85, 2048), (0.94, 4096),
    )  # fmt: skip
    """Curriculum: from this share of the steps on, threads are up to so many tokens long."""
    learning_rate: float = 5e-4
    """Higher ones undo the wired circuit before it is of use (evals/LOG.md)."""
    warmup: int = 100
    weight_decay: float = 0.02
    text_weight: float = 0.2
    """Weight of predicting the thread itself, beside 1 for the answers."""
    text_from: float = 0.25
    """Share of the steps over which that weight grows from a tenth: to predict the text, mentions need no notes."""
    text_share: float = 0.25
    """Share of the thread's tokens that are predicted in a step."""
    notes_share: float = 0.5
    """Share of the batches in which probes must answer from notes: the span itself is hidden from them."""
    notes_only_share: float = 0.3
    """Share of the rows of such batches in which probes see the mentions only, not the other facts."""
    notes_first: float = 0.05
    """Share of the steps at the start in which all rows are such: without them, no notes form (evals/LOG.md)."""
    removed_share: float = 0.25
    """Probability of each span to be cut out."""
    families: tuple[str, ...] = ()
    """What to train on. None: all families but the held-out one."""
    real_share: float = 0.1
    """Share of the rows that are pieces of real text, where there is some."""
    text_digest: str = ""
    """Of the real text (`texts.digest_of`); filled in when a run begins, and checked when it goes on."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in (int, float) and not (isinstance(value, kind | int) and value >= 0):
                raise ConfigError(f"expected {field.name} to be a number of at least 0, got {value!r}")
        if self.steps < 1 or self.batch_tokens < 1 or not self.lengths or min(begin for begin, _ in self.lengths) > 0:
            raise ConfigError("expected steps and batch_tokens of at least 1, and lengths that begin at 0")
        if self.num_layers < 2 or self.head_dim % 2 or not 8 <= self.head_dim <= self.hidden_size >= 16 * len(BACK):
            raise ConfigError(
                f"expected at least 2 layers, a hidden_size of at least {16 * len(BACK)}, and an even head_dim of 8 to "
                "hidden_size"
            )
        if (
            self.num_kv_heads < 2
            or self.num_heads % self.num_kv_heads
            or self.num_heads < self.num_kv_heads * len(BACK)
        ):
            raise ConfigError(
                f"expected at least 2 KV heads and a multiple of at least {len(BACK)} of them, got {self.num_kv_heads} "
                f"and {self.num_heads} heads"
            )
        if unknown := sorted({*self.families} - {*training_families()}):
            raise ConfigError(f"expected families of {', '.join(training_families())}, got {', '.join(unknown)}")

    def to_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def read_config(path: Path | None) -> ReferenceConfig:
    """Read a configuration from a JSON file; None: the defaults.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or impossible.
    """
    return read_json_config(ReferenceConfig, path)


def read_json_config(kind: Callable[..., T], path: Path | None, given: Mapping[str, Any] | None = None) -> T:
    """Read a configuration of a kind from a JSON file; what is given goes before it. None: the defaults.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or impossible.
    """
    given = given or {}
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        if "lengths" in data:
            data["lengths"] = tuple((float(begin), int(length)) for begin, length in data["lengths"])
        if "families" in data:
            data["families"] = tuple(data["families"])
        return kind(**{**data, **given})
    except (OSError, ValueError, TypeError) as error:
        place = f" in {str(path)!r}" if path is not None else ""
        raise ConfigError(
            f"expected a JSON object with fields of {getattr(kind, '__name__', kind)}{place}: {error}"
        ) from error
