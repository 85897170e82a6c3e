"""Three to five calls of a searched table against the best hand-made 3 and 10: rows in benchmarks/results/few.jsonl.

    python -m benchmarks.few_steps run                    # all models, N = 3, 4, 5, the default search
    python -m benchmarks.few_steps run --models flow --steps 3
    python -m benchmarks.few_steps show

RMSE, median sample, share that switches, Frechet and energy distance: those of ``dss_fast.compare``, on noise that no
search draws. Frechet's bias is its floor, the distance of the reference to itself, which is taken off. The hand-made
solver is that of least RMSE over all methods and spacings (search_table.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dss_fast import Solver, search
from dss_fast.distance import Reference, three_digits

from .search_table import Fresh, known_best

RESULTS = Path(__file__).parent / "results" / "few.jsonl"
MODELS = ("mixture", "flow", "vp", "flow16", "flow_guided", "vp_guided")
MANY = (3, 10)  # calls of the hand-made solvers


def run(models: list[str], steps: list[int], budget: int | None, seed: int, samples: int | None = None) -> None:
    """Appends a row for each solver; those that are there are not measured again."""
    known = {(r["model"], r["num_steps"], r["searched"]) for r in rows()}
    for name in models:
        wanted = [(n, searched) for of, searched in ((MANY, False), (steps, True)) for n in of]
        wanted = [key for key in wanted if (name, *key) not in known]
        if not wanted:
            continue
        fresh = Fresh(name, samples)
        reference = Reference(fresh.target, torch.cat([last for _, last in fresh.batches]))
        for n, searched in wanted:
            solver = known_best(name, n)
            if searched:
                solver = search(fresh.target, n, budget=budget, seed=seed, progress=False).solver
            write(model=name, num_steps=n, searched=searched, solver=solver.name, **measured(fresh, reference, solver))


def measured(fresh: Fresh, reference: Reference, solver: Solver) -> dict[str, Any]:
    """The figures of a solver, and Frechet's floor."""
    figures = reference.measure(fresh.samples(solver))
    return {**figures, "floor": reference.distances()["frechet"]}


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write(**row: Any) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def show() -> str:
    """A line for each solver."""
    head = ("model", "N", "solver", "RMSE", "median", "switched", "Frechet above its floor", "energy")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    found = {(r["model"], r["searched"], r["num_steps"]): r for r in rows()}
    for name in MODELS:
        for (_, searched, n), r in sorted((item for item in found.items() if item[0][0] == name), key=lambda i: i[0]):
            above = max(0.0, r["frechet"] - r["floor"])
            figures = [three_digits(v) for v in (r["rmse"], r["median"])]
            figures += [f"{100 * r['switched']:.1f} %", three_digits(above), f"{r['energy']:.1e}"]
            solver = "**searched**" if searched else r["solver"].replace(f"/{n}", "")
            lines.append(f"| {name} | {n} | {solver} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--budget", type=int, default=None, help="model evaluations of each search")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "show":
        return print(show())
    run(options.models, options.steps, options.budget, options.seed)


if __name__ == "__main__":
    main()
