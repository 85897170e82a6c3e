"""Three to five calls of a searched table against the best hand-made 3 and 10: rows in benchmarks/results/few.jsonl.

    python -m benchmarks.few_steps run                    # all models, N = 3, 4, 5, the default search
    python -m benchmarks.few_steps run --models flow --steps 3
    python -m benchmarks.few_steps show

RMSE, median sample, share that switches, Frechet and energy distance: those of ``dss_fast.compare``, on noise that no
search draws. Frechet's bias is its floor, the distance of the reference to itself, which is taken off. The hand-made
solver is that of least RMSE over all names, 91 when rows were made, found as ``compare`` does (search_table.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dss_fast import search
from dss_fast.distance import Reference, three_digits

from . import rows
from .search_table import Fresh, known_best

RESULTS = Path(__file__).parent / "results" / "few.jsonl"
MODELS = ("mixture", "flow", "vp", "flow16", "flow_guided", "vp_guided")
MANY = (3, 10)  # calls of the hand-made solvers


def run(models: list[str], steps: list[int], budget: int | None, seed: int, samples: int | None = None) -> None:
    """Appends a row for each solver; those that are there are not measured again."""
    searches = {"searched": True, "budget": budget, "seed": seed}
    for name in models:
        solvers = [{"model": name, "num_steps": n, "searched": False} for n in MANY]
        solvers += [{"model": name, "num_steps": n, **searches} for n in steps]
        wanted = [key for key in solvers if not any(key.items() <= row.items() for row in rows.read(RESULTS))]
        if not wanted:
            continue
        fresh = Fresh(name, samples)
        reference = Reference(fresh.target, torch.cat([last for _, last in fresh.batches]))
        floor = reference.distances()["frechet"]
        for key in wanted:
            n = key["num_steps"]
            if key["searched"]:
                solver = search(fresh.target, n, budget=budget, seed=seed, progress=False).solver
            else:
                solver = known_best(name, n)
            figures = reference.measure(fresh.samples(solver))
            rows.append(RESULTS, **key, solver=solver.name, **figures, floor=floor)


def show() -> str:
    """A line for each solver, the newest row of each."""
    head = ("model", "N", "solver", "RMSE", "median", "switched", "Frechet above its floor", "energy")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    found = {
        (MODELS.index(r["model"]), r["searched"], r["num_steps"], r.get("budget") or 0): r for r in rows.read(RESULTS)
    }
    for (_, searched, n, budget), r in sorted(found.items()):
        solver = "**searched**" if searched else r["solver"].replace(f"/{n}", "")
        solver += f", {budget:,} evaluations" if budget else ""
        figures = [three_digits(v) for v in (r["rmse"], r["median"])]
        figures += [f"{100 * r['switched']:.1f} %", three_digits(max(0.0, r["frechet"] - r["floor"]))]
        lines.append(f"| {r['model']} | {n} | {solver} | {' | '.join(figures)} | {r['energy']:.1e} |")
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
