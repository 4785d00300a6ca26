"""Trained landmarks: an embedding and projections of their own beside the frozen ones of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from ..cache.refill import Look, Pooling
from ..errors import LandmarkMismatchError, UnsupportedModelError
from ..hooks import in_this_thread
from .base import Landmarks
from .config import WEIGHTS, LandmarkConfig, read_landmark_config

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, eq=False, kw_only=True)
class LearntPooling(Pooling):
    """How well landmarks match what is looked for, wherever they stand: a late interaction (arXiv 2004.12832).

    Queries and keys are taken without their rotation, queries through a map of each head, keys less what all landmarks
    have in common. Of the newest tokens the best match counts; heads and layers are summed with weights. Shares of
    attention would not do: they say that some head looks there, not that all do, and positions blur them.
    """

    maps: torch.Tensor
    """Of each head, applied to its queries. Shape: (num_layers, num_heads, head_dim, head_dim)"""
    weights: torch.Tensor
    """Of each head. Shape: (num_layers, num_heads)"""
    together: bool = True

    def scores(self, layer: int, look: Look) -> torch.Tensor:
        """Sum the best matches of the heads of a layer."""
        return self.weights[layer].float() @ look.matches(self.maps[layer]).amax(1)


class LandmarkNet(nn.Module, Landmarks):
    """One embedding for all landmarks, and their own query, key and value projections in every layer (ACRE, 3.2).

    Beyond the paper it has what chooses tokens: a map for the queries of each attention head, and its weight (see
    `LearntPooling`). A fresh net has copies of the model's projections, the mean of its embeddings, equal weights, and
    maps that change nothing.

    Args:
        projections: name of each projection (`/` for `.`) to its sizes, `(out_features, in_features, has_bias)`.
        width: of the embeddings.
        heads: `(num_layers, num_heads, head_dim)`.

    Attributes:
        attended: as in `LandmarkConfig`; may be set until they are used.
    """

    are_tokens: ClassVar[bool] = True

    def __init__(self, projections: dict[str, tuple[int, int, bool]], width: int, heads: tuple[int, int, int]) -> None:
        super().__init__()
        self.attended = True
        self.embedding = nn.Parameter(torch.zeros(width))
        num_layers, num_heads, head_dim = heads
        self.heads = nn.Parameter(torch.full((num_layers, num_heads), 1 / num_heads))
        self.maps = nn.Parameter(torch.eye(head_dim).repeat(num_layers, num_heads, 1, 1))
        self.weight, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for name, (outputs, inputs, has_bias) in projections.items():
            self.weight[name] = nn.Parameter(torch.zeros(outputs, inputs))
            if has_bias:
                self.bias[name] = nn.Parameter(torch.zeros(outputs))

    @classmethod
    def for_model(cls, model: Any) -> LandmarkNet:
        """Return a fresh net for a model.

        Raises:
            UnsupportedModelError: a layer's attention has no projections called `q_proj`, `k_proj` and `v_proj`.
        """
        layers = projections_of(model)
        embeddings = model.get_input_embeddings().weight
        shapes = {name: (m.out_features, m.in_features, m.bias is not None) for name, m in layers.items()}
        num_layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        head_dim = next(m.out_features for name, m in layers.items() if name.endswith("q_proj")) // heads
        net = cls(shapes, embeddings.shape[1], (num_layers, heads, head_dim))
        with torch.no_grad():
            net.embedding.copy_(embeddings.float().mean(0))
            for name, layer in layers.items():
                net.weight[name].copy_(layer.weight.float())
                if layer.bias is not None:
                    net.bias[name].copy_(layer.bias.float())
        return net

    @classmethod
    def load(cls, folder: Path, model: Any, fingerprint: str) -> LandmarkNet:
        """Load what `save` wrote, for a model of a fingerprint, frozen and on its device.

        Raises:
            LandmarkMismatchError: there is nothing in the folder, it is damaged, or it belongs to another model.
            UnsupportedModelError: as `for_model`.
        """
        config = read_landmark_config(folder)
        config.check_base(fingerprint)
        net = cls.for_model(model)
        net.attended = config.attended
        try:
            net.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
        except (OSError, RuntimeError, SafetensorError) as error:
            raise LandmarkMismatchError(f"cannot read the weights in {str(folder / WEIGHTS)!r}: {error}") from error
        return net.to(model.device).requires_grad_(False)

    def save(self, folder: Path, *, fingerprint: str, base: str) -> None:
        """Write `config.json` and `landmarks.safetensors`; arguments as fields of `LandmarkConfig`."""
        LandmarkConfig(fingerprint=fingerprint, base=base, attended=self.attended).save(folder)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)

    @property
    def identity(self) -> str:
        """A digest of the weights, and of how they are used."""
        digest = sha256(str(self.attended).encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return f"trained {digest.hexdigest()[:16]}"

    @property
    def pooling(self) -> LearntPooling:
        """By its own maps and weights."""
        return LearntPooling(maps=self.maps, weights=self.heads)

    @contextmanager
    def attached(self, model: Any, gate: torch.Tensor) -> Iterator[None]:
        """Switch the landmarks' own embedding and projections on, for the tokens of the gate."""
        projections = projections_of(model)
        if projections.keys() != self.weight.keys():
            raise LandmarkMismatchError(
                f"expected a model with the {len(self.weight)} projections that these landmarks were made for, got one "
                f"with {len(projections)}; load landmarks of this model"
            )
        handles = [model.get_input_embeddings().register_forward_hook(in_this_thread(self._embedding_hook(gate)))]
        try:
            for name, module in projections.items():
                handles.append(module.register_forward_hook(in_this_thread(self._projection_hook(name, gate))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def states(self, k: torch.Tensor, v: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the landmarks' own."""
        num_tokens = k.shape[1] - len(sizes)
        return k[:, num_tokens:], v[:, num_tokens:]

    def _embedding_hook(self, gate: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return torch.where(gate[..., None], self.embedding.to(output.dtype), output)

        return hook

    def _projection_hook(self, name: str, gate: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0][gate]
            bias = self.bias[name].to(x.dtype) if name in self.bias else None
            return output.masked_scatter(gate[..., None], linear(x, self.weight[name].to(x.dtype), bias))

        return hook


def projections_of(model: Any) -> dict[str, nn.Linear]:
    """Return the query, key and value projections of all layers by name, `/` for `.`.

    Without the last query projection: what landmarks attend to in the last layer is read by nothing.

    Raises:
        UnsupportedModelError: they are not called so, or not three for each layer.
    """
    found = {
        name.replace(".", "/"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in _PROJECTIONS
    }
    if len(found) != len(_PROJECTIONS) * model.config.num_hidden_layers:
        raise UnsupportedModelError(
            f"expected {', '.join(_PROJECTIONS)} in each of {model.config.num_hidden_layers} layers, found "
            f"{len(found)} such projections; landmarks are trained for models that have them apart (Llama, Qwen, "
            "Mistral); use pooled landmarks with this one"
        )
    del found[[name for name in found if name.endswith(_PROJECTIONS[0])][-1]]
    return found
