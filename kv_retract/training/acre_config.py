"""The configuration of the training of landmarks: its data, its losses, its schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .config import ConfigError, check_lengths, check_restarts, read_json_config

_LISTS = ("windows", "ratios", "budgets")


@dataclass(frozen=True, slots=True, kw_only=True)
class AcreTraining:
    """Training of landmarks (ACRE, arXiv 2412.12486, section 3.2); JSON-able."""

    seed: int = 0
    pretrain_steps: int = 0
    """Optimizer steps of stage 1: go on with a text through the landmarks of earlier windows as with their tokens. Only
    for landmarks that are attended to."""
    finetune_steps: int = 1600
    """Of stage 2: find what a question is about, and answer it with that brought back."""
    accumulate: int = 1
    """Threads of an optimizer step."""
    lengths: tuple[tuple[float, int], ...] = ((0.0, 2048), (0.4, 4096), (0.85, 8192))
    """From this share of the steps on, threads are up to so many tokens long, and at least half of that."""
    attend: bool = False
    """Whether what comes later reads landmarks, as in the paper; else they only say what to bring back. On the bundled
    model that reads thousands of them worse than it reads none (evals/LOG.md)."""
    attended: int = 4096
    """So many first tokens of a thread are compared with full attention: as far as the model itself holds."""
    windows: tuple[int, ...] = (512, 1024)
    """Tokens of a window; one that fits twice is drawn for each thread."""
    ratios: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Tokens that a landmark stands for; one is drawn for each thread."""
    budgets: tuple[int, ...] = (128, 256, 512)
    """Tokens that are brought back; one is drawn for each thread."""
    overlap: int = 64
    sinks: int = 4
    landmark_positions: int = 512
    queries: int = 64
    rounds: int = 1
    """As in `engine.bilayer.BiLayer`."""
    most_facts: int = 48
    """What a thread is about, at most."""
    most_probes: int = 48
    """Questions to a thread."""
    most_answers: int = 2
    """Those that are answered, at most: the others are only searched for, all in one pass."""
    learning_rate: float = 1e-3
    restarts: tuple[tuple[float, float], ...] = ()
    """From such a share of the steps on, warm-up and cosine begin again, with this learning rate at the highest."""
    warmup: int = 25
    text_weight: float = 1.0
    """Of the divergence from full attention on the thread's own tokens."""
    search_weight: float = 1.0
    """Of the divergence of scores from where the evidence stands."""
    answer_weight: float = 1.0
    """Of the cross-entropy of the answer."""
    real_share: float = 0.0
    """Share of the threads that are pieces of real text, where there is some; they have no questions. Likewise."""
    text_digest: str = ""
    """Of the real text (`texts.digest_of`); filled in when a run begins, and checked when it goes on."""
    base: str = ""
    """Fingerprint of the base model; filled in and checked likewise."""
    start: str = ""
    """Identity of the landmarks that are trained further, empty for fresh ones; likewise."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_lengths(self.lengths)
        check_restarts(self.restarts)
        sizes = (
            "steps", "accumulate", "landmark_positions", "queries", "rounds", "most_facts", "most_probes",
            "most_answers",
        )  # fmt: skip
        if small := [name for name in sizes if getattr(self, name) < 1]:
            raise ConfigError(f"expected {', '.join(small)} of at least 1")
        amounts = (
            "pretrain_steps", "finetune_steps", "overlap", "sinks", "attended", "learning_rate", "text_weight",
            "search_weight", "answer_weight",
        )  # fmt: skip
        if small := [name for name in amounts if getattr(self, name) < 0]:
            raise ConfigError(f"expected {', '.join(small)} of at least 0")
        if empty := [name for name in _LISTS if not getattr(self, name) or min(getattr(self, name)) < 1]:
            raise ConfigError(f"expected {', '.join(empty)} with numbers of at least 1")
        if odd := [(w, r) for w in self.windows for r in self.ratios if w % r]:
            raise ConfigError(f"expected windows that every ratio divides, got a window of {odd[0][0]} at {odd[0][1]}")
        if min(self.windows) < self.sinks + self.overlap:
            raise ConfigError(
                f"expected windows of at least sinks and overlap together, {self.sinks + self.overlap}, got "
                f"{min(self.windows)}"
            )
        if (shortest := min(length for _, length in self.lengths)) < 2 * self.shortest:
            raise ConfigError(
                f"expected lengths of at least {2 * self.shortest}, since half of one must hold two windows at every "
                f"ratio and the queries, got {shortest}; give longer ones, or smaller ratios, overlap or queries"
            )
        if not self.attend and (self.pretrain_steps or self.real_share):
            raise ConfigError(
                "expected no pretrain_steps and no real_share for landmarks that are not attended to: text tells them "
                "nothing; set attend, or leave the two at 0"
            )
        if not 0 <= self.real_share <= 1:
            raise ConfigError(f"expected a real_share from 0 to 1, got {self.real_share}")

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.pretrain_steps + self.finetune_steps

    @property
    def shortest(self) -> int:
        """Tokens of the shortest thread from which something can be learnt: two windows at any ratio, and queries."""
        window = max(-(-(self.sinks + self.overlap) // ratio) * ratio for ratio in self.ratios)
        return 2 * window + self.queries + 1

    def to_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def read_acre_training(path: Path | None, **given: Any) -> AcreTraining:
    """Read a configuration from a JSON file; what is given goes before it. None: the defaults.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or impossible.
    """
    found = read_json_config(AcreTraining, path, given)
    lists: dict[str, Any] = {name: tuple(getattr(found, name)) for name in _LISTS}
    return replace(found, **lists)
