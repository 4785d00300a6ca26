"""The configuration of the bundled chat model: its shape, its data, its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
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
    steps: int = 7500
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding not counted."""
    lengths: tuple[tuple[float, int], ...] = (
        (0.0, 160), (0.08, 256), (0.2, 384), (0.36, 512), (0.52, 1024), (0.68, 2048), (0.752, 4096),
        (0.8, 1024), (0.84, 2048), (0.92, 4096), (0.95, 1024), (0.97, 2048),
    )  # fmt: skip
    """Curriculum: from this share of the steps on, threads are up to so many tokens long."""
    learning_rate: float = 5e-4
    """Higher ones undo the wired circuit before it is of use (evals/LOG.md)."""
    restarts: tuple[tuple[float, float], ...] = ((0.8, 3e-4),)
    """From such a share of the steps on, warm-up and cosine begin again, with this learning rate at the highest."""
    warmup: int = 100
    weight_decay: float = 0.02
    text_weight: float = 0.2
    """Weight of predicting the thread itself, beside 1 for the answers."""
    text_from: float = 0.2
    """Share of the steps over which that weight grows from a tenth: to predict the text, mentions need no notes."""
    text_share: float = 0.25
    """Share of the thread's tokens that are predicted in a step."""
    notes_share: float = 0.5
    """Share of the batches in which probes must answer from notes: the span itself is hidden from them."""
    notes_only_share: float = 0.3
    """Share of the rows of such batches in which probes see the mentions only, not the other facts."""
    notes_first: float = 0.04
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
        check_lengths(self.lengths)
        if self.steps < 1 or self.batch_tokens < 1:
            raise ConfigError("expected steps and batch_tokens of at least 1")
        check_restarts(self.restarts)
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


def check_lengths(lengths: Sequence[tuple[float, int]]) -> None:
    """Refuse what is no curriculum; see `longest_at`.

    Raises:
        ConfigError: it does not begin at 0, or goes back.
    """
    begins = [begin for begin, _ in lengths]
    if not begins or begins[0] > 0 or begins != sorted(begins):
        raise ConfigError("expected lengths that begin at 0 and go on at ascending shares of the steps")


def check_restarts(restarts: Sequence[tuple[float, float]]) -> None:
    """Refuse what are no restarts: shares of the steps, each with a learning rate.

    Raises:
        ConfigError: they do not ascend between 0 and 1, or a rate is below 0.
    """
    begins = [0.0, *(begin for begin, _ in restarts), 1.0]
    if any(a >= b for a, b in pairwise(begins)) or any(rate < 0 for _, rate in restarts):
        raise ConfigError(f"expected restarts at ascending shares between 0 and 1, rates of at least 0, got {restarts}")


def steps_of(restarts: Sequence[tuple[float, float]], steps: int) -> tuple[tuple[int, float], ...]:
    """Return restarts by step, as `trainer.LoopConfig` takes them."""
    return tuple((round(begin * steps), rate) for begin, rate in restarts)


def longest_at(lengths: Sequence[tuple[float, int]], share: float) -> int:
    """Return how long threads are at a share of the steps, by a curriculum: its last entry that has begun."""
    return [length for begin, length in lengths if share >= begin][-1]


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
        for name, kind_of in (("lengths", int), ("restarts", float)):
            if name in data:
                data[name] = tuple((float(begin), kind_of(value)) for begin, value in data[name])
        if "families" in data:
            data["families"] = tuple(data["families"])
        return kind(**{**data, **given})
    except (OSError, ValueError, TypeError) as error:
        place = f" in {str(path)!r}" if path is not None else ""
        raise ConfigError(
            f"expected a JSON object with fields of {getattr(kind, '__name__', kind)}{place}: {error}"
        ) from error
