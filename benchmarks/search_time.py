"""How long a search takes: MNIST flow, N = 5 and 10 over one teacher, the default budget.

python benchmarks/search_time.py ROWS.jsonl [--budget 245000] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import DEVICE, conditions  # noqa: E402

from dss_fast import (
    GaussNewton,  # noqa: E402
    search,  # noqa: E402
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines are appended here")
    parser.add_argument("--budget", type=int, default=None, help="model evaluations, the default one without")
    parser.add_argument("--tiny", action="store_true", help="32 samples of the smallest search there is")
    options = parser.parse_args()
    from examples import mnist

    target, steps, settings = mnist.flow().to(DEVICE), [5, 10], {}
    if options.tiny:
        steps, options.budget = [2], 2500
        settings = {"samples": 16, "held_out_samples": 16, "teacher_evaluations": 16, "rounds": 1}
    begin = time.perf_counter()
    result = search(target, steps, method=GaussNewton(**settings), budget=options.budget, progress=False)
    seconds = time.perf_counter() - begin
    for n in steps:
        _, held_out = result.curve("held_out", n)
        row = {"seconds": seconds, "evaluations": result.evaluations, "held_out": held_out[-1] if held_out else None}
        print(f"N = {n}: held-out RMSE {row['held_out']}", flush=True)
        with options.rows.open("a") as file:
            file.write(json.dumps({"stage": "search", "model": "mnist flow", "num_steps": n, **row, **conditions()}))
            file.write("\n")
    print(f"{result.evaluations:,} evaluations in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
