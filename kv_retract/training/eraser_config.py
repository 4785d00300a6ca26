"""The configuration of an eraser's training: its shape, its data, its schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..erasers.kveraser.config import VARIANTS, Variant
from .config import ConfigError, check_lengths, check_restarts, read_json_config

Stage = Literal["pretrain", "finetune", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EraserTraining:
    """Training of an eraser; JSON-able."""

    variant: Variant = "blind"
    stage: Stage = "both"
    rank: int = 16
    scale: float = 2.0
    hidden: int = 256
    seed: int = 0
    pretrain_steps: int = 150
    """Optimizer steps of span-neighbor pre-training on text, stage 1 of KVEraser."""
    finetune_steps: int = 1350
    """Of task-specific fine-tuning on the corpus, stage 2."""
    batch_tokens: int = 2048
    """Tokens of the threads of a batch."""
    accumulate: int = 1
    """Batches of an optimizer step."""
    reuse: int = 1
    """How often a batch is learnt from. Reading its threads and asking the teacher, four fifths of the work at 4,096
    tokens, is done once."""
    kept_batches: int = 256
    """Batches that are kept for that: each takes the memory of its threads' states."""
    lengths: tuple[tuple[float, int], ...] = ((0.0, 512), (0.1, 1024), (0.3, 2048), (0.6, 4096))
    """From this share of the steps on, threads are up to so many tokens long."""
    learning_rate: float = 2e-3
    restarts: tuple[tuple[float, float], ...] = ()
    """From such a share of the steps on, warm-up and cosine begin again, with this learning rate at the highest."""
    warmup: int = 30
    affected_weight: float = 2.0
    """Weight of what a span affects, beside 1 for what must stay as it is."""
    text_share: float = 0.15
    """Share of rows of stage 1 during stage 2."""
    real_share: float = 0.5
    """Share of the rows of stage 1 that are pieces of real text, where there is some."""
    turn_share: float = 0.0
    """Share of their spans that are whole turns, calls or tool results, not random pieces (evals/LOG.md)."""
    most_spans: int = 16
    """Spans that are erased together, at most; few are as likely as many."""
    single_share: float = 0.0
    """Share of threads of the corpus in which one span is erased alone, whatever chance says."""
    most_probes: int = 12
    """Per thread; at most half of them are affected."""
    patience: int = 0
    """Stop early after so many validations without a new best one; 0: never. The best one is kept in any case."""
    text_digest: str = ""
    """Of the real text (`texts.digest_of`); filled in when a run begins, and checked when it goes on."""
    base: str = ""
    """Fingerprint of the base model; filled in and checked likewise."""
    start: str = ""
    """Identity (`Eraser.eraser_id`) of the eraser that is trained further, empty for a fresh one; likewise."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.variant not in VARIANTS:
            raise ConfigError(f"expected a variant of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.stage not in get_args(Stage):
            raise ConfigError(f"expected a stage of {', '.join(get_args(Stage))}, got {self.stage!r}")
        check_lengths(self.lengths)
        check_restarts(self.restarts)
        sizes = (
            "rank", "hidden", "steps", "batch_tokens", "accumulate", "reuse", "kept_batches", "most_spans",
            "most_probes",
        )  # fmt: skip
        if small := [name for name in sizes if getattr(self, name) < 1]:
            raise ConfigError(f"expected {', '.join(small)} of at least 1")
        if self.pretrain_steps < 0 or self.finetune_steps < 0 or self.affected_weight < 0:
            raise ConfigError("expected pretrain_steps, finetune_steps and affected_weight of at least 0")
        for name in ("text_share", "real_share", "turn_share", "single_share"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ConfigError(f"expected a {name} from 0 to 1, got {share}")

    @property
    def steps(self) -> int:
        """Of the stages that are run."""
        return self.first_stage_steps + (self.finetune_steps if self.stage != "pretrain" else 0)

    @property
    def first_stage_steps(self) -> int:
        """Of stage 1."""
        return self.pretrain_steps if self.stage != "finetune" else 0

    @property
    def weights(self) -> dict[str, float]:
        """Of each kind of query."""
        return {"affected": self.affected_weight, "unaffected": 1.0, "neighbor": 1.0, "continuation": 1.0}

    def to_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def read_eraser_training(path: Path | None, **given: Any) -> EraserTraining:
    """Read a configuration from a JSON file; what is given goes before it. None: the defaults.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or impossible.
    """
    return read_json_config(EraserTraining, path, given)
