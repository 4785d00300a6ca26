"""State of a training run on disk: written whole or not at all, so that a killed run goes on from its last one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import KVRetractError

STATE, LOG, CONFIG = "state.pt", "log.jsonl", "config.json"


class CheckpointError(KVRetractError, ValueError):
    """A run's folder belongs to another configuration, or its state cannot be read."""


class RunFolder:
    """Folder of one run: `config.json`, `log.jsonl`, `state.pt`.

    Args:
        path: made where it is not there.
        config: of the run, JSON-able.

    Raises:
        CheckpointError: the folder holds a run with another configuration, or cannot be used.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        wanted = json.loads(json.dumps(config))
        file = path / CONFIG
        try:
            path.mkdir(parents=True, exist_ok=True)
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot use {str(path)!r} for a run: {error}; choose another folder") from error
        if file.exists():
            if not isinstance(found, dict):
                raise CheckpointError(f"{str(file)!r} is no configuration of a run; choose another folder")
            if found != wanted:
                different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
                raise CheckpointError(
                    f"{str(path)!r} holds a run with another configuration ({', '.join(different)}); resume it with "
                    "the same, or choose another folder"
                )
        else:
            file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")

    def load(self) -> dict[str, Any] | None:
        """Return the newest state, None where there is none.

        Raises:
            CheckpointError: the file cannot be read.
        """
        file = self.path / STATE
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its unpickler does
            # Not torch's message: it advises to load without its safeguard.
            raise CheckpointError(
                f"cannot read {str(file)!r}: cut, damaged, or no state of a run ({type(error).__name__}); remove it to "
                "begin anew"
            ) from error
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state."""
        draft = self.path / (STATE + ".draft")
        torch.save(dict(state), draft)
        os.replace(draft, self.path / STATE)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Return the log."""
        return read_log(self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the log of the run in a folder; empty where there is none."""
    file = path / LOG
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
