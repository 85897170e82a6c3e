"""The main job on a real model: search a 5- and a 10-step solver, sample with them, show what was gained.

    python -m examples.mnist.demo --out out

Searches for the shipped MNIST flow model and leaves in ``out``: the solvers, a table and pictures. Takes about
two to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dss_fast import compare, search
from dss_fast.__main__ import DEFAULT_SOLVERS
from dss_fast.files import check_writable, write_text
from dss_fast.plots import plot_solver

from . import flow

STEPS = (5, 10)
BUDGET = 80_000  # model evaluations, a third of what the search would take for these two by default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where results go (default out)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, start = options.out, time.perf_counter()
    check_writable(out)

    target = flow()
    again = (out / "search").exists()  # interrupted or finished before: go on from there
    result = search(target, STEPS, seed=options.seed, budget=BUDGET, out=out / "search", resume=again)
    searched = {n: result.solvers[n] for n in STEPS}
    for n, solver in searched.items():
        solver.save(out / f"solver-{n}.json")
        plot_solver(solver, out / f"solver-{n}.png")

    solvers = [*DEFAULT_SOLVERS, *searched.values()]
    table = compare(target, solvers, num_steps=(5, 8, 10, 15), samples=64, budget=100_000)
    write_text(out / "compare.txt", f"{table}\n")
    table.save(out / "compare.json")
    table.plot(out / "error.png")
    for n, solver in searched.items():
        best = table.best(n)
        assert best is not None  # the hand-made solvers ran at these steps too
        table.plot_samples(out / f"samples-{n}.png", [f"euler/{n}", best.solver, solver.name])

    print(f"\n{table}\n")
    print(f"{time.perf_counter() - start:.0f} s. Solvers, table and pictures are in {out}/")


if __name__ == "__main__":
    main()
