"""What the interpreter does not see: the kernels compile for GPUs, use their wide loads, and fit into their memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = 101_376
"""Bytes that one program may have on the smallest of the GPUs since Ampere (compute capability 8.6 and 8.9)."""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 6
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY, row
        assert row["wide_loads"] and row["wide_stores"], row
