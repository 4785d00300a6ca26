"""The learned eraser inside the runtime: steering states written into the slots of SGLang's pool.

`kv_map` rewrites the cached KV of a span; `blind` and `suffix_aware` run the span's tokens through the served model
with low-rank adapters that forward hooks add to SGLang's fused linear layers. Both write what the embedded engine
writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from kv_retract.cache.rope import Rotary
from kv_retract.engine.working import fingerprint_of_tensors
from kv_retract.erasers.kveraser.eraser import KVEraserEraser
from kv_retract.erasers.kveraser.model import load_net
from kv_retract.errors import EraserMismatchError
from kv_retract.types import Interval

from .forward import write_kv

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "o_proj": ("o_proj",),
    "down_proj": ("down_proj",),
}
"""SGLang's linear layers, and what they are in transformers."""


class Steering:
    """A learned eraser on a served model.

    Args:
        folder: of the eraser.
        runner: `ModelRunner` of SGLang.
        model_path: directory of the served model's weights.

    Raises:
        EraserMismatchError: there is no eraser in the folder, it belongs to another model, or the served model has
            layers that it cannot act on.
    """

    def __init__(self, folder: str, runner: Any, model_path: str) -> None:
        eraser = KVEraserEraser(path=folder)
        eraser.config.check_base(fingerprint_of_files(model_path))
        self.eraser_id, self.suffix_free, self.variant = eraser.eraser_id, eraser.suffix_free, eraser.variant
        self._runner, self._net = runner, load_net(Path(folder), str(runner.device))
        self._rotary = _rotary_of(runner.model)
        if self.variant != "kv_map":
            self._layers = _layers_of(runner.model, set(self._net.a))

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
        if self.variant == "kv_map":
            self._map(torch.cat([torch.arange(start, end) for start, end in spans]), slots, staged)
            return {"tokens_recomputed": 0, "tokens_moved": count}
        outside = torch.ones(len(slots), dtype=torch.bool)
        for start, end in spans:
            outside[start:end] = False
        with self._attached():
            for number, (start, end) in enumerate(spans):
                seen = torch.arange(len(slots)) < start
                if self.variant == "suffix_aware":
                    seen = outside.clone()
                    for a, b in spans[:number]:
                        seen[a:b] = True
                write_kv(self._runner, ids[start:end], range(start, end), staged[seen], staged[start:end])
        return {"tokens_recomputed": count, "tokens_moved": 0}

    def _map(self, index: torch.Tensor, slots: torch.Tensor, staged: torch.Tensor) -> None:
        pool = self._runner.token_to_kv_pool
        old, new = slots[index], staged[index]
        k, v = (torch.stack([layer[old] for layer in buffer]) for buffer in (pool.k_buffer, pool.v_buffer))
        k, v = self._net.steer(k, v, index.to(k.device), self._rotary)
        for buffer, states in ((pool.k_buffer, k), (pool.v_buffer, v)):
            for layer, part in zip(buffer, states, strict=True):
                layer[new] = part.to(layer.dtype)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Switch the adapters on; whatever happens inside, they are off afterwards."""
        handles = []
        try:
            embedding = self._runner.model.get_input_embeddings()
            handles.append(embedding.register_forward_hook(lambda _m, _i, out: out + self._net.offset.to(out.dtype)))
            for module, names in self._layers.items():
                handles.append(module.register_forward_hook(self._hook(names)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, names: Sequence[str]) -> Any:
        pairs = [(self._net.a[name], self._net.b[name]) for name in names]

        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            x = inputs[0]
            parts = [linear(linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in pairs]
            whole, *rest = output if isinstance(output, tuple) else (output,)
            whole = whole + self._net.config.scale * torch.cat(parts, dim=-1)
            return (whole, *rest) if isinstance(output, tuple) else whole

        return hook


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


def _rotary_of(model: Any) -> Rotary:
    """Return how a served model rotates its keys."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    rotary = model.model.layers[0].self_attn.rotary_emb
    if type(rotary) is not RotaryEmbedding:
        raise EraserMismatchError(f"expected plain rotary embeddings, got {type(rotary).__name__}: not supported yet")
    inv_freq: torch.Tensor = 1.0 / (
        rotary.base ** (torch.arange(0, rotary.rotary_dim, 2, dtype=torch.float32) / rotary.rotary_dim)
    )
    return Rotary(inv_freq, interleaved=not rotary.is_neox_style)


def _layers_of(model: Any, wanted: set[str]) -> dict[torch.nn.Module, tuple[str, ...]]:
    """Return SGLang's linear layers, each with the names of the adapters that act on it.

    Raises:
        EraserMismatchError: some adapter has no layer.
    """
    found: dict[torch.nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        parent, _, last = name.replace(".", "/").rpartition("/")
        names = tuple(f"{parent}/{part}" for part in _FUSED.get(last, ()))
        if names and wanted.issuperset(names):
            found[module] = names
    if missing := sorted(wanted - {name for names in found.values() for name in names}):
        raise EraserMismatchError(
            f"the served model has no layer for the eraser's {missing[0]!r} and {len(missing)} more"
        )
    return found
