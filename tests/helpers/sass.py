"""Compiles the step's kernels for named GPUs without one, and prints what the machine code holds, a JSON row a kernel.

PYTHONPATH=.:tests python -m helpers.sass [full]    # without TRITON_INTERPRET; full: all combinations of dtypes, flags
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dss_fast.step import triton as step_triton
from helpers import trees

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
STRIDES = {"size", "history_row", "history_slot", "adjoints_row", "adjoints_slot"}
OF_STATE = ("x_ptr", "out_ptr", "next_ptr", "grad_ptr", "dx_ptr", "adjoints_ptr")
OF_OUTPUT = ("output_ptr", "doutput_ptr")
OF_HISTORY = ("history_ptr", "y_ptr", "grad_y_ptr")
STEPS = 10
UNROLL = step_triton.trip(STEPS)
LISTED = 12  # nine predictions and the initial noise, padded
KERNELS = {
    "step": step_triton._step_kernel,
    "update": step_triton._update_kernel,
    "backward": step_triton._update_backward_kernel,
    "pull": step_triton._pull_kernel,
}


def build(name, arch, dtypes, flags):
    kernel = KERNELS[name]
    names, constants = kernel.arg_names, {**flags, "BLOCK": step_triton.BLOCK}
    if "UNROLL" in names:
        constants["UNROLL"] = UNROLL
    signature, hints = {}, {}
    aligned = [["tt.divisibility", 16]]
    for position, argument in enumerate(names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("history", "dhistory"):
            signature[argument] = (f"*{dtypes[2]}",) * LISTED
            hints |= {(position, k): aligned for k in range(LISTED)}
        elif argument.endswith("_ptr"):
            signature[argument] = pointer(argument, *dtypes)
            if argument not in step_triton._ANYWHERE:
                hints[(position,)] = aligned
        else:
            signature[argument] = "i32"
            if argument in STRIDES:
                hints[(position,)] = aligned
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(name, dtypes))


def parameters(name, flags):
    """What the kernel's parameters are called, one for each tensor of a list."""
    given = [a for a in KERNELS[name].arg_names if a not in flags and a not in ("BLOCK", "UNROLL")]
    return [a.removesuffix("_ptr") for a in given for _ in range(LISTED if a in ("history", "dhistory") else 1)]


def pointer(name, state, output, history):
    if name == "index_ptr":
        return "*i64"
    for names, dtype in ((OF_STATE, state), (OF_OUTPUT, output), (OF_HISTORY, history)):
        if name in names:
            return f"*{dtype}"
    return "*fp64" if state == "fp64" else "*fp32"  # weights and sums


def options(name, dtypes):
    state, _, history = (TYPES[d] for d in dtypes)
    return step_triton.options() if name == "backward" else step_triton.options(state, history)


