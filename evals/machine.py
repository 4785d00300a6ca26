"""What a measurement ran on: hardware and versions, without names of hosts, users or folders."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("kv-retract", "torch", "transformers", "tokenizers", "numpy")


def describe_machine(device: str) -> dict[str, Any]:
    """Return the processor, its threads in use, memory in GiB, and the accelerator where `device` names one."""
    import torch

    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if torch.device(device).type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(torch.device(device))
    return facts


def machine_name(machine: Mapping[str, Any]) -> str:
    """Return how tables call what `describe_machine` described."""
    name = machine.get("accelerator") or f"{machine['processor']} with {machine['threads']} threads"
    return str(name)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that timings and numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
