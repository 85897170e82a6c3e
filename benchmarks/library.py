"""The library: tables that many models share, each of them moved to it. Rows in benchmarks/results/library.jsonl.

    python -m benchmarks.library search --steps 5 8 10 --rounds 3             # a table of all models
    python -m benchmarks.library search --leave transformer mixer             # of those of other kinds alone
    python -m benchmarks.library search --member networks --rounds 1 --budget 15000   # from that, of networks
    python -m benchmarks.library ship                                         # newest rows to dss_fast/solvers
    python -m benchmarks.library measure --models moons_mixture flow          # with tables of other kinds alone
    python -m benchmarks.library uncalled                                     # the same, moved by no k, for no call
    python -m benchmarks.library members                                      # as they are, and at the best k
    python -m benchmarks.library show --write docs/transfer.md                # their errors, between its marks

A round finds for each model the k at which the table serves it best, and then one table for all of them, each as if its
data were 1 / k as large: what is made small is, in the end, the mean over models of the logarithm of the error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dss_fast import GaussNewton, Solver, Target, find_solver, names, sample, search
from dss_fast.distance import squares
from dss_fast.draws import Draws
from dss_fast.rivals import contest
from dss_fast.searching import prior, starts
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
FRESH, FRESH_SAMPLES = 512_001, 64  # of the noise on which searches are measured
LARGE = ("photos64_conv", "textures32_conv")  # left out of curvatures and members: they take as long as all others
MEMBERS = ("general", "networks")  # that ship: tables of all models, and of networks without the exact mixtures
CHOICE = 2  # which choice of a start, and which library, rows are measured with; those of before are 1
STEP = 2**0.5  # between neighbouring k
USUAL = ("euler", "dpmpp_2m")  # what pipelines of flows run: FlowMatchEuler, or DPM-Solver++ on its spacing


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
    return replace(shipped(name), name=name)


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


def joint(
    models: Sequence[str], num_steps: int, rounds: int, budget: int, seed: int, member: str, leave: Sequence[str]
) -> None:
    """A table for all of the models: the best there was after any round, and its row. Members other than the first
    start from it."""
    members = {name: Member.of(name) for name in models}
    solver = find_solver(f"sit-xl-2-256/{num_steps}" if 5 <= num_steps <= 10 else f"ab2/{num_steps}")
    if member != MEMBERS[0]:
        solver = tables(leave)[MEMBERS[0], num_steps][0]
    ks, best = dict.fromkeys(models, 1.0), (math.inf, solver, {})
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
    rows.append(RESULTS, leave=list(leave), member=member, **row, solver=solver.to_dict())


def tables(leave: Sequence[str]) -> dict[tuple[str, int], tuple[Solver, dict[str, Any]]]:
    """Each member's table and row by N, of libraries that leave these kinds out: the newest of all models, and the
    oldest of others, as those were measured with."""
    found: dict[tuple[str, int], tuple[Solver, dict[str, Any]]] = {}
    for row in rows.read(RESULTS):
        if row.get("leave") == sorted(leave):
            key = row.get("member", MEMBERS[0]), row["num_steps"]
            if not leave or key not in found:
                found[key] = replace(Solver.from_dict(row["solver"]), name="/".join(map(str, key))), row
    return dict(sorted(found.items(), key=lambda one: one[0][1]))


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
    """The newest tables of all models as the package's library, and of networks."""
    curvatures: dict[str, Tensor] = {}
    for member in MEMBERS:
        steps = {}
        for (_, n), (table, row) in ((key, value) for key, value in tables(()).items() if key[0] == member):
            models = {name: k for name, (_, k) in row["models"].items()}
            provenance = {
                "searched": "jointly, each model's data as if 1 / k as large",
                "k": {name: round(k, 3) for name, k in models.items()},
                "budget": row["budget"],
            }
            table = replace(table, source="dss_fast.library", provenance=provenance)
            steps[str(n)] = table.to_dict()
            if member == MEMBERS[0]:
                curvatures[str(n)] = curvature(table, models).float()
            print(f"{member}, N = {n}", flush=True)
        command = (
            "python -m benchmarks.library search"
            + (member != MEMBERS[0]) * f" --member {member} --rounds 1 --budget 15000"
        )
        data = {"source": "dss_fast.library", "library": command, "steps": steps}
        (SHIPPED / f"{member}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    save_file(curvatures, CURVATURES)


def kinds_beside(name: str) -> Sequence[str]:
    """The kinds that the library leaves out to be measured on a model: its own, and the one most like it."""
    return next(kinds for kinds in (("conv", "mixture"), ("mixer", "transformer")) if KIND[name] in kinds)


@contextmanager
def of_other_kinds(name: str) -> Iterator[None]:
    """The package with a library that has seen no model of this one's kind."""
    curvatures, about = {}, {key: entry for key, entry in names._published().items() if "library" not in entry}
    for (member, n), (table, row) in tables(kinds_beside(name)).items():
        if member in MEMBERS:
            entry = about.setdefault(member, {"source": "dss_fast.library", "library": "of other kinds", "steps": {}})
            entry["steps"][str(n)] = table.to_dict()
        if member == MEMBERS[0]:
            models = {model: k for model, (_, k) in row["models"].items() if model not in LARGE}
            curvatures[str(n)] = _curvature(table, tuple(models.items()))
    names._table.cache_clear()
    starts.moved_tables.cache_clear()
    with patch.object(names, "_published", lambda: about), patch.object(prior, "curvatures", lambda: curvatures):
        yield
    names._table.cache_clear()
    starts.moved_tables.cache_clear()


@lru_cache(None)
def _curvature(table: Solver, models: tuple[tuple[str, float], ...]) -> Tensor:
    return curvature(table, dict(models), 16)


def measure(models: Sequence[str], steps: Sequence[int], budgets: Sequence[int], seeds: int) -> None:
    """Rows of searches whose library has seen no model of the kind: RMSE over the best hand-made of all names, on fresh
    noise. Rows that are there already are not measured again."""
    keys = ("model", "num_steps", "budget", "seed", "choice")
    known = {tuple(row.get(key, 1) for key in keys) for row in rows.read(RESULTS) if row.get("kind") == "measure"}
    for name in models:
        cells = [key for key in product([name], steps, budgets, range(seeds), [CHOICE]) if key not in known]
        if not cells:
            continue
        member = Member.of(name, FRESH_SAMPLES, 128, FRESH)

        def squared(solver: Solver, start: int, stop: int, member: Member = member) -> Tensor:
            part = {key: value[start:stop] for key, value in member.cond.items()}
            try:
                found = sample(member.target, member.noise[start:stop], solver, cond=part)
            except FloatingPointError:
                return torch.full((stop - start,), math.inf, dtype=torch.float64)
            return squares(found, member.last[start:stop])

        for n in dict.fromkeys(key[1] for key in cells):
            best, errors = next(iter(contest(squared, member.target.schedule, n, FRESH_SAMPLES).best.items()))
            hand = math.sqrt(float(errors.mean()))
            with of_other_kinds(name):
                for budget, seed in (key[2:4] for key in cells if key[1] == n):
                    found = search(member.target, n, budget=budget, seed=seed, progress=False)
                    told = {"budget": budget, "seed": seed, "choice": CHOICE, "evaluations": found.evaluations}
                    told |= {"start": found.starts[n].name, "ratio": member.error(found.solver) / hand}
                    rows.append(RESULTS, kind="measure", model=name, num_steps=n, handmade=best.name, **told)


def uncalled(models: Sequence[str], steps: Sequence[int]) -> None:
    """Rows of the library's tables as they are, beside what pipelines run: RMSE on fresh noise."""
    for name in models:
        member = Member.of(name, FRESH_SAMPLES, 128, FRESH)
        for n in steps:
            told = {method: member.error(find_solver(f"{method}/{n}", member.target.schedule)) for method in USUAL}
            with of_other_kinds(name):
                told["general"] = member.error(find_solver(f"general/{n}", member.target.schedule))
            rows.append(RESULTS, kind="uncalled", model=name, num_steps=n, **told)


def members(models: Sequence[str], steps: Sequence[int]) -> None:
    """Rows of the RMSE that each table of other kinds leaves on fresh noise, as it is and at the best of the k that a
    search tries; of models whose library has several."""
    for name, n in product(models, steps):
        found = {key[0]: table for key, (table, _) in tables(kinds_beside(name)).items() if key[1] == n}
        if len(found) > 1:
            one = Member.of(name, FRESH_SAMPLES, 128, FRESH)
            unmoved = {member: one.error(table) for member, table in found.items()}
            least = {member: min(one.error(t.moved(k)) for k in starts.SIZES) for member, t in found.items()}
            rows.append(RESULTS, kind="members", model=name, num_steps=n, unmoved=unmoved, least=least)


def show_members() -> str:
    """What the second member leaves of the first one's error, as they are and each at its best k: a row a model."""
    every = {(row["model"], row["num_steps"]): row for row in rows.read(RESULTS) if row.get("kind") == "members"}
    first, second = MEMBERS
    words = {"unmoved": "as it is", "least": "at the best k"}
    columns = [(n, word) for n in sorted({n for _, n in every}) for word in words]
    lines = ["| model | " + " | ".join(f"N = {n}, {words[word]}" for n, word in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    found = {
        model: [every[model, n][word][second] / every[model, n][word][first] for n, word in columns]
        for model in dict.fromkeys(model for model, _ in every)
    }
    lines += [f"| {model} | {' | '.join(f'{value:.2f}' for value in values)} |" for model, values in found.items()]
    means = [f"**{statistics.geometric_mean(values):.2f}**" for values in zip(*found.values(), strict=True)]
    return "\n".join([*lines, f"| geometric mean | {' | '.join(means)} |"])


def show_uncalled() -> str:
    """The library's error over that of each usual method, a row a model; and over the models."""
    every = [row for row in rows.read(RESULTS) if row.get("kind") == "uncalled"]
    columns = sorted({(row["num_steps"], method) for row in every for method in USUAL})
    lines = ["| model | " + " | ".join(f"N = {n}, {method}" for n, method in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    found = {
        (row["model"], row["num_steps"], method): row["general"] / row[method] for row in every for method in USUAL
    }
    for model in dict.fromkeys(row["model"] for row in every):
        lines.append(f"| {model} | " + " | ".join(f"{found[model, *column]:.2f}" for column in columns) + " |")
    means = [
        f"**{statistics.geometric_mean(value for key, value in found.items() if key[1:] == column):.2f}**"
        for column in columns
    ]
    return "\n".join([*lines, f"| geometric mean | {' | '.join(means)} |"])


def show(choice: int = CHOICE) -> str:
    """Geometric means over seeds, a row a model, a column an N and a budget; and over the models."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in rows.read(RESULTS):
        if row.get("kind") == "measure" and row.get("choice", 1) == choice:
            found.setdefault((row["model"], row["num_steps"], row["budget"]), []).append(row["ratio"])
    columns = sorted({(n, budget) for _, n, budget in found})
    lines = ["| model | " + " | ".join(f"N = {n}, {budget:,}" for n, budget in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for model in dict.fromkeys(model for model, _, _ in found):
        cells = [statistics.geometric_mean(found[model, *c]) if (model, *c) in found else None for c in columns]
        lines.append(f"| {model} | " + " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    means, above = [], []
    for column in columns:
        cells = [values for key, values in found.items() if key[1:] == column]
        means.append(f"**{statistics.geometric_mean(map(statistics.geometric_mean, cells)):.2f}**")
        every = [value for values in cells for value in values]
        above.append(f"{sum(value > 1.005 for value in every)} of {len(every)}")
    return "\n".join([*lines, f"| geometric mean | {' | '.join(means)} |", f"| above 1 | {' | '.join(above)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "ship", "measure", "uncalled", "members", "show"))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--leave", nargs="+", default=[], choices=sorted(set(KIND.values())), help="kinds of models")
    parser.add_argument("--models", nargs="+", default=list(KIND), choices=list(KIND))
    parser.add_argument("--member", default=MEMBERS[0], help="the name of the table; 'networks' takes no mixtures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=20_000, help="model evaluations of each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=int, nargs="+", default=[500, 1000, 3000], help="of measured searches")
    parser.add_argument("--seeds", type=int, default=3, help="of measured searches")
    parser.add_argument("--choice", type=int, default=CHOICE, help="the rows that are shown")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    options = parser.parse_args()
    if options.what == "ship":
        return ship()
    if options.what == "measure":
        return measure(options.models, options.steps, options.budgets, options.seeds)
    if options.what == "uncalled":
        return uncalled(options.models, options.steps)
    if options.what == "members":
        return members(options.models, options.steps)
    if options.what == "show":
        rows.written(show_members(), options.write, "members")
        rows.written(show(options.choice), options.write, "library")
        return rows.written(show_uncalled(), options.write, "uncalled")
    chosen = [name for name in options.models if KIND[name] not in options.leave]
    if options.member == "networks":
        chosen = [name for name in chosen if KIND[name] != "mixture" and name not in LARGE]
    for n in options.steps:
        joint(chosen, n, options.rounds, options.budget, options.seed, options.member, sorted(options.leave))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
