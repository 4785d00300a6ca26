"""Compile every kernel for a GPU, as a program of its own: what was loaded for the interpreter cannot be compiled."""

import json
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kv_retract.kernels import programs
from kv_retract.kernels import triton_kernels as kernels

TABLES = {"k_from", "v_from", "k_to", "v_to", "k_all", "v_all", "from_slots", "to_slots", "old", "new", "positions"}
FLOATS = {"frequencies", "w1", "b1", "w2", "b2"}
WIDE = {"move": r"ld\.global[.\w:]*v4", "rotate": r"ld\.global[.\w:]*v4", "map": r"ld\.global[.\w:]*v4"}


def compiled(name, capability, dtype, dim, **settings):
    kernel = getattr(programs, f"{name}_kernel")
    everything = {
        "ROW": 8 * dim, "DIM": dim, "HALF": dim // 2, "HIDDEN": 128, "TYPE": dtype, "FROM": dtype, "TO": dtype,
        "INTERLEAVED": False, "NAMED_FROM": True, "NAMED_TO": True, "ROTATED": True, "VALUES": True,
        "TOKENS": kernels._TOKENS if name != "move" else 4, "PAIRS": dim // 2, "WIDTH": dim if name != "move" else 1024,
        "CHUNK": 16, "TURN": kernels._TURN, "EPSILON": kernels._EPSILON,
    } | settings  # fmt: skip
    constants = {n: value for n, value in everything.items() if n in kernel.arg_names}
    kinds = {n: "*i64" if n in TABLES else "*fp32" if n in FLOATS else "i32" for n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else kinds[n] for n in kernel.arg_names}
    places = {n: (i,) for i, n in enumerate(kernel.arg_names)}
    attributes = {places[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(kernel, signature, {places[n]: value for n, value in constants.items()}, attributes)
    options = {"num_stages": 2, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main():
    rows = []
    for capability, dtype, dim in ((80, tl.float32, 256), (90, tl.bfloat16, 128)):
        for name, wide in WIDE.items():
            kernel = compiled(name, capability, dtype, dim)
            rows.append(
                {
                    "kernel": name, "capability": capability, "shared": kernel.metadata.shared,
                    "wide_loads": len(re.findall(wide, kernel.asm["ptx"])),
                    "wide_stores": len(re.findall(wide.replace("ld", "st"), kernel.asm["ptx"])),
                }
            )  # fmt: skip
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
