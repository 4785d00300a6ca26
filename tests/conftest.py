"""Shared by all tests: no model hub is ever asked, and tests that need more than a CPU say what they miss."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Two processes and the measuring of coverage make single examples slow now and then.
settings.register_profile("shared-cores", deadline=None)
settings.load_profile("shared-cores")


def pytest_collection_modifyitems(items):
    missing = {}
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            missing["gpu"] = "needs a CUDA device"
    if importlib.util.find_spec("sglang") is None:
        missing["sglang"] = "needs an environment with SGLang"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
