"""A search that only calls the model, beside the one by the gradient: rows in benchmarks/results/forward.jsonl.

    python -m benchmarks.forward run --models mixture0.3 --steps 5 8 --budgets 500 1000 3000 --seeds 0 1 2
    python -m benchmarks.forward show

Figures: by the gradient / by calls alone, RMSE over that of the best hand-made table on the same fresh noise, the
geometric mean over the seeds. What is in the rows already is not run again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dss_fast import GaussNewton, Solver, Target, sample, search
from dss_fast.draws import Draws
from dss_fast.rivals import contest
from dss_fast.trajectory import dense_grid, integrate
from examples.mixture import digits

from . import rows, zoo

RESULTS = Path(__file__).parent / "results" / "forward.jsonl"
MODELS = ("mixture0.3", "mixture0.5", "moons_mixture", "digits8_mlp")
WAYS = {"gradient": True, "forward": False}
FRESH, FRESH_SEED = 512, 77_000


def target(name: str) -> Target:
    """The target of a name."""
    return digits(float(name.removeprefix("mixture"))) if name.startswith("mixture0") else zoo.target(name)


class Fresh:
    """Noise that no search draws, where it ends, and what hand-made tables leave."""

    def __init__(self, name: str) -> None:
        self.target = target(name)
        self.batch = Draws.of(self.target, FRESH_SEED).batch("fresh", 0, FRESH)
        with torch.no_grad():
            grid = dense_grid(self.batch.schedule, 96)
            self.last = integrate(self.batch.predictor(), self.batch.noise, grid).last

    @torch.no_grad()
    def squares(self, solver: Solver, start: int = 0, stop: int = FRESH) -> Tensor:
        some = self.batch.rows(slice(start, stop))
        found = sample(self.target, some.noise, solver, cond=some.cond)
        return (found - self.last[start:stop]).flatten(1).double().square().mean(1)

    def best(self, num_steps: int) -> float:
        """The mean square of the best hand-made table."""
        found = contest(self.squares, self.batch.schedule, num_steps, FRESH).best
        return min(float(errors.mean()) for errors in found.values())


def run(options: argparse.Namespace) -> None:
    known = rows.read(RESULTS)
    for name in options.models:
        fresh = Fresh(name)
        for n in options.steps:
            best = fresh.best(n)
            for budget in options.budgets:
                for seed in options.seeds:
                    for way in options.ways:
                        key = {"model": name, "num_steps": n, "budget": budget, "seed": seed, "way": way}
                        if any(all(row.get(k) == v for k, v in key.items()) for row in known):
                            continue
                        method = GaussNewton(gradients=WAYS[way])
                        found = search(fresh.target, n, budget=budget, seed=seed, method=method, progress=False)
                        ratio = math.sqrt(float(fresh.squares(found.solver).mean()) / best)
                        rows.append(RESULTS, **key, ratio=ratio, evaluations=found.evaluations)


def show() -> None:
    measured = rows.read(RESULTS)
    budgets = sorted({row["budget"] for row in measured})

    def mean(ways: str, **key: Any) -> str:
        found = [math.log(r["ratio"]) for r in measured if r["way"] == ways and all(r[k] == key[k] for k in key)]
        return f"{math.exp(sum(found) / len(found)):.2f}" if found else "-"

    print("| model | N |", " | ".join(f"{b:,}" for b in budgets), "|")
    print("| --- | --- |", " | ".join("---" for _ in budgets), "|")
    for name in dict.fromkeys(row["model"] for row in measured):
        for n in sorted({row["num_steps"] for row in measured}):
            cells = [" / ".join(mean(way, model=name, num_steps=n, budget=b) for way in WAYS) for b in budgets]
            print(f"| `{name}` | {n} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS))
    for option, default in (("--steps", (5, 8)), ("--budgets", (500, 1000, 3000)), ("--seeds", (0, 1, 2))):
        parser.add_argument(option, nargs="+", type=int, default=default)
    options = parser.parse_args()
    run(options) if options.what == "run" else show()


if __name__ == "__main__":
    main()
