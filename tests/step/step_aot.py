"""Compiles the step's kernels for named GPUs without one, and prints what the machine code holds, a JSON row a kernel.

python tests/step_aot.py [full]         # without TRITON_INTERPRET; full: every combination of dtypes and flags
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dss_fast.step import triton as step_triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp64": "*fp64"}
STRIDES = {"size", "history_row", "history_slot", "next_row", "next_slot", "adjoints_row", "adjoints_slot"}
STATE = ("x_ptr", "out_ptr", "grad_ptr", "dx_ptr", "adjoints_ptr")
OUTPUT = ("output_ptr", "doutput_ptr")
HISTORY = ("history_ptr", "next_ptr", "grad_next_ptr", "dhistory_ptr")


def pointer(name, state, output, history):
    if name == "index_ptr":
        return "*i64"
    for names, dtype in ((STATE, state), (OUTPUT, output), (HISTORY, history)):
        if name in names:
            return TYPES[dtype]
    return TYPES["fp64" if state == "fp64" else "fp32"]  # weights and sums


def build(kernel, arch, dtypes, flags):
    names = kernel.arg_names
    constants = {**flags, "BLOCK": step_triton.BLOCK}
    signature, hints = {}, {}
    for position, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointer(name, *dtypes) if name.endswith("_ptr") else "i32"
            if name.endswith("_ptr") or name in STRIDES:
                hints[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, hints)
    double = kernel is step_triton._backward_kernel and dtypes[0] == "fp64"
    options = step_triton.DOUBLE_OPTIONS if double else step_triton.OPTIONS
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOL, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": len(re.findall(r"\b(?:LDL|STL)", code)),
        "loads_128": len(re.findall(r"\bLDG\.\S*128", code)),
        "stores_128": len(re.findall(r"\bSTG\.\S*128", code)),
        "fused": len(re.findall(r"\b[FD]FMA\b", code)),
        "products": len(re.findall(r"\b[FD]MUL\b", code)),
        "sums": len(re.findall(r"\b[FD]ADD\b", code)),
    }


def expected(name, dtypes, flags):
    """128-bit loads and stores if every access to the data is one: 8 elements a thread, slots unrolled 8, 4 or 2."""
    state, output, history = (8 * int(d[-2:]) // 128 for d in dtypes)
    halves = 1 + flags["PAIR"]
    if name == "forward":
        slots, copied = (9, 0) if flags["IN_PLACE"] else (4, 4)
        return state + halves * output + slots * history, state + (1 + copied) * history
    if name == "pull":
        return 5 * state, state + halves * state
    row, current = flags["ROW"], flags["ROW"] or flags["X"] or flags["OUTPUT"]  # what no result needs is not loaded
    loads = row * (state + halves * output + 2 * history) + (current or flags["HISTORY"]) * state
    loads += flags["LATER"] * (current + 2 * flags["HISTORY"]) * history
    return loads, flags["X"] * state + flags["OUTPUT"] * halves * output + flags["HISTORY"] * 2 * history


def variants(full):
    mixes = [("fp32",) * 3, ("fp32", "bf16", "bf16"), ("bf16",) * 3, ("fp64", "fp64", "fp32")]
    booleans = (False, True)
    everything = dict.fromkeys(("X", "OUTPUT", "HISTORY", "ROW", "LATER"), True)
    for dtypes in itertools.product(TYPES, repeat=3) if full else mixes:
        for pair, rows in itertools.product(booleans, repeat=2) if full and dtypes in mixes else [(True, True)]:
            flags = {"PAIR": pair, "ROW_WEIGHTS": rows, "ROW_INDEX": rows}
            yield "forward", step_triton._forward_kernel, dtypes, {**flags, "IN_PLACE": True}
            yield "backward", step_triton._backward_kernel, dtypes, {**flags, **everything}
            if len(set(dtypes)) == 1:
                yield "pull", step_triton._pull_kernel, dtypes, flags
    plain = {"PAIR": False, "ROW_WEIGHTS": False, "ROW_INDEX": False}
    yield "forward", step_triton._forward_kernel, mixes[0], {**plain, "IN_PLACE": False}
    for alone in itertools.product(booleans, repeat=5) if full else [(False, False, False, True, False)]:
        flags = {**plain, **dict(zip(everything, alone, strict=True))}
        yield "backward", step_triton._backward_kernel, mixes[0], flags


def main():
    for arch in (80, 90):
        for name, kernel, dtypes, flags in variants("full" in sys.argv):
            loads, stores = expected(name, dtypes, flags)
            print(
                json.dumps(
                    {
                        "kernel": name,
                        "arch": f"sm_{arch}",
                        "dtypes": "/".join(dtypes),
                        "flags": " ".join(f for f, on in flags.items() if on),
                        **inspect(build(kernel, arch, dtypes, flags)),
                        "loads_expected": loads,
                        "stores_expected": stores,
                        "triton": triton.__version__,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
