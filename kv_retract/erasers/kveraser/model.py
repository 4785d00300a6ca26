"""The networks of the learned eraser: what turns an erased span into steering states. Needs torch.

Their parameters are float32; what they compute follows the dtype of the model.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from ...errors import EraserMismatchError
from ...hooks import in_this_thread
from ...kernels import HeadMap
from ...kernels.reference import map_rotated, map_states
from ...kernels.rope import Rotary
from .config import CONFIG, WEIGHTS, KVEraserConfig, read_eraser_config


class SteeringNet(nn.Module):
    """What is trained of an eraser."""

    def __init__(self, config: KVEraserConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    @abstractmethod
    def for_model(cls, model: Any, config: KVEraserConfig) -> SteeringNet:
        """Return a fresh net for a transformers model: one that changes nothing of a span's encoding yet."""

    @classmethod
    @abstractmethod
    def of_shapes(cls, config: KVEraserConfig, weights: dict[str, torch.Tensor]) -> SteeringNet:
        """Return a net that takes the weights of a saved one."""

    def save(self, folder: Path) -> None:
        """Write `config.json` and `eraser.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config.to_json(), indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)


class AdapterNet(SteeringNet):
    """Low-rank adapters on every linear layer of the decoder, and an offset on the embeddings; for spans' tokens only.

    With `y = W x` of a frozen layer, a span's token gets `y + scale * B A x` (LoRA, arXiv 2106.09685). B and the offset
    begin at zero.

    Args:
        config: variant `blind` or `suffix_aware`.
        layers: name of each linear layer (`/` for `.`) to its sizes, `(in_features, out_features)`.
        width: of the embeddings.
    """

    def __init__(self, config: KVEraserConfig, layers: dict[str, tuple[int, int]], width: int) -> None:
        super().__init__(config)
        self.offset = nn.Parameter(torch.zeros(width))
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, (inputs, outputs) in layers.items():
            self.a[name] = nn.Parameter(torch.randn(config.rank, inputs) * inputs**-0.5)
            self.b[name] = nn.Parameter(torch.zeros(outputs, config.rank))

    @classmethod
    def for_model(cls, model: Any, config: KVEraserConfig) -> AdapterNet:
        """Return fresh adapters for a model."""
        layers = {key: (module.in_features, module.out_features) for key, module in _linear_layers(model).items()}
        return cls(config, layers, model.get_input_embeddings().weight.shape[1])

    @classmethod
    def of_shapes(cls, config: KVEraserConfig, weights: dict[str, torch.Tensor]) -> AdapterNet:
        """Return adapters that take the weights of saved ones."""
        names = [name.removeprefix("a.") for name in weights if name.startswith("a.")]
        layers = {name: (weights[f"a.{name}"].shape[1], weights[f"b.{name}"].shape[0]) for name in names}
        return cls(config, layers, len(weights["offset"]))

    @contextmanager
    def attached(self, model: Any, gate: torch.Tensor | None = None) -> Iterator[None]:
        """Switch the adapters on in a model; whatever happens inside, they are off afterwards.

        They act in the Python thread that switched them on only: another engine may run the same model meanwhile.

        Args:
            model: whose forward passes are changed by hooks; its weights are not touched.
            gate: which tokens are a span's. None: all that run. Shape: (batch, num_tokens), bool
        """
        handles = [model.get_input_embeddings().register_forward_hook(in_this_thread(self._offset_hook(gate)))]
        try:
            for key, module in _linear_layers(model).items():
                handles.append(module.register_forward_hook(in_this_thread(self._layer_hook(key, gate))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _offset_hook(self, gate: torch.Tensor | None) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + _gated(self.offset.to(output.dtype).expand_as(output), gate)

        return hook

    def _layer_hook(self, key: str, gate: torch.Tensor | None) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            low = _gated(linear(x, self.a[key].to(x.dtype)), gate)
            return output + self.config.scale * linear(low, self.b[key].to(x.dtype))

        return hook


class MapNet(SteeringNet):
    """A map on the cached KV of a span, per layer and KV head, on keys without rotation: no forward pass.

    See `HeadMap` for what is computed. W2 and b2 begin at zero.

    Args:
        config: variant `kv_map`.
        num_heads: KV heads of all layers together.
        head_dim: of the model.
    """

    def __init__(self, config: KVEraserConfig, num_heads: int, head_dim: int) -> None:
        super().__init__(config)
        heads, size = num_heads, 2 * head_dim
        self.w1 = nn.Parameter(torch.randn(heads, size, config.hidden) * size**-0.5)
        self.b1 = nn.Parameter(torch.zeros(heads, 1, config.hidden))
        self.w2 = nn.Parameter(torch.zeros(heads, config.hidden, size))
        self.b2 = nn.Parameter(torch.zeros(heads, 1, size))

    @classmethod
    def for_model(cls, model: Any, config: KVEraserConfig) -> MapNet:
        """Return a fresh map for a model: it returns what it is given."""
        shape = model.config
        heads = shape.num_attention_heads
        kv_heads = getattr(shape, "num_key_value_heads", None) or heads
        return cls(
            config, shape.num_hidden_layers * kv_heads, getattr(shape, "head_dim", None) or shape.hidden_size // heads
        )

    @classmethod
    def of_shapes(cls, config: KVEraserConfig, weights: dict[str, torch.Tensor]) -> MapNet:
        """Return a map that takes the weights of a saved one."""
        heads, size, _ = weights["w1"].shape
        return cls(config, heads, size // 2)

    @torch.no_grad()
    def take_over(self, narrower: MapNet) -> None:
        """Make a fresh map compute what another one does, which has fewer hidden units; the others stay as they are.

        Args:
            narrower: of the same model.
        """
        units = narrower.config.hidden
        self.w1[..., :units], self.b1[..., :units] = narrower.w1, narrower.b1
        self.w2[:, :units], self.b2[:] = narrower.w2, narrower.b2

    @property
    def weights(self) -> HeadMap:
        """As kernels take them."""
        return HeadMap(self.w1, self.b1, self.w2, self.b2)

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return steering states for cached states.

        Args:
            k: keys without rotation. Shape: (num_layers, num_tokens, num_kv_heads, head_dim)
            v: values, shape as `k`.

        Returns:
            Keys without rotation, and values; shapes and dtype as given.
        """
        return map_states(k, v, self.weights)

    def steer(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return steering states for keys that are rotated for their positions.

        Args:
            k: as in `forward`, but rotated.
            v: as in `forward`.
            positions: of the tokens. Shape: (num_tokens,)
            rotary: of the model.

        Returns:
            Rotated keys, and values.
        """
        return map_rotated(k, v, positions, self.weights, rotary)


NETS: dict[str, type[SteeringNet]] = {"blind": AdapterNet, "suffix_aware": AdapterNet, "kv_map": MapNet}
"""By variant."""


def new_net(model: Any, config: KVEraserConfig) -> Any:
    """Return a fresh net of a variant for a model."""
    return NETS[config.variant].for_model(model, config)


def load_net(folder: Path, device: str = "cpu") -> Any:
    """Load what `SteeringNet.save` wrote.

    Raises:
        EraserMismatchError: there is no eraser in the folder, or it is damaged.
    """
    config = read_eraser_config(folder)
    try:
        weights = load_file(folder / WEIGHTS)
        net = NETS[config.variant].of_shapes(config, weights)
        net.load_state_dict(weights)
    except (OSError, LookupError, ValueError, RuntimeError, SafetensorError) as error:
        raise EraserMismatchError(f"cannot read the weights in {str(folder / WEIGHTS)!r}: {error}") from error
    return net.to(device).requires_grad_(False)


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder by name, `/` for `.`, the output layer left out."""
    output = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output}
    return {name.replace(".", "/"): module for name, module in linear.items()}  # names of parameters have no dots


def _gated(x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x if gate is None else torch.where(gate[..., None], x, torch.zeros_like(x))
