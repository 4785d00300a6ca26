"""Train landmarks (ACRE, arXiv 2412.12486): losses, validation, run. `acre_config` comes first.

Only landmarks learn: to be found by questions about their blocks. Those that are attended to also learn to stand for
them when what comes later is read (stage 1), and to leave the answer right that is given with the found tokens brought
back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, kl_div

from ..cache.refill import Layout
from ..engine.base import ModelSpec
from ..engine.models import LoadedModel
from ..engine.support import inspect_model
from ..engine.working import fingerprint_of, logits_argument
from ..landmarks import LandmarkNet
from .acre_config import AcreTraining
from .config import ConfigError
from .encoding import RowEncoder
from .frozen import begun_with, train_beside
from .long_rows import FAMILIES, LongRow, draw_row, long_rows
from .long_threads import LongStudent, LongThread, brought_back
from .rendered import encoder_for

VALIDATION_LENGTH, VALIDATION_PROBES = 4096, 6
"""Tokens of the threads of a validation, where training comes to such, and questions to each."""


def losses(student: LongStudent, row: LongRow, config: AcreTraining) -> dict[str, torch.Tensor]:
    """Return what a thread teaches: `text`, and where it has questions `answer` and, if there is something, `search`.

    `text`: see `text_loss`; of the windows within the first `config.attended` tokens, where these are two or more and
    landmarks are attended to.
    `answer`: cross-entropy of the answer, with what was found brought back, mean over tokens and the first
    `config.most_answers` questions, nats; where landmarks are attended to, or there are later rounds.
    `search`: see `search_loss`; mean over all questions, and over the later rounds of those that are answered.
    """
    reads = config.attend and config.text_weight > 0
    thread = student.read(row.ids, row.settings, num_predicted=config.attended if reads else 0)
    found = {"text": [text_loss(student.model, thread, row)] if thread.logits else [], "answer": [], "search": []}

    def search(scores: torch.Tensor, target: NDArray[np.float32]) -> torch.Tensor:
        return search_loss(scores, torch.from_numpy(target).to(scores.device))

    asked = [(question, row.targets(question)) for question in row.questions]
    sought = [(question.asked, target) for question, target in asked if target is not None]
    if sought:
        looks = student.look(thread, [question for question, _ in sought])
        found["search"] += [search(scores, target) for scores, (_, target) in zip(looks, sought, strict=True)]
    teaches = config.attend or config.rounds > 1  # else an answer tells landmarks nothing
    for question, target in asked[: config.most_answers if teaches else 0]:
        rounds, logits = student.ask(thread, question.asked, question.told)
        found["answer"].append(cross_entropy(logits, torch.from_numpy(question.told).to(logits.device)))
        if target is not None:
            found["search"] += [search(scores, target) for scores in rounds[1:]]
    return {name: torch.stack(values).mean() for name, values in found.items() if values}


def text_loss(model: Any, thread: LongThread, row: LongRow) -> torch.Tensor:
    """Return KL(full attention || through landmarks) of the next token, mean over the tokens with logits, nats."""
    size = row.settings.window
    end, count = (len(thread.logits) + 1) * size, len(thread.logits) * size
    with torch.no_grad():
        ids = torch.from_numpy(row.ids[:end])[None].to(model.device)
        teacher = model(input_ids=ids, use_cache=False, **logits_argument(model, count)).logits[0, -count:].float()
    return torch.stack([
        kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
        for found, wanted in zip(thread.logits, teacher.split(size), strict=True)
    ]).mean()  # fmt: skip


def search_loss(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return KL(target || softmax of the scores), nats: 0 where only what is sought is found.

    Args:
        scores: Shape: (num_landmarks,)
        target: shares that sum to 1. Shape: (num_landmarks,)
    """
    return kl_div(scores.log_softmax(-1), target, reduction="sum")


@torch.no_grad()
def measure(student: LongStudent, rows: Sequence[LongRow]) -> dict[str, float]:
    """Measure landmarks on threads with questions; those whose evidence is in sight anyway do not count.

    Returns:
        `found`: share of the evidence that is among the tokens brought back. `right`: share of answers whose every
        token is the most likely one. Nothing where no question counts.
    """
    counts: dict[str, list[float]] = {}
    for row in rows:
        thread = student.read(row.ids, row.settings)
        for question in row.questions:
            if not (spans := row.to_find(question)):
                continue
            rounds, logits = student.ask(thread, question.asked, question.told)
            wanted = np.concatenate([np.arange(start, end) for start, end in spans])
            back = brought_back(thread, rounds[-1])
            seen = np.isin(wanted, back) | ~np.isin(wanted, thread.candidates)
            right = (logits.argmax(-1).cpu().numpy() == question.told).all()
            for name, value in (("found", seen.mean()), ("right", right)):
                counts.setdefault(name, []).append(float(value))
    return {name: round(sum(values) / len(values), 4) for name, values in counts.items()}


