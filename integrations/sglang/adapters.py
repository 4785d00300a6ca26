"""Low-rank adapters of an eraser on a served model: on for one pass over a span, off for everything else.

Two ways, chosen when the server starts. `hooks`: forward hooks on SGLang's fused linear layers; works on any server
that runs its passes as they are. `lora`: SGLang's own LoRA layers and kernels, which run the eraser as an adapter that
no request names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from kv_retract.erasers.kveraser.model import AdapterNet
from kv_retract.errors import EraserMismatchError, UnsupportedError

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "o_proj": ("o_proj",),
    "down_proj": ("down_proj",),
}
"""SGLang's linear layers, and what they are in transformers."""


class Adapters:
    """Adapters of an eraser, and its offset on the embeddings.

    Args:
        net: of the eraser.
        runner: `ModelRunner` of SGLang.

    Raises:
        EraserMismatchError: the served model has layers that they cannot act on.
        UnsupportedError: the server does not run them.
    """

    lora_id: str | None = None
    """What SGLang calls them in a batch; None: nothing."""

    def __init__(self, net: AdapterNet, runner: Any) -> None:
        self._net, self._runner = net, runner

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Switch them on; whatever happens inside, they are off afterwards."""
        handles: list[Any] = []
        try:
            embedding = self._runner.model.get_input_embeddings()
            handles.append(embedding.register_forward_hook(lambda _m, _i, out: out + self._net.offset.to(out.dtype)))
            self._attach(handles)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, handles: list[Any]) -> None:
        """Add hooks that are removed at the end."""


class HookAdapters(Adapters):
    """By forward hooks."""

    def __init__(self, net: AdapterNet, runner: Any) -> None:
        super().__init__(net, runner)
        if runner.lora_manager is not None:
            raise UnsupportedError(
                "the server runs with --enable-lora, whose layers the eraser's hooks do not find: start it with "
                "--adapters lora, or without --enable-lora"
            )
        self._layers = _layers_of(runner.model, set(net.a))

    def _attach(self, handles: list[Any]) -> None:
        handles += [module.register_forward_hook(self._hook(names)) for module, names in self._layers.items()]

    def _hook(self, names: Sequence[str]) -> Any:
        pairs = [(self._net.a[name], self._net.b[name]) for name in names]

        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            x = inputs[0]
            parts = [linear(linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in pairs]
            whole, *rest = output if isinstance(output, tuple) else (output,)
            whole = whole + self._net.config.scale * torch.cat(parts, dim=-1)
            return (whole, *rest) if isinstance(output, tuple) else whole

        return hook


class LoRAAdapters(Adapters):
    """By SGLang's own LoRA; the embedding's offset, which LoRA has no place for, stays a hook."""

    def __init__(self, net: AdapterNet, runner: Any) -> None:
        from sglang.srt.lora.lora_registry import LoRARef

        super().__init__(net, runner)
        manager = runner.lora_manager
        if manager is None:
            raise UnsupportedError("adapters='lora' needs a server with --enable-lora; kv-retract serve sets it")
        reference = LoRARef(lora_name=_NAME, lora_path=_NAME, pinned=False)
        config = {
            "peft_type": "LORA", "r": net.config.rank, "lora_alpha": net.config.scale * net.config.rank,
            "target_modules": sorted({name.rpartition("/")[2] for name in net.a}),
        }  # fmt: skip
        told = runner.load_lora_adapter_from_tensors(reference, dict(_peft_weights(net)), config)
        if not told.success:
            raise UnsupportedError(f"SGLang does not load the eraser as a LoRA adapter: {told.error_message}")
        self.lora_id = reference.lora_id


ADAPTERS: Mapping[str, type[Adapters]] = {"hooks": HookAdapters, "lora": LoRAAdapters}
"""By what a server calls them."""

_NAME = "kv_retract"


def _peft_weights(net: AdapterNet) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights under the names that PEFT gives them."""
    for side, weights in (("lora_A", net.a), ("lora_B", net.b)):
        for name, weight in weights.items():
            yield f"base_model.model.{name.replace('/', '.')}.{side}.weight", weight.detach()


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
