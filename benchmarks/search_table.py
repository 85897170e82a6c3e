"""The search beside hand-made solvers and the paper's recipe: rows in benchmarks/results/search.jsonl.

    python benchmarks/search_table.py handmade mixture              best hand-made solver of each N
    python benchmarks/search_table.py search mixture --steps 5 8 10 --seeds 0 1 2 --spaces noise+start plain
    python benchmarks/search_table.py lion mixture --steps 5 8 10   the paper's recipe, 50,000 samples
    python benchmarks/search_table.py lion flow --steps 5 10 --samples 3000
    python benchmarks/search_table.py show

Error: RMSE per element at the end point against a 160-call teacher, on noise that no search draws. Cost: model
evaluations, forward 1, backward 2, guidance once, everything counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import rows, zoo  # noqa: E402
from dss_fast import GaussNewton, Lion, Solver, Target, find_solver, sample, search  # noqa: E402
from dss_fast.distance import squares  # noqa: E402
from dss_fast.draws import Draws  # noqa: E402
from dss_fast.files import replacing  # noqa: E402
from dss_fast.rivals import contest  # noqa: E402
from dss_fast.trajectory import dense_grid, integrate  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "search.jsonl"
FRESH = 512_000  # a seed of its own for the held-out noise; nothing was ever chosen by it
SIZE = 64  # of a batch
# The mixtures' error is in few samples: 20 of 8,192 carry half of the mean square.
COUNTS = {"mixture": 8192, "mixture0.2": 2048, "mixture0.5": 2048}


def target(name: str) -> Target:
    """The target of a model's short name: of examples.mnist, the zoo, "mixture", "mixture0.2" of another bandwidth."""
    if name in zoo.NAMES:
        return zoo.target(name)
    if name.startswith("mixture"):
        from examples.mixture import BANDWIDTH, digits

        return digits(float(name.removeprefix("mixture") or BANDWIDTH))
    import examples.mnist

    return getattr(examples.mnist, name)()


