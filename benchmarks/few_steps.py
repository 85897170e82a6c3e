"""Three to seven calls of a searched table against the best hand-made 3 and 10: rows in benchmarks/results/few.jsonl.

    python -m benchmarks.few_steps run                    # all models, N = 3, 4, 5, the default search
    python -m benchmarks.few_steps run --models flow --steps 3
    python -m benchmarks.few_steps show                   # and with how many calls a search is below the hand-made 10

RMSE, median sample, share that switches, Frechet and energy distance: those of ``dss_fast.compare``, on noise that no
search draws. Frechet's bias is its floor, the distance of the reference to itself, which is taken off. The hand-made
solver is that of least RMSE over all names, found as ``compare`` does; its row says how many names there were, and the
least median among the last twelve, which need not be its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dss_fast import Solver, search
from dss_fast.distance import Reference, three_digits
from dss_fast.rivals import contest

from . import rows
from .search_table import Fresh

RESULTS = Path(__file__).parent / "results" / "few.jsonl"
Row = dict[str, Any]
MODELS = ("mixture", "flow", "vp", "flow16", "flow_guided", "vp_guided")
MANY = (3, 10)  # calls of the hand-made solvers


def best_handmade(fresh: Fresh, num_steps: int) -> tuple[Solver, dict[str, float]]:
    """The hand-made solver of least RMSE; among how many names, and the least median of those run on all samples."""
    found = contest(fresh.squares, fresh.target.schedule, num_steps, fresh.count)
    least = math.sqrt(min(float(errors.median()) for errors in found.best.values()))
    return next(iter(found.best)), {"names": found.tried, "least_median": least}


def run(models: list[str], steps: list[int], budget: int | None, seed: int, samples: int | None = None) -> None:
    """Appends a row for each solver; those that are there are not measured again, but for those marked "begun":
    their searches had no library to begin at."""
    searches = {"searched": True, "budget": budget, "seed": seed}
    for name in models:
        solvers = [{"model": name, "num_steps": n, "searched": False} for n in MANY]
        solvers += [{"model": name, "num_steps": n, **searches} for n in steps]
        known = [row for row in rows.read(RESULTS) if "begun" not in row]
        wanted = [key for key in solvers if not any(key.items() <= row.items() for row in known)]
        if not wanted:
            continue
        fresh = Fresh(name, samples)
        reference = Reference(fresh.target, torch.cat([last for _, last in fresh.batches]))
        floor = reference.distances()["frechet"]
        for key in wanted:
            n = key["num_steps"]
            if key["searched"]:
                result = search(fresh.target, n, budget=budget, seed=seed, progress=False)
                solver, about = result.solver, {"evaluations": result.evaluations, "table": result.solver.to_dict()}
            else:
                solver, about = best_handmade(fresh, n)
            figures = reference.measure(fresh.samples(solver))
            rows.append(RESULTS, **key, solver=solver.name, **figures, floor=floor, **about)


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
        solver += f", begun at {r['begun']} tables" if "begun" in r else ""
        figures = [three_digits(v) for v in (r["rmse"], r["median"])]
        figures += [f"{100 * r['switched']:.1f} %", three_digits(above(r))]
        lines.append(f"| {r['model']} | {n} | {solver} | {' | '.join(figures)} | {r['energy']:.1e} |")
    return "\n".join(lines)


def show_fewest() -> str:
    """For each model: five searched calls beside the best hand-made ten, and with how many a search is below it."""
    newest = {(r["model"], r["searched"], r["num_steps"]): r for r in rows.read(RESULTS) if not r.get("budget")}
    head = (
        "model", "5 calls: median over that of the best hand-made 10", "Frechet above its floor, 5 / hand-made 10",
        "fewest calls with a lower median", "with a lower Frechet",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for model in MODELS:
        many, five = newest.get((model, False, MANY[-1])), newest.get((model, True, 5))
        if many is None or five is None:
            continue
        tried = sorted((n, r) for (name, searched, n), r in newest.items() if name == model and searched)

        def fewest(figure: Callable[[Row], float], many: Row = many, tried: list[tuple[int, Row]] = tried) -> str:
            below = [n for n, r in tried if figure(r) < figure(many)]
            return str(below[0]) if below else f"more than {tried[-1][0]}"

        frechets = " / ".join(three_digits(above(r)) for r in (five, many))
        ratio = five["median"] / many["median"]
        lines.append(f"| {model} | {ratio:.2f} | {frechets} | {fewest(median)} | {fewest(above)} |")
    return "\n".join(lines)


def median(row: Row) -> float:
    """RMSE of the median sample."""
    return float(row["median"])


def above(row: Row) -> float:
    """Frechet distance without its bias."""
    return max(0.0, float(row["frechet"]) - float(row["floor"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--budget", type=int, default=None, help="model evaluations of each search")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "show":
        return print(show(), show_fewest(), sep="\n\n")
    run(options.models, options.steps, options.budget, options.seed)


if __name__ == "__main__":
    main()
