"""Which kernels a device gets."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from .base import Kernels
from .reference import TorchKernels


@cache
def kernels_for(device: torch.device | str) -> Kernels:
    """Return Triton's kernels for a CUDA device, where Triton is installed (torch for CUDA brings it); else torch's."""
    if torch.device(device).type == "cuda" and torch.version.cuda and find_spec("triton"):
        from .triton_kernels import TritonKernels

        return TritonKernels()
    return TorchKernels()