def train_acre(
    loaded: LoadedModel,
    config: AcreTraining,
    out: Path,
    *,
    texts: Sequence[str] = (),
    start: Path | None = None,
    seconds: float | None = None,
    validation: int = 3,
    validate_every: int = 100,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> int:
    """Train landmarks for a model, or go on with a run that was stopped; write `out/landmarks` once it is finished.

    Args:
        loaded: the base model; its weights do not change.
        config: what to train, and how.
        out: folder of the run: `config.json`, `log.jsonl`, `state.pt`, `landmarks/`.
        texts: real text; without any, only threads of the corpus. A run goes on with the same only.
        start: folder of landmarks of this model to train further, with a fresh optimizer; whether they are attended to
            is the configuration's. None: fresh ones. A run goes on with the same only.
        seconds: stop with a checkpoint after so long; calling again goes on.
        validation: threads per family in a validation; 0: none.
        validate_every: steps between validations.
        progress: called with steps done and steps in all.

    Returns:
        Steps done; `config.steps` when finished.

    Raises:
        CheckpointError: the folder belongs to another configuration, or its state is damaged.
        ConfigError: the configuration was used on another model, or with other landmarks to start from; or it needs
            more positions than the model has.
        LandmarkMismatchError: the landmarks to start from are missing, or belong to another model.
        TextError: the configuration was used with other texts.
        UnsupportedModelError: the model's caches cannot be edited, or it has no projections of its own for landmarks.
    """
    model: Any = loaded.model
    spec, rotary = inspect_model(model, name=loaded.name)
    _check_positions(config, spec)
    net = LandmarkNet.for_model(model) if start is None else LandmarkNet.load(start, model, fingerprint_of(model))
    net.attended = config.attend
    net.to(model.device).requires_grad_(True)
    config = replace(config, **begun_with(config, loaded, texts, "" if start is None else net.identity))
    encoder = encoder_for(loaded.tokenizer)
    ids = [encoder.ids(text) for text in texts]
    student = LongStudent(model, rotary, net)
    weights = {"text": config.text_weight, "search": config.search_weight, "answer": config.answer_weight}

    def step_of(row: LongRow) -> tuple[torch.Tensor, dict[str, float]]:
        found = losses(student, row, config)
        nothing = net.embedding.sum() * 0  # a text has no questions, and no first tokens that are compared
        total = sum((weights[name] * loss for name, loss in found.items()), nothing)
        return total, {name: float(loss.detach()) for name, loss in found.items()}

    return train_beside(
        model,
        net,
        config,
        out,
        "landmarks",
        batches=lambda step: long_rows(config, encoder, ids, start=step),
        step_of=step_of,
        save=lambda folder: net.save(folder, fingerprint=config.base, base=loaded.name),
        validate=(lambda: validation_of(student, config, encoder, n=validation)) if validation else None,
        loss_of=_loss_of,
        validate_every=validate_every,
        seconds=seconds,
        progress=progress,
    )


def validation_of(
    student: LongStudent, config: AcreTraining, encoder: RowEncoder, *, n: int
) -> dict[str, dict[str, float]]:
    """Measure landmarks on `n` threads of each family, the same each time; name of `measure` to family to value."""
    length = min(VALIDATION_LENGTH, max(length for _, length in config.lengths))
    config = replace(config, most_probes=min(VALIDATION_PROBES, config.most_probes))
    measured: dict[str, dict[str, float]] = {"found": {}, "right": {}}
    for family in FAMILIES:
        rng = random.Random(f"validation/{family}")
        rows = [draw_row(config, encoder, length, rng, families=(family,)) for _ in range(n)]
        for name, value in measure(student, rows).items():
            measured[name][family] = value
    return measured


def _loss_of(entry: Mapping[str, Any]) -> float | None:
    """Return how far a validation is from finding all and answering all right, as a mean over families."""
    shares = [value for name in ("found", "right") for value in entry.get(name, {}).values()]
    return 1 - sum(shares) / len(shares) if shares else None


def _check_positions(config: AcreTraining, spec: ModelSpec) -> None:
    """Raise ConfigError where the threads of a configuration need more positions than a model has."""
    layout = Layout(sinks=config.sinks, landmarks=config.landmark_positions, refilled=max(config.budgets))
    needed = max(config.attended, layout.local + config.overlap + 3 * max(config.windows))  # up to 2 behind windows
    if needed > spec.max_positions:
        raise ConfigError(
            f"the configuration needs {needed} positions and model {spec.name!r} has {spec.max_positions}; give "
            "smaller attended, windows, landmark_positions or budgets"
        )
