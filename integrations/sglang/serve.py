"""How an SGLang server with the plugin is started: its command line and environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kv_retract.erasers.kveraser.config import VARIANTS, read_eraser_config
from kv_retract.erasers.kveraser.eraser import SHIPPED
from kv_retract.errors import KVRetractError
from kv_retract.reference import MODEL_DIR

from .config import PluginConfig
from .plugin import NAME

VERSION = "0.5.23"
"""Of SGLang; the plugin takes hold of its scheduler, so another one is refused."""
_CPU: Mapping[str, str | float | bool] = {
    "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", "dtype": "float32",
    "grammar_backend": "none", "cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled",
    "mem_fraction_static": 0.2, "sleep_on_idle": True,
}  # fmt: skip


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What SGLang's LoRA is asked to prepare for an eraser's adapters."""


class ServeError(KVRetractError, RuntimeError):
    """A server cannot be started as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What to serve."""

    model: str = "reference"
    """`reference`, or a directory."""
    eraser: str = ""
    """Folder of a learned eraser of the model, or, for the reference model, a variant. Empty: `kv_map` for the
    reference model, none for others."""
    adapters: str = "hooks"
    """How the adapters of `blind` and `suffix_aware` run: `hooks`, or `lora` (SGLang's own LoRA layers)."""
    ledger: str = ""
    """SQLite file for span retractions; empty: they are lost with the server."""
    host: str = "127.0.0.1"
    port: int = 30000
    max_tokens: int | None = None
    """Size of the KV pool; None: on a GPU as SGLang sees fit, on a CPU 65,536."""
    peers: Sequence[str] = ()
    """URLs of the other replicas."""
    thread_header: str = ""
    """HTTP header that names the thread of an OpenAI request without `extra_key`; empty: none."""
    plain: bool = False
    """Without span retraction: SGLang as it is, for comparisons."""
    extra: Sequence[str] = field(default=())
    """Further arguments of SGLang; they go last and so win."""

    def options(self, *, has_gpu: bool) -> dict[str, Any]:
        """Return what `sglang.Engine` takes, but for `extra`.

        Raises:
            ServeError: the model is no directory.
            EraserMismatchError: there is no eraser where one is named.
        """
        path = MODEL_DIR if self.model == "reference" else Path(self.model).expanduser()
        if not path.is_dir():
            raise ServeError(f"expected 'reference' or a directory of a model, got {self.model!r}")
        found: dict[str, Any] = {"model_path": str(path), "served_model_name": self.model}
        found |= {} if self.plain else {"radix_cache_backend": NAME}
        found |= {} if has_gpu else _CPU
        if tokens := self.max_tokens or (None if has_gpu else 65_536):
            found["max_total_tokens"] = tokens
        if self.adapters == "lora":
            rank = read_eraser_config(Path(self._eraser_folder())).rank
            found |= {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": list(LINEAR_LAYERS)}
            found |= {} if has_gpu else {"lora_backend": "torch_native"}
        return found

    def command(self, *, has_gpu: bool) -> list[str]:
        """Return the command line; raises as `options`."""
        options = {**self.options(has_gpu=has_gpu), "host": self.host, "port": self.port}
        if self.model == "reference":
            options["tool_call_parser"] = "hermes"
        flags = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
        given = [part for flag, value in flags for part in (flag, *_words(value))]
        return [sys.executable, "-m", "sglang.launch_server", *given, *self.extra]

    def environment(self) -> dict[str, str]:
        """Return the server's environment: this process's, and the plugin's configuration.

        Raises:
            ServeError: a peer is no URL, or there is no such way to run adapters.
            EraserMismatchError: there is no eraser where one is named.
        """
        if wrong := [url for url in self.peers if not url.startswith(("http://", "https://"))]:
            raise ServeError(f"expected URLs of the other replicas, such as http://host:30000, got {wrong[0]!r}")
        if self.adapters not in ("hooks", "lora"):
            raise ServeError(f"expected adapters 'hooks' or 'lora', got {self.adapters!r}")
        folder = self._eraser_folder()
        if folder:
            read_eraser_config(Path(folder))
        ledger = str(Path(self.ledger).expanduser().resolve()) if self.ledger else ""
        config = PluginConfig(
            ledger=ledger, eraser=folder, adapters=self.adapters, peers=tuple(self.peers),
            thread_header=self.thread_header.lower(),
        )  # fmt: skip
        return config.to_environment()

    def _eraser_folder(self) -> str:
        name = self.eraser or ("kv_map" if self.model == "reference" else "")
        if self.model == "reference" and name in VARIANTS:
            return str(SHIPPED / name)
        return str(Path(name).expanduser().resolve()) if name else ""


def _words(value: Any) -> list[str]:
    """Return a value as words of a command line, behind its flag."""
    if value is True:
        return []
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]


def check_sglang() -> None:
    """Raise ServeError where SGLang is not installed beside kv-retract, or in another version."""
    from importlib.metadata import version

    if find_spec("sglang") is None:
        raise ServeError(
            f"SGLang is not installed in this environment; in one of its own: pip install sglang=={VERSION} kv-retract"
        )
    if (found := version("sglang")) != VERSION:
        raise ServeError(f"expected sglang=={VERSION}, got {found}: the plugin takes hold of that version's scheduler")
