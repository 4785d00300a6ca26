"""The learned eraser inside the runtime: steering states written into the slots of SGLang's pool.

`kv_map` rewrites the cached KV of a span; `blind` and `suffix_aware` run the span's tokens through the served model
with low-rank adapters (`adapters`). Both write what the embedded engine writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kv_retract.engine.working import fingerprint_of_tensors
from kv_retract.erasers.kveraser.eraser import KVEraserEraser
from kv_retract.erasers.kveraser.model import load_net
from kv_retract.errors import EraserMismatchError, UnsupportedError
from kv_retract.kernels.rope import Rotary
from kv_retract.types import Interval

from .adapters import ADAPTERS, Adapters
from .forward import write_kv
from .pool import KVPool


class Steering:
    """A learned eraser on a served model.

    Args:
        folder: of the eraser.
        runner: `ModelRunner` of SGLang.
        kv: its pool.
        model_path: directory of the served model's weights.
        adapters: one of `ADAPTERS`: how adapters are switched on.

    Raises:
        EraserMismatchError: there is no eraser in the folder, it belongs to another model, or the served model has
            layers that it cannot act on.
        UnsupportedError: the server does not run such adapters, or the eraser has none.
    """

    def __init__(self, folder: str, runner: Any, kv: KVPool, model_path: str, adapters: str) -> None:
        eraser = KVEraserEraser(path=folder)
        eraser.config.check_base(fingerprint_of_files(model_path))
        self.eraser_id, self.suffix_free, self.variant = eraser.eraser_id, eraser.suffix_free, eraser.variant
        self._runner, self._kv, self._net = runner, kv, load_net(Path(folder), str(runner.device))
        self._rotary = _rotary_of(runner.model, runner.device)
        self._adapters: Adapters | None = None
        if self.variant != "kv_map":
            self._adapters = ADAPTERS[adapters](self._net, runner)
        elif adapters != "hooks":
            raise UnsupportedError(f"the eraser kv_map has no adapters, so adapters={adapters!r} has no meaning for it")
        else:  # once on the padding slot, so that nothing is compiled while requests wait
            slot = torch.zeros(1, dtype=torch.int64, device=kv.paged.device)
            kv.map(slot, slot, slot, self._net.weights, self._rotary)

    def write(
        self, ids: Sequence[int], spans: Sequence[Interval], slots: torch.Tensor, staged: torch.Tensor
    ) -> dict[str, int]:
        """Write the steering states of spans.

        Args:
            ids: the thread, spans in place; only those of the spans are read.
            spans: intervals of it.
            slots: of the whole cached thread as it is. Shape: (num_cached,)
            staged: the same with new slots in the spans, which are written. Shape: (num_cached,)

        Returns:
            `tokens_recomputed` and `tokens_moved`, as `types.EraseResult` has them.
        """
        count = sum(end - start for start, end in spans)
        if self._adapters is None:
            index = torch.cat([torch.arange(start, end, device=slots.device) for start, end in spans])
            self._kv.map(slots[index], staged[index], index, self._net.weights, self._rotary)
            return {"tokens_recomputed": 0, "tokens_moved": count}
        outside = torch.ones(len(slots), dtype=torch.bool)
        for start, end in spans:
            outside[start:end] = False
        with self._kv.in_line(), self._adapters.attached():
            for number, (start, end) in enumerate(spans):
                seen = torch.arange(len(slots)) < start
                if self.variant == "suffix_aware":
                    seen = outside.clone()
                    for a, b in spans[:number]:
                        seen[a:b] = True
                write_kv(
                    self._runner, ids[start:end], range(start, end), staged[seen], staged[start:end],
                    lora_id=self._adapters.lora_id,
                )  # fmt: skip
        return {"tokens_recomputed": count, "tokens_moved": 0}


def fingerprint_of_files(model_path: str) -> str:
    """Return what `engine.working.fingerprint_of` says of the model in a directory, without building it."""
    from safetensors import safe_open

    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    where = {}
    for file in sorted(Path(model_path).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in shapes.state_dict():
            stored = name if name in where else "model.embed_tokens.weight" if name == "lm_head.weight" else name
            if stored not in where:
                raise EraserMismatchError(
                    f"expected the weight {name!r} in {model_path!r}, found none; is it complete?"
                )
            with safe_open(where[stored], "pt") as opened:
                yield name, opened.get_tensor(stored)

    return fingerprint_of_tensors(tensors())


def _rotary_of(model: Any, device: Any) -> Rotary:
    """Return how a served model rotates its keys."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    rotary = model.model.layers[0].self_attn.rotary_emb
    if type(rotary) is not RotaryEmbedding:
        raise EraserMismatchError(f"expected plain rotary embeddings, got {type(rotary).__name__}: not supported yet")
    inv_freq: torch.Tensor = 1.0 / (
        rotary.base ** (torch.arange(0, rotary.rotary_dim, 2, dtype=torch.float32) / rotary.rotary_dim)
    )
    return Rotary(inv_freq.to(device), interleaved=not rotary.is_neox_style)
