"""The bundled chat model: how it begins, its loss, and its run. Start with `config.py`; `trainer.py` runs the loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from ..engine.models import check_device
from ..reference import MODEL_DIR
from .batches import Batch, batches, collate
from .checkpoint import RunFolder
from .config import ReferenceConfig, steps_of
from .corpus import generate, training_families
from .encoding import RowEncoder
from .families import FAMILIES
from .names import Split
from .texts import check_texts
from .trainer import LoopConfig, train
from .wiring import wire_induction


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


def loss_of(
    model: Any, batch: Batch, *, dtype: torch.dtype, decoder: Any = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of a batch and its parts: cross entropy of answers and text, share of right answer tokens.

    What a batch has no tokens of is not among the parts.

    Args:
        model: a `Qwen3ForCausalLM`.
        batch: rows.
        dtype: of the computation.
        decoder: `model.model` as `torch.compile` returns it; None: as it is.
    """
    device = next(model.parameters()).device
    mask = batch.mask(dtype, device)
    ids = batch.ids.to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = (model.model if decoder is None else decoder)(
            ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        total = hidden.sum() * 0.0  # for a batch that has nothing to predict
        parts: dict[str, float] = {}
        for name, chosen, weight in (("answer", batch.answer, 1.0), ("text", batch.text, batch.text_weight)):
            at = chosen.to(device).nonzero(as_tuple=True)
            if not len(at[0]):
                continue
            logits = model.lm_head(hidden[at[0], at[1] - 1]).float()
            target = ids[at]
            loss = cross_entropy(logits, target)
            total = total + weight * loss
            parts[name] = float(loss.detach())
            if name == "answer":
                parts["right"] = float((logits.argmax(-1) == target).float().mean())
    return total, parts


@torch.inference_mode()
def probe_accuracy(
    model: Any,
    encoder: RowEncoder,
    *,
    length: int,
    seed: int,
    n: int,
    dtype: torch.dtype,
    hidden: bool = False,
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
        dtype: of the computation.
        hidden: ask only what a span decides that is mentioned later, and hide that span: can the model answer from
            notes?
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
            batch = collate([row], random.Random(0), text_share=0.0, text_weight=0.0)
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
    texts: Sequence[str] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
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
        texts: real text, of which some of the rows are pieces; a run goes on with the same texts only.
        device: as torch names it.
        dtype: of the computation; weights are float32 while they are trained and saved in bfloat16.
        compiled: use `torch.compile`, which needs a C++ compiler: slow to begin, then faster.
        seconds: stop with a checkpoint after so long; calling again goes on.
        validation: threads per family in a validation; 0: none.
        validate_every: steps between validations.
        progress: called with steps done and steps in all.

    Returns:
        Steps done; `config.steps` when finished.

    Raises:
        CheckpointError: the folder belongs to another configuration, or its state is damaged.
        TextError: the configuration was used with other texts.
        DeviceError: torch does not know the device, or it is not there.
    """
    check_device(device)
    config = replace(config, text_digest=check_texts(texts, config.text_digest))
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    encoder = RowEncoder(tokenizer)
    pieces = [encoder.ids(text) for text in texts]
    model = new_model(
        config, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(device)
    folder = RunFolder(out, config.to_json())
    decoder = torch.compile(model.model, dynamic=True) if compiled else None  # lengths differ from batch to batch
    accuracy = partial(
        probe_accuracy, model, encoder, length=300, seed=7 * 10**8, n=validation, dtype=dtype, families=config.families
    )

    def validate(step: int) -> dict[str, Any]:
        test = accuracy(split="test", families=config.families or FAMILIES.names())
        return {"clean": accuracy(), "notes": accuracy(hidden=True), "test": test}

    done = train(
        list(model.parameters()),
        lambda step: batches(config, encoder, texts=pieces, start=step),
        lambda batch: loss_of(model, batch, dtype=dtype, decoder=decoder),
        LoopConfig(
            steps=config.steps, learning_rate=config.learning_rate, warmup=config.warmup,
            restarts=steps_of(config.restarts, config.steps),
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
