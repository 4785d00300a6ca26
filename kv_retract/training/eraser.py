"""Train a learned eraser (`erasers.kveraser`): its configuration, its data, its validation, its run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..engine.models import LoadedModel
from ..engine.support import inspect_model
from ..engine.working import fingerprint_of
from ..erasers.kveraser.config import VARIANTS, KVEraserConfig, Variant
from ..erasers.kveraser.model import new_net
from .checkpoint import RunFolder
from .config import ConfigError, read_json_config
from .corpus import generate, training_families
from .edits import EditRow, edit_of_sample, edit_of_text
from .encoding import IntArray, RowEncoder, choose_spans
from .rendered import encoder_for
from .steering import EditBatch, collate_edits, edit_loss, student_logits, teacher_logits
from .texts import check_texts
from .trainer import LoopConfig, train

Stage = Literal["pretrain", "finetune", "both"]
BEST = "best"
"""Folder of the eraser with the lowest divergence in a validation."""
AHEAD = 48
"""Tokens of a continuation, and of a span's neighbors at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EraserTraining:
    """Training of an eraser; JSON-able."""

    variant: Variant = "blind"
    stage: Stage = "both"
    rank: int = 16
    scale: float = 2.0
    hidden: int = 128
    seed: int = 0
    pretrain_steps: int = 100
    """Optimizer steps of span-neighbor pre-training on text, stage 1 of KVEraser."""
    finetune_steps: int = 700
    """Of task-specific fine-tuning on the corpus, stage 2."""
    batch_tokens: int = 2048
    """Tokens of the threads of a batch."""
    accumulate: int = 1
    """Batches of an optimizer step."""
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.4, 512), (0.65, 1024), (0.88, 2048))
    """From this share of the steps on, threads are up to so many tokens long."""
    learning_rate: float = 2e-3
    warmup: int = 30
    affected_weight: float = 4.0
    """Weight of what a span affects, beside 1 for what must stay as it is."""
    text_share: float = 0.15
    """Share of rows of stage 1 during stage 2."""
    most_spans: int = 3
    """Spans that are erased together, at most."""
    most_probes: int = 6
    patience: int = 0
    """Stop early after so many validations without a new best one; 0: never. The best one is kept in any case."""
    text_digest: str = ""
    """Of the real text (`texts.digest_of`); filled in when a run begins, and checked when it goes on."""
    base: str = ""
    """Fingerprint of the base model; filled in and checked likewise."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.variant not in VARIANTS:
            raise ConfigError(f"expected a variant of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.stage not in get_args(Stage):
            raise ConfigError(f"expected a stage of {', '.join(get_args(Stage))}, got {self.stage!r}")
        if not self.lengths or min(begin for begin, _ in self.lengths) > 0:
            raise ConfigError("expected lengths that begin at 0")
        sizes = ("rank", "hidden", "steps", "batch_tokens", "accumulate", "most_spans", "most_probes")
        if small := [name for name in sizes if getattr(self, name) < 1]:
            raise ConfigError(f"expected {', '.join(small)} of at least 1")
        if self.pretrain_steps < 0 or self.finetune_steps < 0 or self.affected_weight < 0:
            raise ConfigError("expected pretrain_steps, finetune_steps and affected_weight of at least 0")
        if not 0 <= self.text_share <= 1:
            raise ConfigError(f"expected a text_share from 0 to 1, got {self.text_share}")

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


def edit_batches(
    config: EraserTraining, encoder: RowEncoder, texts: Sequence[IntArray], *, start: int = 0
) -> Iterator[EditBatch]:
    """Yield the batches from step `start` on, `accumulate` each; they depend on configuration, texts and step only."""
    for number in range(start * config.accumulate, config.steps * config.accumulate):
        step, rng = number // config.accumulate, random.Random(f"eraser/{config.seed}/{number}")
        longest = max(length for begin, length in config.lengths if step >= begin * config.steps)
        length = max(200, int(longest * rng.choice((0.5, 0.75, 1.0))))
        pretrain = step < config.first_stage_steps
        rows = []
        for _ in range(max(1, config.batch_tokens // length)):
            is_text = pretrain or rng.random() < config.text_share
            rows.append(
                _text_row(config, encoder, texts, length, rng) if is_text else draw_edit(config, encoder, length, rng)
            )
        yield collate_edits(rows, weights=config.weights)


def draw_edit(
    config: EraserTraining, encoder: RowEncoder, length: int, rng: random.Random, *, families: Sequence[str] = ()
) -> EditRow:
    """Draw a thread of the corpus, spans of it to be erased together, and probes of both kinds."""
    while True:
        sample = generate(
            rng.choice(families or training_families()), seed=rng.randrange(10**9), length=length,
            tokens=encoder.length, size=rng.randint(2, max(3, min(12, length // 60))),
            mentions=rng.choice((0.5, 0.8, 1.0)),
        )  # fmt: skip
        possible = sorted(choose_spans(sample, rng, share=1.0))
        spans = set(rng.sample(possible, min(len(possible), rng.randint(1, config.most_spans))))
        affected = [probe for probe in sample.probes if spans & set(probe.without)]
        others = [probe for probe in sample.probes if not spans & set(probe.without)]
        if spans and all(len(spans & set(probe.without)) == 1 for probe in affected):
            break
    rng.shuffle(affected)
    rng.shuffle(others)
    affected = affected[: max(1, config.most_probes // 2)]
    probes = affected + others[: config.most_probes - len(affected)]
    return edit_of_sample(encoder, sample, probes, spans, with_tools=rng.random() < 0.3)


def _text_row(
    config: EraserTraining, encoder: RowEncoder, texts: Sequence[IntArray], length: int, rng: random.Random
) -> EditRow:
    """Return a piece of a real text, or of a thread of the corpus where there is none and half of the time."""
    long = [text for text in texts if len(text) >= 3 * AHEAD]
    if long and rng.random() < 0.5:
        text = rng.choices(long, weights=[len(text) for text in long])[0]
    else:
        sample = generate(
            rng.choice(training_families()), seed=rng.randrange(10**9), length=length + 200, tokens=encoder.length
        )
        text = encoder.thread(sample, with_tools=False)[0]
    start = rng.randrange(max(1, len(text) - length + 1))
    return edit_of_text(text[start : start + length], rng, most_spans=config.most_spans, ahead=AHEAD)


@torch.no_grad()
def measure(model: Any, net: Any, rows: Sequence[EditRow], config: EraserTraining, rotary: Any) -> dict[str, float]:
    """Measure an eraser on rows, answers given token by token: what `eval erasers` measures at length, in seconds.

    Returns:
        `kl`: the loss. `affected`, `unaffected`: share of queries whose every token is the most likely one. `leak`:
        share of affected ones where the retracted answer is likelier than any other at the first token in which it
        differs. `teacher`: affected ones that full recomputation gets right.
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
            counts.setdefault(query.kind, []).append(float((best[span] == ids[query.first :]).all()))
            if query.lost is not None:
                lost = torch.from_numpy(query.lost)
                shared = min(len(lost), len(ids) - query.first)
                differs = int((lost[:shared] != ids[query.first :][:shared]).nonzero()[0])
                counts.setdefault("leak", []).append(float(best[span.start + differs] == lost[differs]))
                counts.setdefault("teacher", []).append(float((wanted[span] == ids[query.first :]).all()))
            at += len(query.ids)
    return {name: round(sum(values) / len(values), 4) for name, values in counts.items()}


