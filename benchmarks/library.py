"""The library: tables that many models share, each of them moved to it. Rows in benchmarks/results/library.jsonl.

    python -m benchmarks.library search --steps 5 8 10 --rounds 3             # a table of all models
    python -m benchmarks.library search --leave transformer mixer             # of those of other kinds alone
    python -m benchmarks.library ship                                         # newest rows to dss_fast/solvers

A round finds for each model the k at which the table serves it best, and then one table for all of them, each as if its
data were 1 / k as large: what is made small is, in the end, the mean over models of the logarithm of the error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dss_fast import GaussNewton, Solver, Target, find_solver, sample, search
from dss_fast.distance import squares
from dss_fast.draws import Draws
from dss_fast.searching.budget import Ledger
from dss_fast.searching.descent import begun
from dss_fast.searching.gauss_newton import robust
from dss_fast.searching.job import prepare
from dss_fast.searching.prior import CURVATURES, directions
from dss_fast.searching.rounds import Candidate
from dss_fast.trajectory import dense_grid, integrate

from . import rows, zoo
from .search_table import target as shipped

RESULTS = Path(__file__).parent / "results" / "library.jsonl"
SHIPPED = Path(__file__).parents[1] / "dss_fast" / "solvers"
KIND = {**zoo.KIND, "flow": "transformer", "flow16": "conv", "mixture": "mixture", "mixture0.5": "mixture"}
SEED, SAMPLES, CALLS = 31_000, 48, 48  # of the noise that k is chosen on, and of the fine trajectories there
STEP = 2**0.5  # between neighbouring k


class Moved(nn.Module):
    """The velocity of a flow (paper convention) whose data are k times those of a model."""

    def __init__(self, model: nn.Module, k: float) -> None:
        super().__init__()
        self.model, self.k = model, k

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        columns = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        gain = 1 - columns + self.k * columns
        time, state = self.k * columns / gain, x / gain
        x0 = state + (1 - time) * self.model(state, time.flatten().to(t.dtype), **cond)
        found: Tensor = (self.k * x0 - x) / (1 - columns)
        return found


def target(name: str) -> Target:
    """A model of the zoo, or one that is shipped."""
    return replace(zoo.target(name) if name in zoo.NAMES else shipped(name), name=name)


@dataclass(frozen=True, eq=False)
class Member:
    """A model with some samples and where they should go."""

    target: Target
    noise: Tensor
    cond: dict[str, Any]
    last: Tensor

    @classmethod
    def of(cls, name: str, samples: int = SAMPLES, calls: int = CALLS, seed: int = SEED) -> Member:
        one = target(name)
        batch = Draws.of(one, seed).batch("k", 0, samples)
        with torch.no_grad():
            last = integrate(batch.predictor(), batch.noise, dense_grid(one.schedule, calls)).last
        return cls(one, batch.noise, dict(batch.cond), last)

    def error(self, solver: Solver) -> float:
        """RMSE; infinite where it diverges."""
        try:
            found = sample(self.target, self.noise, solver, cond=self.cond)
        except FloatingPointError:
            return math.inf
        return math.sqrt(float(squares(found, self.last).mean()))

    def nearest(self, solver: Solver, k: float = 1.0) -> tuple[float, float]:
        """(error, k) of the table moved to where it errs least, by steps of ``STEP`` from k and one half as long."""
        known: dict[float, float] = {}

        def error(power: float) -> float:
            if power not in known:
                known[power] = self.error(solver.moved(k * STEP**power))
            return known[power]

        best = 0.0
        for step in (1.0, 1.0, 1.0, 1.0, 0.5):
            best = min((best - step, best, best + step), key=error)
        return error(best), k * STEP**best

    def as_if(self, k: float) -> Target:
        """The target whose data are 1 / k as large: what a table does there it does here when moved by k."""
        return replace(self.target, model=Moved(self.target.model, 1 / k))


def joint(names: Sequence[str], num_steps: int, rounds: int, budget: int, seed: int, **about: Any) -> None:
    """A table for all of the models: the best there was after any round, and its row."""
    members = {name: Member.of(name) for name in names}
    solver = find_solver(f"sit-xl-2-256/{num_steps}" if 5 <= num_steps <= 10 else f"ab2/{num_steps}")
    ks, best = dict.fromkeys(names, 1.0), (math.inf, solver, {})
    for number in range(rounds + 1):
        found = {name: member.nearest(solver, ks[name]) for name, member in members.items()}
        middle = math.exp(sum(math.log(k) for _, k in found.values()) / len(found))
        solver, found = solver.moved(middle), {name: (error, k / middle) for name, (error, k) in found.items()}
        mean = math.exp(sum(math.log(error) for error, _ in found.values()) / len(found))
        print(f"N = {num_steps}, round {number}: {mean:.4f}", flush=True)
        best = min(best, (mean, solver, found), key=lambda one: one[0])
        if number < rounds:
            ks = {name: k for name, (_, k) in found.items()}
            targets = [member.as_if(ks[name]) for name, member in members.items()]
            given = {"initial": solver, "budget": budget, "seed": seed + number, "progress": False}
            solver = search(targets, num_steps, **given).solver
    mean, solver, found = best
    row = {"num_steps": num_steps, "budget": budget, "seed": seed, "error": mean, "models": found}
    rows.append(RESULTS, **about, **row, solver=solver.to_dict())


def curvature(solver: Solver, ks: Mapping[str, float], samples: int = 24) -> Tensor:
    """The mean over models of J'J at the table moved to each, over the error there, in coordinates that all share."""
    total: Tensor | None = None
    settings = GaussNewton(samples=samples, held_out_samples=0, loss="end")
    for name, k in ks.items():
        job = prepare(target(name), solver.num_steps, method=settings, budget=1_000_000, seed=SEED)
        _, rounds = begun(job, Ledger(1_000_000))
        space = settings.space_of(job.draws.schedule, solver.num_steps)
        theta = space.theta(solver.moved(k))
        trial = rounds.attempt(Candidate(space, theta, (1.0,)), settings.rounds, len(rounds.train))
        assert trial is not None
        found = rounds.differentiate(trial).matrix / robust(trial.values, trial.scale)
        back = torch.linalg.pinv(directions(space, theta))
        part = back.mT @ found @ back / len(ks)
        total = part if total is None else total + part
    assert total is not None
    return total


