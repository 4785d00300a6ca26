"""Runs that train something beside a frozen model: what those of erasers and of landmarks share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..engine.models import LoadedModel
from ..engine.working import fingerprint_of
from .checkpoint import RunFolder
from .config import ConfigError, steps_of
from .texts import check_texts
from .trainer import LoopConfig, Step, train

BEST = "best"
"""Folder of what was best in a validation."""


class FrozenTraining(Protocol):
    """What the configurations of such runs have in common."""

    @property
    def steps(self) -> int:
        """Of the optimizer."""

    @property
    def accumulate(self) -> int:
        """Batches of a step."""

    @property
    def learning_rate(self) -> float:
        """At its highest."""

    @property
    def restarts(self) -> tuple[tuple[float, float], ...]:
        """As `config.steps_of` takes them."""

    @property
    def warmup(self) -> int:
        """Steps until the learning rate is at its highest."""

    @property
    def text_digest(self) -> str:
        """Of the real text, empty before a run begins."""

    @property
    def base(self) -> str:
        """Fingerprint of the model, empty before a run begins."""

    @property
    def start(self) -> str:
        """Identity of what is trained further, empty for something fresh and before a run begins."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields."""


def begun_with(config: FrozenTraining, loaded: LoadedModel, texts: Sequence[str], start: str) -> dict[str, Any]:
    """Return the fields that say what a run is begun with: `text_digest`, `base` and `start`.

    Args:
        config: may already say it; then it has to be the same.
        loaded: the base model.
        texts: real text.
        start: identity of what is trained further; empty: nothing.

    Raises:
        ConfigError: the configuration was used on another model, or with something else to start from.
        TextError: it was used with other texts.
    """
    fingerprint = fingerprint_of(loaded.model)
    if config.base not in ("", fingerprint):
        raise ConfigError(
            f"the configuration was used on a model of fingerprint {config.base}, got {loaded.name!r} of "
            f"{fingerprint}; empty its field base to train on another model"
        )
    if config.start not in ("", start):
        raise ConfigError(
            f"the configuration was used to train {config.start} further, got {start or 'none'}: name that one's "
            "folder, or empty the field start in the configuration"
        )
    return {"text_digest": check_texts(texts, config.text_digest), "base": fingerprint, "start": start}


def train_beside(
    model: nn.Module,
    net: nn.Module,
    config: FrozenTraining,
    out: Path,
    name: str,
    *,
    batches: Callable[[int], Iterator[Any]],
    step_of: Step,
    save: Callable[[Path], None],
    validate: Callable[[], Mapping[str, Any]] | None,
    loss_of: Callable[[Mapping[str, Any]], float | None],
    validate_every: int,
    patience: int = 0,
    seconds: float | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> int:
    """Train a net beside a frozen model, or go on; write the net of the best validation to `out/name` at the end.

    Args:
        model: its weights do not change.
        net: what learns.
        config: of the run, with what it is begun with.
        out: folder of the run.
        name: of the folder in it where the result goes.
        batches: as `trainer.train` takes them.
        step_of: likewise.
        save: writes the net to a folder.
        validate: measures the net, for the log. None: the last net is the result.
        loss_of: of an entry of the log, the lower the better; None where that is of no validation.
        validate_every: steps between validations.
        patience: stop early after so many validations without a new best one; 0: never.
        seconds: stop with a checkpoint after so long; calling again goes on.
        progress: called with steps done and steps in all.

    Returns:
        Steps done; `config.steps` when finished.

    Raises:
        CheckpointError: the folder belongs to another configuration, or its state is damaged.
    """
    folder = RunFolder(out, config.to_json())

    def losses() -> list[float]:
        """Return those of all validations so far; a resumed run repeats some of them."""
        found = {entry["step"]: loss for entry in folder.entries() if (loss := loss_of(entry)) is not None}
        return list(found.values())

    def measured(step: int) -> Mapping[str, Any]:
        assert validate is not None, "called where there are validations"
        found = validate()
        loss = loss_of(found)
        if loss is not None and loss <= min(losses(), default=float("inf")):
            save(out / BEST)
        return found

    def stop() -> bool:
        found = losses()
        return bool(patience and found) and len(found) - 1 - found.index(min(found)) >= patience

    with frozen(model):
        done = train(
            list(net.parameters()),
            batches,
            step_of,
            LoopConfig(
                steps=config.steps, learning_rate=config.learning_rate, warmup=config.warmup, weight_decay=0.0,
                restarts=steps_of(config.restarts, config.steps), accumulate=config.accumulate,
            ),
            folder,
            state=net.state_dict,
            restore=net.load_state_dict,
            validate=measured if validate is not None else None,
            validate_every=validate_every,
            stop=stop,
            seconds=seconds,
            progress=progress,
        )  # fmt: skip
    if done == config.steps or stop():
        if (out / BEST).is_dir():
            shutil.copytree(out / BEST, out / name, dirs_exist_ok=True)
        else:
            save(out / name)
    return done


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep gradients from a model's parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
