"""The bundled chat model: its configuration, its training data and its loss. `trainer.py` runs the loop."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from ..errors import DeviceError, KVRetractError
from ..reference import CORPUS_TOKENIZER_DIR
from .checkpoint import RunFolder
from .corpus import generate, training_families
from .encoding import Row, RowEncoder, choose_spans
from .names import Split
from .trainer import LoopConfig, train
from .wiring import BACK, wire_induction

GROUP = 4
"""Batches whose rows are drawn together and sorted by length."""


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
    steps: int = 12_000
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding not counted."""
    lengths: tuple[tuple[float, int], ...] = ((0.0, 160), (0.15, 256), (0.35, 384), (0.6, 512), (0.8, 1024))
    """Curriculum: from this share of the steps on, threads are up to so many tokens long."""
    learning_rate: float = 5e-4
    """Higher ones undo the wired circuit before it is of use (evals/LOG.md)."""
    warmup: int = 200
    weight_decay: float = 0.02
    text_weight: float = 0.2
    """Weight of predicting the thread itself, beside 1 for the answers."""
    text_share: float = 0.25
    """Share of the thread's tokens that are predicted in a step."""
    notes_share: float = 0.4
    """Share of the batches in which probes must answer from notes: the span itself is hidden from them."""
    notes_from: float = 0.15
    """Share of the steps after which such batches begin."""
    removed_share: float = 0.25
    """Probability of each span to be cut out."""
    families: tuple[str, ...] = ()
    """What to train on. None: all families but the held-out one."""

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
        """Return all fields; `families` only where some are named, since older runs know no such field."""
        data = asdict(self)
        return data if self.families else {name: value for name, value in data.items() if name != "families"}


def read_config(path: Path | None) -> ReferenceConfig:
    """Read a configuration from a JSON file; None: the defaults.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or impossible.
    """
    if path is None:
        return ReferenceConfig()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "lengths" in data:
            data["lengths"] = tuple((float(begin), int(length)) for begin, length in data["lengths"])
        if "families" in data:
            data["families"] = tuple(data["families"])
        return ReferenceConfig(**data)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"expected a JSON object with fields of ReferenceConfig in {str(path)!r}: {error}") from error


def new_model(config: ReferenceConfig, *, vocab_size: int, eos_token_id: int, pad_token_id: int) -> Any:
    """Return a fresh model with the induction circuit wired in; the same for the same seed."""
    shape: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape))
    for layer in model.model.layers:  # residual branches start small
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data /= (2 * config.num_layers) ** 0.5
    wire_induction(model, generator=torch.Generator().manual_seed(config.seed))
    return model


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded rows."""

    ids: torch.Tensor
    """Shape: (num_rows, num_tokens)"""
    answer: torch.Tensor
    """Tokens to predict with full weight. Shape: (num_rows, num_tokens), bool"""
    text: torch.Tensor
    """Tokens to predict with `text_weight`. Shape: (num_rows, num_tokens), bool"""
    visible: torch.Tensor | None
    """Who sees whom; None: plain causal attention. Shape: (num_rows, 1, num_tokens, num_tokens), bool"""

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Return `visible` as an additive mask of the same shape; None for plain causal attention."""
        if self.visible is None:
            return None
        zeros = torch.zeros(self.visible.shape, dtype=dtype, device=device)
        return zeros.masked_fill_(~self.visible.to(device), torch.finfo(dtype).min)


