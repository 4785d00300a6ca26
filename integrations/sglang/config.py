"""How the server's half is set up: one JSON object in the environment, which every process of SGLang inherits."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from kv_retract.errors import KVRetractError

VARIABLE = "KV_RETRACT_SGLANG"
"""Name of the environment variable; only this file reads the environment."""


class PluginConfigError(KVRetractError, ValueError):
    """The plugin's configuration is no JSON object of known fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginConfig:
    """See the module; `kv-retract serve` writes it."""

    ledger: str = ""
    """SQLite file of span retractions. Empty: they are lost with the process, as the cache is."""
    eraser: str = ""
    """Folder of a learned eraser of the served model (`kv-retract train eraser`). Empty: no `kveraser`."""
    adapters: str = "hooks"
    """How low-rank adapters of an eraser run: by `hooks`, or by SGLang's own `lora` (`adapters.ADAPTERS`)."""
    peers: Sequence[str] = ()
    """URLs of the other replicas: they get what this one takes back, and are asked for what it missed."""
    peer_seconds: float = 2.0
    """How often they are asked."""
    thread_header: str = ""
    """HTTP header that names the thread of an OpenAI request without `extra_key`. Empty: none."""

    def __post_init__(self) -> None:
        """Make equal what JSON tells apart."""
        object.__setattr__(self, "peers", tuple(self.peers))

    @classmethod
    def from_environment(cls) -> Self:
        """Read the configuration; the defaults where there is none.

        Raises:
            PluginConfigError: it cannot be read.
        """
        text = os.environ.get(VARIABLE, "")
        try:
            return cls(**json.loads(text)) if text else cls()
        except (ValueError, TypeError) as error:
            raise PluginConfigError(
                f"expected a JSON object with fields of {cls.__name__} in {VARIABLE}, got {text!r}: {error}"
            ) from error

    def to_environment(self) -> dict[str, str]:
        """Return the environment for a server: this process's, and the configuration."""
        return {**os.environ, VARIABLE: json.dumps(asdict(self))}


def environment_before(folder: Path) -> dict[str, str]:
    """Return this process's environment with a folder before all others on the path of programs."""
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