def ship() -> None:
    """The newest tables of all models as the package's library."""
    newest = {row["num_steps"]: row for row in rows.read(RESULTS) if not row["leave"]}
    steps, curvatures = {}, {}
    for n, row in sorted(newest.items()):
        models = {name: round(k, 3) for name, (_, k) in row["models"].items()}
        provenance = {
            "searched": "jointly, each model's data as if 1 / k as large",
            "k": models,
            "budget": row["budget"],
        }
        table = replace(
            Solver.from_dict(row["solver"]), name=f"general/{n}", source="dss_fast.library", provenance=provenance
        )
        steps[str(n)] = table.to_dict()
        curvatures[str(n)] = curvature(table, {name: k for name, (_, k) in row["models"].items()}).float()
        print(f"N = {n}", flush=True)
    data = {"source": "dss_fast.library", "library": "python -m benchmarks.library search", "steps": steps}
    save_file(curvatures, CURVATURES)
    (SHIPPED / "general.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "ship"))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--leave", nargs="+", default=[], choices=sorted(set(KIND.values())), help="kinds of models")
    parser.add_argument("--models", nargs="+", default=list(KIND), choices=list(KIND))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=20_000, help="model evaluations of each round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "ship":
        return ship()
    names = [name for name in options.models if KIND[name] not in options.leave]
    for n in options.steps:
        joint(names, n, options.rounds, options.budget, options.seed, leave=sorted(options.leave))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
