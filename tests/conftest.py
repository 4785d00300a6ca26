"""Shared by all tests: no model hub is ever asked, and tests that need more than a CPU say what they miss."""

import importlib.util
import os
import sys

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


@pytest.fixture
def kv_retract(monkeypatch, capfd):
    """Run the command line with arguments; return exit code, standard output and standard error."""

    from kv_retract.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kv-retract", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, *capfd.readouterr()

    return run
