"""What an unrolled rollout says it keeps, beside what the allocator counts.

    python benchmarks/unroll_memory.py ROWS.jsonl [--tiny]

For each network: the graph of one call as ``Rollout.kept`` measured it and as it stands in torch.cuda.memory_stats;
and the peak of forward and backward with no graph kept, with half of them and with all, beside plain autograd's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_unroll import MODELS, Case, peak  # noqa: E402
from machine import DEVICE, conditions  # noqa: E402


def graph_bytes(case: Case) -> int | None:
    """What the graph of one call holds, by the allocator; None on a CPU, which has none to ask."""
    if DEVICE.type != "cuda":
        return None
    x, _, times = case.inputs
    t = times[0].expand(len(x)).detach().requires_grad_()

    def allocated() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["allocated_bytes.all.current"]

    case.model(x, t)  # workspaces and kernels
    before = allocated()
    output = case.model(x, t)
    held = allocated() - before
    assert output.requires_grad
    return held


def measure(name: str, steps: int, tiny: bool) -> dict:
    case = Case(name, steps)
    case.ours(budget=1)
    planned = case.kept.activation_bytes
    half, whole = int((steps // 2 + 0.5) * planned), 2 * steps * planned
    ways = {
        "plain": case.plain,
        "k = 0": case.ours,
        "k = N/2": lambda: case.ours(budget=half),
        "k = N": lambda: case.ours(budget=whole),
    }
    return {
        "planned_bytes": planned,
        "counted_bytes": graph_bytes(case),
        **{f"peak {way}": peak(run) for way, run in ways.items() if way == "k = 0" or not tiny},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines are appended here")
    parser.add_argument("--tiny", action="store_true", help="the small network, two steps")
    options = parser.parse_args()
    for name in list(MODELS)[:1] if options.tiny else MODELS:
        row = measure(name, 2 if options.tiny else 10, options.tiny)
        print(name, *(f"{k} {v / 1e6:.1f} MB" for k, v in row.items() if v is not None), sep="\n    ", flush=True)
        with options.rows.open("a") as file:
            file.write(json.dumps({"stage": "unroll", "model": name, **row, **conditions()}) + "\n")


if __name__ == "__main__":
    main()
