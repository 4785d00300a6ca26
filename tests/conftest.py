"""Shared by all tests: no model hub is ever asked, and tests that need more than a CPU say what they miss."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whatever test does that

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
    venv = Path(os.environ.get("SGLANG_VENV", Path(__file__).parents[1] / ".venv-sglang"))
    if not (venv / "bin" / "kv-retract").exists():
        missing["sglang"] = f"needs an environment with SGLang, none at {venv.name}: run make test-sglang"
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