def batches(config: ReferenceConfig, encoder: RowEncoder, *, start: int = 0) -> Iterator[Batch]:
    """Yield the batches of training from step `start` on; each depends on the configuration and its step only."""
    for group in range(start // GROUP, -(-config.steps // GROUP)):
        rng = random.Random(f"{config.seed}/{group}")
        made = _group(config, encoder, rng, group * GROUP / config.steps)
        yield from made[max(0, start - group * GROUP) : config.steps - group * GROUP]


def _group(config: ReferenceConfig, encoder: RowEncoder, rng: random.Random, progress: float) -> list[Batch]:
    """Return batches of rows of about the same length, so that little is padding, in random order."""
    longest = max(length for begin, length in config.lengths if progress >= begin)
    length = max(96, int(longest * rng.choice((0.4, 0.6, 0.8, 1.0, 1.0))))
    notes = progress >= config.notes_from and rng.random() < config.notes_share
    size, with_tools = rng.randint(2, max(3, min(12, length // 60))), rng.random() < 0.3
    rows: list[Row] = []
    tokens = 0
    while tokens < GROUP * config.batch_tokens or len(rows) < GROUP:
        rows.append(_row(rng, encoder, config, length, size, with_tools, notes))
        tokens += len(rows[-1].ids)
    rows.sort(key=lambda row: len(row.ids))
    cuts = [len(rows) * i // GROUP for i in range(GROUP + 1)]
    made = [collate(rows[a:b], rng, config.text_share, masked=notes) for a, b in zip(cuts, cuts[1:], strict=False)]
    rng.shuffle(made)
    return made


def _row(
    rng: random.Random,
    encoder: RowEncoder,
    config: ReferenceConfig,
    length: int,
    size: int,
    with_tools: bool,
    notes: bool,
) -> Row:
    sample = generate(
        rng.choice(config.families or training_families()), seed=rng.randrange(10**9), length=length,
        tokens=encoder.length, size=size, mentions=rng.choice((0.5, 0.8, 1.0)),
    )  # fmt: skip
    probes = list(sample.probes)
    rng.shuffle(probes)
    if notes:
        hidden = {s.span_id for s in sample.spans if sample.mentioned_later(s.span_id)}
        return encoder.encode(sample, probes[:8], hidden=hidden, with_tools=with_tools)
    removed = choose_spans(sample, rng, share=config.removed_share)
    return encoder.encode(sample, probes[:8], removed=removed, with_tools=with_tools)


def collate(rows: Sequence[Row], rng: random.Random, text_share: float, *, masked: bool) -> Batch:
    """Pad rows on the right."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    answer, text = torch.zeros(len(rows), longest, dtype=torch.bool), torch.zeros(len(rows), longest, dtype=torch.bool)
    visible = torch.zeros(len(rows), 1, longest, longest, dtype=torch.bool) if masked else None
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], answer[i, :n] = torch.from_numpy(row.ids), torch.from_numpy(row.answer)
        text[i, :n] = ~answer[i, :n] & (torch.rand(n, generator=generator) < text_share)
        if visible is not None:
            visible[i, 0, :n, :n] = torch.from_numpy(row.visible())
            visible[i, 0].fill_diagonal_(True)  # padding sees itself, so that no row of the softmax is empty
    answer[:, 0] = text[:, 0] = False
    return Batch(ids, answer, text, visible)


def loss_of(
    model: Any, batch: Batch, *, text_weight: float, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of a batch and its parts: cross entropy of answers and text, share of right answer tokens."""
    device = next(model.parameters()).device
    mask = batch.mask(dtype, device)
    ids = batch.ids.to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        parts = {}
        for name, chosen in (("answer", batch.answer), ("text", batch.text)):
            at = chosen.to(device).nonzero(as_tuple=True)
            logits = model.lm_head(hidden[at[0], at[1] - 1]).float()
            target = ids[at]
            parts[name] = cross_entropy(logits, target) if len(target) else logits.sum()  # the mean of none is NaN
            if name == "answer":
                right = float((logits.argmax(-1) == target).float().mean())
    total = parts["answer"] + text_weight * parts["text"]
    return total, {"answer": float(parts["answer"].detach()), "text": float(parts["text"].detach()), "right": right}


@torch.inference_mode()
def probe_accuracy(
    model: Any,
    encoder: RowEncoder,
    *,
    length: int,
    seed: int,
    n: int,
    hidden: bool,
    dtype: torch.dtype,
    families: Sequence[str] = (),
    split: Split = "train",
) -> dict[str, float]:
    """Return the share of probes whose every answer token is the most likely one, by family.

    Args:
        model: in any mode.
        encoder: of its tokenizer.
        length: of the threads.
        seed: of the threads.
        n: threads per family.
        hidden: ask only what a span decides that is mentioned later, and hide that span: can the model answer from
            notes?
        dtype: of the computation.
        families: which; none: those of training.
        split: of the threads.
    """
    result = {}
    for family in families or training_families():
        right = total = 0
        for number in range(n):
            sample = generate(
                family, seed=seed + number, length=length, split=split, tokens=encoder.length, mentions=1.0
            )
            spans = {s.span_id for s in sample.spans if sample.mentioned_later(s.span_id)}
            probes = [p for p in sample.probes if not hidden or spans & set(p.without)][:6]
            if not probes:
                continue
            row = encoder.encode(sample, probes, hidden=spans if hidden else (), with_tools=False)
            batch = collate([row], random.Random(0), 0.0, masked=True)
            device = next(model.parameters()).device
            mask = batch.mask(dtype, device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits = model(batch.ids.to(device), attention_mask=mask, use_cache=False).logits[0]
            good = torch.ones(len(row.ids), dtype=torch.bool)
            good[1:] = logits[:-1].argmax(-1).cpu() == batch.ids[0, 1:]
            for index in range(len(probes)):
                answer = torch.from_numpy(row.answer & (row.probe == index))
                right += bool(good[answer].all())
                total += 1
        if total:
            result[family] = right / total
    return result


def train_reference(
    config: ReferenceConfig,
    out: Path,
    *,
    tokenizer: Any = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float | None = None,
    validation: int = 8,
    validate_every: int = 500,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> int:
    """Train a reference model, or go on with a run that was stopped; write it to `out/model` once it is finished.

    Args:
        config: shape and training; a folder belongs to one configuration.
        out: folder of the run: `config.json`, `log.jsonl` (losses and validation), `state.pt`, `model/`.
        tokenizer: fast, with the bundled chat template; saved beside the weights. By default the bundled one.
        device: as torch names it.
        dtype: of the computation; weights are float32 while they are trained and saved in bfloat16.
        seconds: stop with a checkpoint after so long; calling again goes on.
        validation: threads per family in a validation; 0: none.
        validate_every: steps between validations.
        progress: called with steps done and steps in all.

    Returns:
        Steps done; `config.steps` when finished.

    Raises:
        CheckpointError: the folder belongs to another configuration, or its state is damaged.
        DeviceError: torch does not know the device, or it is not there.
    """
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(CORPUS_TOKENIZER_DIR, local_files_only=True)
    encoder = RowEncoder(tokenizer)
    model = new_model(
        config, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as builds of torch without CUDA raise them
        raise DeviceError(f"expected a device that torch can use here (cpu, cuda), got {device!r}: {error}") from error
    folder = RunFolder(out, config.to_json())

    def validate(step: int) -> dict[str, Any]:
        common: dict[str, Any] = {
            "length": 300, "seed": 7 * 10**8, "n": validation, "dtype": dtype, "families": config.families,
        }  # fmt: skip
        return {
            "clean": probe_accuracy(model, encoder, hidden=False, **common),
            "notes": probe_accuracy(model, encoder, hidden=True, **common),
        }

    done = train(
        list(model.parameters()),
        lambda step: batches(config, encoder, start=step),
        lambda batch: loss_of(model, batch, text_weight=config.text_weight, dtype=dtype),
        LoopConfig(
            steps=config.steps, learning_rate=config.learning_rate, warmup=config.warmup,
            weight_decay=config.weight_decay,
        ),
        folder,
        state=model.state_dict,
        restore=model.load_state_dict,
        validate=validate if validation else None,
        validate_every=validate_every,
        seconds=seconds,
        progress=progress,
    )  # fmt: skip
    if done == config.steps:
        model.to(torch.bfloat16).save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    return done
