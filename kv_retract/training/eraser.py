"""Train a learned eraser (`erasers.kveraser`): its validation, its run. `eraser_config` comes first."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..engine.models import LoadedModel
from ..engine.support import inspect_model
from ..engine.working import fingerprint_of
from ..erasers import KVEraserEraser
from ..erasers.kveraser.config import KVEraserConfig
from ..erasers.kveraser.model import SteeringNet, load_net, new_net
from ..errors import EraserMismatchError
from .checkpoint import RunFolder
from .config import ConfigError, steps_of
from .corpus import training_families
from .edits import EditRow
from .encoding import RowEncoder
from .eraser_batches import draw_edit, edit_batches
from .eraser_config import EraserTraining
from .rendered import encoder_for
from .steering import EditBatch, collate_edits, edit_loss, student_logits, teacher_logits
from .texts import check_texts
from .trainer import LoopConfig, train

BEST = "best"
"""Folder of the eraser with the lowest divergence in a validation."""
VALIDATION_LENGTHS = (300, 1500, 4000)
"""Tokens of the threads of a validation: what is best on short ones alone leaks on long ones (evals/LOG.md)."""


@torch.no_grad()
def measure(model: Any, net: Any, rows: Sequence[EditRow], config: EraserTraining, rotary: Any) -> dict[str, float]:
    """Measure an eraser on rows, answers given token by token: what `eval erasers` measures at length, in seconds.

    Returns:
        `kl`: the loss. `affected`, `unaffected`: share of queries whose every token is the most likely one. `leak`:
        share of affected ones where the retracted answer is likelier than any other at the first token in which it
        differs. `teacher_affected`, `teacher_unaffected`: what full recomputation gets right of both.
    """
    counts: dict[str, list[float]] = {}
    for row in rows:
        batch = collate_edits([row], weights=config.weights).to(model.device)
        teacher, student = teacher_logits(model, batch), student_logits(model, net, batch, rotary=rotary)
        counts.setdefault("kl", []).append(float(edit_loss(student, teacher, batch)))
        best, wanted, at = student[0].argmax(-1).cpu(), teacher[0].argmax(-1).cpu(), 0
        for query in row.queries:
            ids = torch.from_numpy(query.ids)
            span = slice(at + query.first - 1, at + len(query.ids) - 1)
            right, told = (float((tokens[span] == ids[query.first :]).all()) for tokens in (best, wanted))
            counts.setdefault(query.kind, []).append(right)
            counts.setdefault(f"teacher_{query.kind}", []).append(told)
            if query.lost is not None:
                lost = torch.from_numpy(query.lost)
                shared = min(len(lost), len(ids) - query.first)
                differs = int((lost[:shared] != ids[query.first :][:shared]).nonzero()[0])
                counts.setdefault("leak", []).append(float(best[span.start + differs] == lost[differs]))
            at += len(query.ids)
    return {name: round(sum(values) / len(values), 4) for name, values in counts.items()}


def train_eraser(
    loaded: LoadedModel,
    config: EraserTraining,
    out: Path,
    *,
    texts: Sequence[str] = (),
    start: Path | None = None,
    seconds: float | None = None,
    validation: int = 6,
    validate_every: int = 200,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> int:
    """Train an eraser for a model, or go on with a run that was stopped; write it to `out/eraser` once it is finished.

    Args:
        loaded: the base model; its weights do not change.
        config: what to train, and how.
        out: folder of the run: `config.json`, `log.jsonl`, `state.pt`, `eraser/`.
        texts: real text for stage 1; without any, only threads of the corpus. A run goes on with the same only.
        start: folder of an eraser of this model to train further, with a fresh optimizer. None: a fresh one. A run
            goes on with the same only.
        seconds: stop with a checkpoint after so long; calling again goes on.
        validation: threads per family and length (`VALIDATION_LENGTHS`) in a validation; 0: none.
        validate_every: steps between validations.
        progress: called with steps done and steps in all.

    Returns:
        Steps done; `config.steps` when finished.

    Raises:
        CheckpointError: the folder belongs to another configuration, or its state is damaged.
        ConfigError: the configuration was used on another model, or with another eraser to start from.
        EraserMismatchError: the eraser to start from belongs to another model, or is of another shape.
        TextError: the configuration was used with other texts.
        UnsupportedModelError: the model's caches cannot be edited.
    """
    model: Any = loaded.model
    fingerprint = fingerprint_of(model)
    if config.base not in ("", fingerprint):
        raise ConfigError(
            f"the configuration was used on a model of fingerprint {config.base}, got {loaded.name!r} of "
            f"{fingerprint}; empty its field base to train on another model"
        )
    config = replace(
        config,
        text_digest=check_texts(texts, config.text_digest),
        base=fingerprint,
        start=_check_start(start, config.start),
    )
    _, rotary = inspect_model(model, name=loaded.name)
    encoder = encoder_for(loaded.tokenizer)
    ids = [encoder.ids(text) for text in texts]
    eraser = KVEraserConfig(
        variant=config.variant, rank=config.rank, scale=config.scale, hidden=config.hidden,
        fingerprint=fingerprint, base=loaded.name,
    )  # fmt: skip
    net = (_fresh_net(model, eraser, config.seed) if start is None else _net_of(start, eraser)).to(model.device)
    folder = RunFolder(out, config.to_json())

    def step_of(batch: EditBatch) -> tuple[torch.Tensor, dict[str, float]]:
        batch = batch.to(model.device)
        loss = edit_loss(student_logits(model, net, batch, rotary=rotary), teacher_logits(model, batch), batch)
        return loss, {"kl": float(loss.detach())}

    def validate(step: int) -> dict[str, Any]:
        found = validation_of(model, net, config, encoder, rotary, n=validation)
        if sum(found["validation_kl"].values()) <= min(_validations(folder), default=float("inf")):
            net.save(out / BEST)
        return found

    def stop() -> bool:
        scores = _validations(folder)
        return bool(config.patience and scores) and len(scores) - 1 - scores.index(min(scores)) >= config.patience

    with _frozen(model):
        done = train(
            list(net.parameters()),
            lambda step: edit_batches(config, encoder, ids, start=step),
            step_of,
            LoopConfig(
                steps=config.steps, learning_rate=config.learning_rate, warmup=config.warmup, weight_decay=0.0,
                restarts=steps_of(config.restarts, config.steps), accumulate=config.accumulate,
            ),
            folder,
            state=net.state_dict,
            restore=net.load_state_dict,
            validate=validate if validation else None,
            validate_every=validate_every,
            stop=stop,
            seconds=seconds,
            progress=progress,
        )  # fmt: skip
    if done == config.steps or stop():
        if (out / BEST).is_dir():
            shutil.copytree(out / BEST, out / "eraser", dirs_exist_ok=True)
        else:
            net.save(out / "eraser")
    return done


def validation_of(
    model: Any,
    net: Any,
    config: EraserTraining,
    encoder: RowEncoder,
    rotary: Any,
    *,
    n: int,
    lengths: Sequence[int] = VALIDATION_LENGTHS,
) -> dict[str, dict[str, float]]:
    """Measure an eraser on `n` new threads of each family and length; name of `measure` to family to value."""
    found: dict[str, dict[str, float]] = {}
    for family in training_families():
        rng = random.Random(f"validation/{family}")
        rows = [draw_edit(config, encoder, length, rng, families=(family,)) for length in lengths for _ in range(n)]
        for name, value in measure(model, net, rows, config, rotary).items():
            found.setdefault("validation_kl" if name == "kl" else name, {})[family] = value
    return found


def _fresh_net(model: Any, config: KVEraserConfig, seed: int) -> SteeringNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: SteeringNet = new_net(model, config)
    return net


def _net_of(folder: Path, config: KVEraserConfig) -> SteeringNet:
    """Return the net of the eraser in a folder, which has to be the one that a run describes, to train it further.

    Raises:
        EraserMismatchError: there is none, or another one.
    """
    net: SteeringNet = load_net(folder)
    net.config.check_base(config.fingerprint)
    found, wanted = net.config.to_json(), config.to_json()
    if different := sorted(name for name in wanted if name != "base" and found[name] != wanted[name]):
        raise EraserMismatchError(
            f"the eraser in {str(folder)!r} and the run differ in {', '.join(different)}: "
            + ", ".join(f"{name} {found[name]!r} and {wanted[name]!r}" for name in different)
            + "; give the run's configuration those of the eraser"
        )
    return net.requires_grad_(True)


def _check_start(folder: Path | None, wanted: str) -> str:
    """Return which eraser a run begins with.

    Raises:
        ConfigError: another one is wanted.
    """
    found = KVEraserEraser(path=str(folder)).eraser_id if folder is not None else ""
    if wanted and found != wanted:
        raise ConfigError(
            f"the configuration was used to train {wanted} further, got {found or 'none'}: name that one's folder, or "
            "empty the field start in the configuration"
        )
    return found


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Keep gradients from a model's parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _validations(folder: RunFolder) -> list[float]:
    """Return the divergence of all validations so far, summed over families; a resumed run repeats some of them."""
    found = {e["step"]: sum(e["validation_kl"].values()) for e in folder.entries() if "validation_kl" in e}
    return list(found.values())