class Fresh:
    """Held-out noise and where the teacher takes it."""

    def __init__(self, name: str, count: int | None = None) -> None:
        draws = Draws.of(target(name), FRESH)
        self.target = draws.target
        count, size = count or COUNTS.get(name, 256), SIZE
        self.batches = []
        self.count = count
        grid = dense_grid(self.target.schedule, 160 if name.startswith("mixture") else 96)
        path = Path(__file__).parent / "results" / f".fresh-{name}-{FRESH}-{count}.pt"
        known = torch.load(path, weights_only=True) if path.exists() else []
        for k in range(count // size):
            batch = draws.batch("fresh", k, size)
            if k >= len(known):
                with torch.no_grad():
                    known.append(integrate(batch.predictor(), batch.noise, grid).last.clone())
            self.batches.append((batch, known[k]))
        with replacing(path) as part:  # several tables may be under way
            torch.save(known, part)

    def samples(self, solver: Solver) -> torch.Tensor:
        """Where the solver takes the noises, (n, *S)."""
        return torch.cat([sample(self.target, batch.noise, solver, cond=batch.cond) for batch, _ in self.batches])

    def squares(self, solver: Solver, start: int, stop: int) -> torch.Tensor:
        """(stop - start,) mean of squares of some samples; infinite where the solver diverges."""
        found = []
        for k in range(start // SIZE, -(-stop // SIZE)):
            batch, last = self.batches[k]
            part = slice(max(start - k * SIZE, 0), min(stop - k * SIZE, SIZE))
            rows = batch.rows(part)
            try:
                found.append(squares(sample(self.target, rows.noise, solver, cond=rows.cond), last[part]))
            except FloatingPointError:
                found.append(torch.full((len(rows),), math.inf, dtype=torch.float64))
        return torch.cat(found)

    def row(self, solver: Solver) -> dict[str, float]:
        return _row(self.squares(solver, 0, self.count))


def best_of(fresh: Fresh, num_steps: int) -> tuple[dict[str, float], Solver]:
    """The hand-made solver of least RMSE over all names, found as ``compare`` finds it, and its errors."""
    found = contest(fresh.squares, fresh.target.schedule, num_steps, fresh.count)
    solver, errors = next(iter(found.best.items()))
    return _row(errors), solver


def _row(errors: torch.Tensor) -> dict[str, float]:
    return {"rmse": math.sqrt(float(errors.mean())), "median": math.sqrt(float(errors.median()))}


def best_handmade(name: str, steps: list[int]) -> None:
    fresh = Fresh(name)
    for n in steps:
        row, solver = best_of(fresh, n)
        rows.append(RESULTS, kind="handmade", model=name, num_steps=n, solver=solver.name, samples=fresh.count, **row)


def known_best(name: str, num_steps: int) -> Solver:
    """The best hand-made solver that the rows name; where they name none it is found, and its row written."""
    for row in reversed(rows.read(RESULTS)):
        if (row["kind"], row["model"], row["num_steps"]) == ("handmade", name, num_steps):
            return find_solver(row["solver"], target(name).schedule)
    best_handmade(name, [num_steps])
    return known_best(name, num_steps)


def run(
    name: str,
    kind: str,
    steps: list[int],
    seeds: list[int],
    spaces: list[str],
    budget: int | None,
    together: bool,
    **settings: Any,
) -> None:
    fresh = Fresh(name)
    # The recipe treats each N alone but can share batches and teacher; the cost is written as if it did not.
    groups = [steps] if kind == "lion" or together else [[n] for n in steps]
    for seed in seeds:
        for group in groups:
            for space in spaces if kind == "search" else [None]:
                method = GaussNewton(space=space, **settings) if kind == "search" else Lion(**settings)
                start, cpu = time.perf_counter(), time.process_time()
                result = search(fresh.target, group, method=method, seed=seed, budget=budget, progress=False)
                took = {"seconds": round(time.perf_counter() - start, 1), "cpu": round(time.process_time() - cpu, 1)}
                for n in group:
                    cost = result.evaluations
                    if kind == "lion":
                        cost = method.samples * (100 + 3 * n)
                    _, losses = result.curve("loss", n)
                    _, held_out = result.curve("held_out", n)
                    rows.append(RESULTS, 
                        kind=kind, model=name, num_steps=n, seed=seed, space=space, budget=budget, searched=group,
                        evaluations=cost, **took,
                        train=losses[-1] if losses else None, held_out=held_out[-1] if held_out else None,
                        **fresh.row(result.solvers[n]), settings=settings,
                    )  # fmt: skip


def show() -> None:
    every = rows.read(RESULTS)
    hand = {(row["model"], row["num_steps"]): row["rmse"] for row in every if row["kind"] == "handmade"}
    kinds = {}
    for row in every:
        key = row["model"], row["num_steps"], row["kind"], row.get("space") or "", row.get("budget") or 0
        kinds.setdefault(key, []).append(row)
    for key, found in sorted(kinds.items()):
        model, n, kind, space, budget = key
        values = [row["rmse"] for row in found]
        mean = statistics.mean(values)
        spread = statistics.stdev(values) / mean if len(values) > 1 else 0.0
        line = f"{model:<12}{n:<3} {kind + ' ' + space:<20}{len(values):>2} x {mean:.5f} {spread:6.1%}"
        line += f"  hand-made / it {hand[model, n] / mean:.2f}" if (model, n) in hand else ""
        if kind != "handmade":
            train = statistics.mean(row["train"] for row in found)
            share = 50_000 * (100 + 3 * n) / found[-1]["evaluations"]
            line += f"  train {train:.5f}  {found[-1]['evaluations']:,} evaluations"
            line += f", 1/{share:.0f} of the paper's" if not budget else ""
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("handmade", "search", "lion", "show"))
    parser.add_argument("model", nargs="?", default="mixture")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--spaces", nargs="+", default=["noise+start"])
    parser.add_argument("--budget", type=int, default=None)
    parser.add_argument("--together", action="store_true", help="one search for all N, over one teacher")
    parser.add_argument("--samples", type=int, default=None, help="of the paper's recipe, 50,000 by default")
    options = parser.parse_args()
    if options.what == "show":
        show()
    elif options.what == "handmade":
        best_handmade(options.model, options.steps)
    else:
        settings = {} if options.samples is None else {"samples": options.samples}
        run(
            options.model,
            options.what,
            options.steps,
            options.seeds,
            options.spaces,
            options.budget,
            options.together,
            **settings,
        )


if __name__ == "__main__":
    main()