def train_eraser(
    loaded: LoadedModel,
    config: EraserTraining,
    out: Path,
    *,
    texts: Sequence[str] = (),
    seconds: float | None = None,
    validation: int = 8,
    validate_every: int = 100,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> int:
    """Train an eraser for a model, or go on with a run that was stopped; write it to `out/eraser` once it is finished.

    Args:
        loaded: the base model; its weights do not change.
        config: what to train, and how.
        out: folder of the run: `config.json`, `log.jsonl`, `state.pt`, `eraser/`.
        texts: real text for stage 1; without any, only threads of the corpus. A run goes on with the same only.
        seconds: stop with a checkpoint after so long; calling again goes on.
        validation: threads per family in a validation; 0: none.
        validate_every: steps between validations.
        progress: called with steps done and steps in all.

    Returns:
        Steps done; `config.steps` when finished.

    Raises:
        CheckpointError: the folder belongs to another configuration, or its state is damaged.
        ConfigError: the configuration was used on another model.
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
    config = replace(config, text_digest=check_texts(texts, config.text_digest), base=fingerprint)
    model.requires_grad_(False)
    _, rotary = inspect_model(model, name=loaded.name)
    encoder = encoder_for(loaded.tokenizer)
    ids = [encoder.ids(text) for text in texts]
    eraser = KVEraserConfig(
        variant=config.variant, rank=config.rank, scale=config.scale, hidden=config.hidden,
        fingerprint=fingerprint, base=loaded.name,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = new_net(model, eraser).to(model.device)
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

    done = train(
        list(net.parameters()),
        lambda step: edit_batches(config, encoder, ids, start=step),
        step_of,
        LoopConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            warmup=config.warmup,
            weight_decay=0.0,
            accumulate=config.accumulate,
        ),  # fmt: skip
        folder,
        state=net.state_dict,
        restore=net.load_state_dict,
        validate=validate if validation else None,
        validate_every=validate_every,
        stop=stop,
        seconds=seconds,
        progress=progress,
    )
    if done == config.steps or stop():
        if (out / BEST).is_dir():
            shutil.copytree(out / BEST, out / "eraser", dirs_exist_ok=True)
        else:
            net.save(out / "eraser")
    return done


def validation_of(
    model: Any, net: Any, config: EraserTraining, encoder: RowEncoder, rotary: Any, *, n: int, length: int = 300
) -> dict[str, dict[str, float]]:
    """Measure an eraser on `n` new threads of each family; name of `measure` to family to value."""
    found: dict[str, dict[str, float]] = {}
    for family in training_families():
        rng = random.Random(f"validation/{family}")
        rows = [draw_edit(config, encoder, length, rng, families=(family,)) for _ in range(n)]
        for name, value in measure(model, net, rows, config, rotary).items():
            found.setdefault("validation_kl" if name == "kl" else name, {})[family] = value
    return found


def _validations(folder: RunFolder) -> list[float]:
    """Return the divergence of all validations so far, summed over families; a resumed run repeats some of them."""
    found = {e["step"]: sum(e["validation_kl"].values()) for e in folder.entries() if "validation_kl" in e}
    return list(found.values())
