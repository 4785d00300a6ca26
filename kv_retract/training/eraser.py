"""Train a learned eraser (`erasers.kveraser`): its validation, its run. `eraser_config` comes first."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..engine.models import LoadedModel
from ..engine.support import inspect_model
from ..erasers import KVEraserEraser
from ..erasers.kveraser.config import KVEraserConfig
from ..erasers.kveraser.model import MapNet, SteeringNet, load_net, new_net
from ..errors import EraserMismatchError
from .corpus import training_families
from .edits import EditRow
from .encoding import RowEncoder
from .eraser_batches import draw_edit, edit_batches
from .eraser_config import EraserTraining
from .frozen import begun_with, train_beside
from .rendered import encoder_for
from .steering import EditBatch, ReadBatch, collate_edits, edit_loss, read, student_logits

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
        known = read(model, collate_edits([row], weights=config.weights).to(model.device))
        student = student_logits(model, net, known.batch, rotary=rotary, cache=known.cache)
        counts.setdefault("kl", []).append(float(edit_loss(student, known.teacher, known.batch)))
        best, wanted, at = student[0].argmax(-1).cpu(), known.teacher[0].argmax(-1).cpu(), 0
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
    workers: int = 0,
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
        workers: processes that draw threads ahead: on a GPU, one would keep it waiting.
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
    further = "" if start is None else KVEraserEraser(path=str(start)).eraser_id
    config = replace(config, **begun_with(config, loaded, texts, further))
    _, rotary = inspect_model(model, name=loaded.name)
    encoder = encoder_for(loaded.tokenizer)
    ids = [encoder.ids(text) for text in texts]
    eraser = KVEraserConfig(
        variant=config.variant, rank=config.rank, scale=config.scale, hidden=config.hidden,
        fingerprint=config.base, base=loaded.name,
    )  # fmt: skip
    net = _fresh_net(model, eraser, config.seed)
    net = (net if start is None else _net_of(start, net)).to(model.device)

    def prepared(batch: EditBatch) -> ReadBatch:
        return read(model, batch.to(model.device))

    def step_of(known: ReadBatch) -> tuple[torch.Tensor, dict[str, float]]:
        student = student_logits(model, net, known.batch, rotary=rotary, cache=known.cache)
        loss = edit_loss(student, known.teacher, known.batch)
        return loss, {"kl": float(loss.detach())}

    return train_beside(
        model,
        net,
        config,
        out,
        "eraser",
        batches=lambda step: edit_batches(config, encoder, ids, start=step, prepared=prepared, workers=workers),
        step_of=step_of,
        save=net.save,
        validate=(lambda: validation_of(model, net, config, encoder, rotary, n=validation)) if validation else None,
        loss_of=lambda entry: sum(entry["validation_kl"].values()) if "validation_kl" in entry else None,
        validate_every=validate_every,
        patience=config.patience,
        seconds=seconds,
        progress=progress,
    )


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


def _net_of(folder: Path, fresh: SteeringNet) -> SteeringNet:
    """Return the net of the eraser in a folder, which has to be like the fresh one of a run, to train it further.

    A map may have fewer hidden units: it gets those of the fresh one besides.

    Raises:
        EraserMismatchError: there is none, or another one.
    """
    net: SteeringNet = load_net(folder)
    net.config.check_base(fresh.config.fingerprint)
    found, wanted = net.config.to_json(), fresh.config.to_json()
    grows = found["variant"] == "kv_map" == wanted["variant"] and found["hidden"] < wanted["hidden"]
    free = {"base", "hidden"} if grows else {"base"}
    if different := sorted(name for name in wanted if name not in free and found[name] != wanted[name]):
        raise EraserMismatchError(
            f"the eraser in {str(folder)!r} and the run differ in {', '.join(different)}: "
            + ", ".join(f"{name} {found[name]!r} and {wanted[name]!r}" for name in different)
            + "; give the run's configuration those of the eraser"
        )
    if grows:
        assert isinstance(net, MapNet) and isinstance(fresh, MapNet), "their variant says it"
        fresh.take_over(net)
        return fresh
    return net.requires_grad_(True)