def said(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def inspect(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = said("cuobjdump", "-res-usage", file.name)
        # What `cuobjdump -sass` prints, without its analysis of the data flow, which nothing here reads.
        code = said("nvdisasm", "-c", "-ndf", file.name)
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
        "under_way": under_way(code),
    }


def under_way(code):
    """The most bytes of 128-bit loads that a thread has issued before it first uses any of them, in program order."""
    waiting, most = {}, 0  # registers that a load still owes, by the load's place
    for place, instruction in enumerate(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", code, re.M)):
        operation, _, operands = re.sub(r"^@\S+\s+", "", instruction).partition(" ")
        load = operation.startswith("LDG") and ".128" in operation
        target, _, rest = operands.partition(",")
        used = registers_in(rest if load else operands)
        waiting = {at: owed for at, owed in waiting.items() if not owed & used}
        if load:
            first = int(re.search(r"R(\d+)", target)[1])
            waiting[place] = set(range(first, first + 4))
            most = max(most, 16 * len(waiting))
    return most


def registers_in(operands):
    """Numbers of the registers that an instruction names, those of a wide operand's second half left out."""
    return {int(number) for number in re.findall(r"\bR(\d+)", operands)}


def expected(name, dtypes, flags):
    """What 8 elements a thread take if every access to the data is one of 128 bits, and every slot one fused sum."""
    state, output, history = (8 * int(d[-2:]) // 128 for d in dtypes)
    halves = 1 + flags["PAIR"]
    if name in ("step", "update"):
        slots = UNROLL + 1 if name == "step" else LISTED
        return {
            "loads_128": state + halves * output + slots * history,
            "stores_128": state + history,
            # y and x_next begin with a product each, a guided pair with a difference: the same bits in either form.
            "fused": 8 * (slots + 2 + flags["PAIR"]),
            "products": 16,
            "sums": 8 * flags["PAIR"],
            "at_least_under_way": 16 * history * (UNROLL if name == "step" else LISTED - 2),
        }
    if name == "pull":
        return {
            "loads_128": (UNROLL + 1) * state,
            "stores_128": (1 + halves) * state,
            "fused": 8 * (UNROLL + 1),
            "products": 8 * (3 + 2 * flags["PAIR"]),
            "sums": int(flags["PAIR"]),
            "at_least_under_way": 16 * state * UNROLL,
        }
    row, current = flags["ROW"], flags["X"] or flags["OUTPUT"] or flags["ROW"]  # what no result needs is not loaded
    loads = row * (state + halves * output + LISTED * history) + current * flags["OWN"] * history
    return {
        "loads_128": loads + flags["NEXT"] * state,
        "stores_128": flags["X"] * state + flags["OUTPUT"] * halves * output + flags["HISTORY"] * LISTED * history,
        "at_least_under_way": 16 * row * 2 * history,
    }


def variants(full):
    mixes = [("fp32",) * 3, ("fp32", "bf16", "bf16"), ("bf16",) * 3, ("fp64", "fp64", "fp32")]
    booleans = (False, True)
    everything = dict.fromkeys(("X", "OUTPUT", "HISTORY", "ROW", "NEXT", "OWN"), True)
    for dtypes in itertools.product(TYPES, repeat=3) if full else mixes:
        for pair, rows in itertools.product(booleans, repeat=2) if full and dtypes in mixes else [(True, True)]:
            flags = {"PAIR": pair, "ROW_WEIGHTS": rows}
            yield "step", dtypes, {**flags, "ADDED": False, "ROW_INDEX": rows}
            yield "update", dtypes, flags
            yield "backward", dtypes, {**flags, **everything}
            if len(set(dtypes)) == 1:
                yield "pull", dtypes, {**flags, "ADDED": False, "ROW_INDEX": rows}
    plain = {"PAIR": False, "ROW_WEIGHTS": False}
    for dtypes in mixes:
        yield "step", dtypes, {**plain, "ADDED": False, "ROW_INDEX": False}
        yield "update", dtypes, plain
        if len(set(dtypes)) == 1:
            yield "pull", dtypes, {**plain, "ADDED": False, "ROW_INDEX": False}
    for alone in itertools.product(booleans, repeat=6) if full else [(True, True, True, True, True, False)]:
        yield "backward", mixes[0], {**plain, **dict(zip(everything, alone, strict=True))}


def main():
    for arch in (80, 90):
        for name, dtypes, flags in variants("full" in sys.argv):
            compiled = build(name, arch, dtypes, flags)
            row = {
                "kernel": name,
                "arch": f"sm_{arch}",
                "dtypes": "/".join(dtypes),
                "flags": " ".join(f for f, on in flags.items() if on),
                "triton": triton.__version__,
                "limit": options(name, dtypes).get("maxnreg"),
                **inspect(compiled),
                "stored": trees.stored(compiled.asm["ptx"], parameters(name, flags), 8 if dtypes[0] == "fp64" else 4),
                "expected": expected(name, dtypes, flags),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
