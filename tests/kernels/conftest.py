"""Triton's kernels run where there is a CUDA device, else under Triton's interpreter on the CPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # where there is a driver and no device that torch can use


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def twins():
    """The kernels in Triton, and in torch."""
    from kv_retract.kernels.reference import TorchKernels
    from kv_retract.kernels.triton_kernels import TritonKernels

    return TritonKernels(), TorchKernels()
