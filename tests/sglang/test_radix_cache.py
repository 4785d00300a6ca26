"""The radix cache with editable paths is SGLang's own for ordinary traffic."""

import subprocess
from pathlib import Path

import pytest

from .servers import VENV

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("core", ["rust", "python"])
def test_ordinary_operations_do_what_sglangs_own_cache_does(core):
    script = Path(__file__).with_name("radix_fuzz.py")
    done = subprocess.run(
        [VENV / "bin" / "python", script, core], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout.strip().splitlines()[-1:] and done.stdout.strip().splitlines()[-1].startswith("OK"), (
        done.stdout[-2000:] + done.stderr[-4000:]
    )
    print(done.stdout.strip().splitlines()[-1])
