"""Models by name or directory for the embedded engine. Nothing is ever downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config
from transformers.utils import logging as hf_logging

from ..errors import DeviceError, UnknownNameError, UnsupportedModelError
from ..reference import MODEL_DIR, TOKENIZER_DIR
from ..registry import Registry

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RANDOM_NOTE = "seeded random weights: quality figures mean nothing"
_REFERENCE_NOTE = "a small model trained on the bundled corpus: quality figures hold for such threads only"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model with its tokenizer, in evaluation mode on its device."""

    model: PreTrainedModel
    tokenizer: Any
    """A fast transformers tokenizer with a chat template."""
    name: str
    """Stable name for logs and results: the registered name, or that of the directory."""
    is_random: bool
    """The weights were drawn, not trained: timings mean something, answers do not."""

    quality_note: str = ""
    """What every report of this model's answers must say."""


MODELS: Registry[LoadedModel] = Registry("model", "kv_retract.models")
"""Factories that take `device`, `dtype` and `seed`. A distribution adds its own through the entry-point group."""


def load_model(name_or_path: str, *, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Load a model that is registered or lies in a local directory.

    Args:
        name_or_path: one of `MODELS.names()`, or a directory in the format of transformers (model and tokenizer).
        device: as torch names it: `cpu`, `cuda`, `cuda:1`.
        dtype: `float32` or `bfloat16`.
        seed: of the weights of random models; others ignore it.

    Raises:
        UnknownNameError: neither a registered name nor a directory.
        UnsupportedModelError: the directory's files are no complete causal language model that transformers can
            load, or its tokenizer is not a fast one with a chat template.
        DeviceError: torch does not know the device, or it is not there.
        ValueError: the dtype is not supported.
    """
    check_device(device)
    dtype_of(dtype)
    if name_or_path in MODELS.names():
        return MODELS.create(name_or_path, device=device, dtype=dtype, seed=seed)
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        raise UnknownNameError(
            f"expected a registered model ({', '.join(MODELS.names())}) or a directory, got {name_or_path!r}; nothing "
            "is downloaded: fetch the model first (`hf download NAME --local-dir DIR`) and pass the directory"
        )
    return _load_directory(path, device, dtype)


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that is called so; raises ValueError where it is not supported."""
    if name not in _DTYPES:
        raise ValueError(f"expected dtype float32 or bfloat16, got {name!r}; quantised weights cannot be edited")
    return _DTYPES[name]


def check_device(device: str) -> None:
    """Raise DeviceError where torch does not know a device, or cannot use it here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as builds of torch without CUDA raise them
        raise DeviceError(
            f"expected a device that torch can use here (cpu, cuda, cuda:1), got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _load_directory(path: Path, device: str, dtype: str) -> LoadedModel:
    options: dict[str, Any] = {"attn_implementation": "sdpa", "local_files_only": True, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=_DTYPES[dtype], **options)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # transformers raises RuntimeError for weights of another shape than the configuration says.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"expected a causal language model with its tokenizer in directory {str(path)!r}: {error}; pass a "
            "directory that save_pretrained or `hf download` wrote"
        ) from error
    model, loading = loaded
    if loading["missing_keys"]:
        # transformers would draw them at random and only log it.
        names = sorted(loading["missing_keys"])
        raise UnsupportedModelError(
            f"expected all weights in directory {str(path)!r}, but {len(names)} are missing, first {names[0]!r}; fetch "
            "the checkpoint again, or pass a model made for generation"
        )
    if not getattr(tokenizer, "is_fast", False) or not tokenizer.chat_template:
        raise UnsupportedModelError(
            f"the tokenizer in {str(path)!r} must be a fast one with a chat template; pass a chat model's directory, "
            "or add tokenizer.json and chat_template.jinja to it"
        )
    return LoadedModel(model.to(device).eval(), tokenizer, path.resolve().name, is_random=False)


def load_reference_tokenizer() -> Any:
    """Return the byte-level BPE tokenizer of the random models: 4096 entries, ChatML turns, Hermes tool calls."""
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR, local_files_only=True)


@MODELS.register("reference")
def reference_model(*, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Load the bundled model, the default: trained on the corpus of retractable traces (kv_retract/reference/model)."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # a bar for milliseconds
    try:
        loaded = _load_directory(MODEL_DIR, device, dtype)
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    return replace(loaded, name="reference", quality_note=_REFERENCE_NOTE)


@MODELS.register("random")
def random_model(*, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Draw a model: 4 layers, 128 wide, 1.3 M random parameters, the same for the same seed."""
    return _random("random", 128, device, dtype, seed)


@MODELS.register("random-256")
def random_model_256(*, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Draw a wider random model for timings: 4 layers, 256 wide, 4.2 M parameters."""
    return _random("random-256", 256, device, dtype, seed)


@MODELS.register("random-200m")
def random_model_200m(*, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Draw a large random model for timings: 16 layers, 1024 wide, 206 M parameters."""
    return _random("random-200m", 1024, device, dtype, seed, num_layers=16, num_heads=16, num_kv_heads=8)


@MODELS.register("random-8b")
def random_model_8b(*, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Draw a random model of Qwen3-8B's shape, 7 B parameters without its vocabulary, for timings on a GPU."""
    # Drawn where it is to lie: as float32 on the host it would need 28 GB.
    return _random(
        "random-8b", 4096, device, dtype, seed, num_layers=36, num_heads=32, num_kv_heads=8,
        max_positions=131_072 + 64, in_place=True,
    )  # fmt: skip


def _random(
    name: str, hidden_size: int, device: str, dtype: str, seed: int, *, num_layers: int = 4, num_heads: int = 4,
    num_kv_heads: int = 2, max_positions: int = 32_768, in_place: bool = False,
) -> LoadedModel:  # fmt: skip
    tokenizer = load_reference_tokenizer()
    shape: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        # The usual 0.02 gives logits so flat that no edit could show. This makes attention pick single tokens, so that
        # what stands hundreds of tokens back moves the next-token distribution.
        initializer_range=1.75 * hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    drawn = (device, _DTYPES[dtype]) if in_place else ("cpu", torch.float32)
    with torch.random.fork_rng(devices=[]), torch.device(drawn[0]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=drawn[1])
    return LoadedModel(
        model.to(device=device, dtype=_DTYPES[dtype]).eval(), tokenizer, name, is_random=True, quality_note=_RANDOM_NOTE
    )
