"""The library: tables that many models share, each of them moved to it. Rows in benchmarks/results/library.jsonl.

    python -m benchmarks.library search --steps 5 8 10 --rounds 3             # a table of all models
    python -m benchmarks.library search --leave transformer mixer             # of those of other kinds alone
    python -m benchmarks.library ship                                         # newest rows to dss_fast/solvers

A round finds for each model the k at which the table serves it best, and then one table for all of them, each as if its
data were 1 / k as large: what is made small is, in the end, the mean over models of the logarithm of the error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dss_fast import Solver, Target, find_solver, sample, search
from dss_fast.distance import squares
from dss_fast.draws import Draws
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
    """A table for all of the models, and a row of each round."""
    members = {name: Member.of(name) for name in names}
    solver = find_solver(f"sit-xl-2-256/{num_steps}" if 5 <= num_steps <= 10 else f"ab2/{num_steps}")
    ks = dict.fromkeys(names, 1.0)
    for number in range(rounds):
        found = {name: member.nearest(solver, ks[name]) for name, member in members.items()}
        middle = math.exp(sum(math.log(k) for _, k in found.values()) / len(found))
        solver, ks = solver.moved(middle), {name: k / middle for name, (_, k) in found.items()}
        targets = [member.as_if(ks[name]) for name, member in members.items()]
        result = search(targets, num_steps, initial=solver, budget=budget, seed=seed + number, progress=False)
        solver = result.solver
        errors = {name: (member.error(solver.moved(ks[name])), ks[name]) for name, member in members.items()}
        mean = sum(math.log(error / found[name][0]) for name, (error, _) in errors.items()) / len(errors)
        row = {"num_steps": num_steps, "round": number, "budget": budget, "seed": seed, "models": errors}
        rows.append(RESULTS, **about, **row, solver=solver.to_dict())
        print(f"N = {num_steps}, round {number}: {math.exp(mean):.3f} of the error before", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search",))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--leave", nargs="+", default=[], choices=sorted(set(KIND.values())), help="kinds of models")
    parser.add_argument("--models", nargs="+", default=list(KIND), choices=list(KIND))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=20_000, help="model evaluations of each round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = [name for name in options.models if KIND[name] not in options.leave]
    for n in options.steps:
        joint(names, n, options.rounds, options.budget, options.seed, leave=sorted(options.leave))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
