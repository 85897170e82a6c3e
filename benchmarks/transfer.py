"""Does a table serve a model that it was not searched on? Rows in benchmarks/results/transfer.jsonl.

    python -m benchmarks.transfer run                            # all pairs of one family, N = 5 and 8, default space
    python -m benchmarks.transfer run --space plain --steps 10 --budget 20000
    python -m benchmarks.transfer run --sources flow+mixture     # one table searched on both, run on all
    python -m benchmarks.transfer run --generality 0.1           # weights on the noise charged for
    python -m benchmarks.transfer show                           # prints the tables
    python -m benchmarks.transfer show --write docs/transfer.md  # puts them between its marks

    python -m benchmarks.transfer moved                          # the same tables, each moved to the column's model

A row's table is searched on its model, or on several, and run on each column's, all of one family. Figures: its RMSE
over that of the best hand-made solver on the column's model (all names, 91 when the rows were made, found as
``compare`` does), on noise that no search draws; below 1 it wins. What is in the rows already is not run again: delete
the file to start over.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dss_fast import GaussNewton, Solver, sample, search
from dss_fast.distance import squares
from dss_fast.draws import Draws
from dss_fast.trajectory import dense_grid, integrate

from . import rows
from .search_table import Fresh, known_best, target

RESULTS = Path(__file__).parent / "results" / "transfer.jsonl"
FLOWS = ("flow", "flow_guided", "flow16", "mixture0.2", "mixture", "mixture0.5")
VPS = ("vp", "vp_guided")
MODELS = (*FLOWS, *VPS)
CHOICE, CHOICE_CALLS, CHOICE_SEED = 8, 48, 52_000  # samples that choose a k, and the fine trajectories' calls
SAMPLES, MIXTURE_SAMPLES = 256, 2048  # the mixture's error is in few samples, and it is cheap


def measured() -> list[dict[str, Any]]:
    """The rows; the first of them are of searches that had no generality."""
    return [{"generality": 0.0, **row} for row in rows.read(RESULTS)]


def found(**key: Any) -> dict[str, Any] | None:
    """The row that says this already."""
    return next((row for row in reversed(measured()) if all(row.get(k) == v for k, v in key.items())), None)


@dataclass(frozen=True)
class Settings:
    """Of the searches of a matrix."""

    space: str
    budget: int
    seed: int = 0
    generality: float = 0.0


def table(source: str, num_steps: int, settings: Settings) -> Solver:
    """The table of a search on a model."""
    key = {"kind": "search", "source": source, "num_steps": num_steps, **asdict(settings)}
    row = found(**key)
    if row is None:
        method = GaussNewton(space=settings.space, generality=settings.generality)
        options = {"method": method, "budget": settings.budget, "seed": settings.seed, "progress": False}
        result = search([target(name) for name in source.split("+")], num_steps, **options)
        row = rows.append(RESULTS, **key, evaluations=result.evaluations, solver=result.solver.to_dict())
    return Solver.from_dict(row["solver"])


def run(models: list[str], sources: list[str], steps: list[int], settings: Settings) -> None:
    searched = {(name, n): table(name, n, settings) for n in steps for name in sources}
    for column in models:
        fresh: Fresh | None = None
        for n in steps:
            about = {"target": column, "num_steps": n}
            mine = [name for name in sources if (name.split("+")[0] in VPS) == (column in VPS)]
            pairs = [{"kind": "pair", "source": name, **asdict(settings), **about} for name in mine]
            for key in ({"kind": "handmade", **about}, *pairs):
                if found(**key) is not None:
                    continue
                if fresh is None:
                    fresh = Fresh(column, MIXTURE_SAMPLES if column.startswith("mixture") else SAMPLES)
                solver = known_best(column, n) if key["kind"] == "handmade" else searched[key["source"], n]
                rows.append(RESULTS, **key, name=solver.name, samples=fresh.count, **fresh.row(solver))


def nearest(solver: Solver, column: str, samples: int = CHOICE, between: int = 1) -> Solver:
    """The table moved to where it errs least on a few samples of a model, of nine sizes of the data from 1/4 to 4, or
    of ``between`` times as fine a grid."""
    draws = Draws.of(target(column), CHOICE_SEED)
    batch, schedule = draws.batch("k", 0, samples), draws.schedule
    with torch.no_grad():
        last = integrate(batch.predictor(), batch.noise, dense_grid(schedule, CHOICE_CALLS)).last

    def error(table: Solver) -> float:
        try:
            return float(squares(sample(draws.target, batch.noise, table, cond=batch.cond), last).mean())
        except FloatingPointError:
            return math.inf

    powers = [place / (2 * between) for place in range(-4 * between, 4 * between + 1)]
    return min((solver.moved(2**power, schedule) for power in powers), key=error)


def moved(models: list[str], sources: list[str], steps: list[int], settings: Settings) -> None:
    """Rows of tables on models that they were not searched on, moved there by the k that some samples choose."""
    for column in models:
        fresh: Fresh | None = None
        for n in steps:
            for name in sources:
                about = {"source": name, **asdict(settings), "target": column, "num_steps": n}
                if name == column or found(kind="moved", **about) is not None:
                    continue
                if fresh is None:
                    fresh = Fresh(column, MIXTURE_SAMPLES if column.startswith("mixture") else SAMPLES)
                best = nearest(table(name, n, settings), column)
                k = best.provenance.get("moved", 1.0)
                rows.append(RESULTS, kind="moved", **about, k=k, samples=fresh.count, **fresh.row(best))


def show(measure: str = "rmse") -> str:
    """A matrix for each N, space and budget, the newest rows; worst and geometric mean off the diagonal."""
    every = measured()
    hand = {(r["target"], r["num_steps"]): r for r in every if r["kind"] == "handmade"}
    groups: dict[tuple, dict[tuple[str, str], float]] = {}
    for r in every:
        if r["kind"] in ("pair", "moved"):
            settings = Settings(**{f.name: r[f.name] for f in fields(Settings)})
            group = groups.setdefault((r["num_steps"], *astuple(settings), r["kind"] == "moved"), {})
            group[r["source"], r["target"]] = r[measure] / hand[r["target"], r["num_steps"]][measure]
    parts = []
    for (n, space, budget, seed, generality, carried), cells in sorted(groups.items()):
        known = {source for source, _ in cells}
        sources = [*(name for name in MODELS if name in known), *sorted(known - set(MODELS))]
        columns = [name for name in MODELS if any(name == column for _, column in cells)]
        verb = "moved" if carried else "run"
        command = f"python -m benchmarks.transfer {verb} --steps {n} --space {space} --budget {budget} --seed {seed}"
        command += f" --generality {generality}" if generality else ""
        title = f"N = {n}, space `{space}`" + (f", generality {generality}" if generality else "")
        title += ", moved" if carried else ""
        lines = [f"{title}: `{command}`", "", f"| searched on | {' | '.join(columns)} |"]
        lines.append("| --- " * (len(columns) + 1) + "|")
        best = [f"{hand[name, n][measure]:.4f}" for name in columns]
        for source in sources:
            text = [f"{cells[source, name]:.2f}" if (source, name) in cells else "" for name in columns]
            own = source.split("+")
            bold = [f"**{cell}**" if name in own else cell for cell, name in zip(text, columns, strict=True)]
            lines.append(f"| {source} | {' | '.join(bold)} |")
        lines.append(
            f"| *{measure.upper() if measure == 'rmse' else measure} of the best hand-made* | {' | '.join(best)} |"
        )
        for words, several in (("a table of one model", False), ("a table of several", True)):
            away = [
                ratio
                for (source, column), ratio in cells.items()
                if ("+" in source) == several and column not in source.split("+")
            ]
            if away:
                lost, mean = sum(ratio > 1 for ratio in away), math.exp(sum(map(math.log, away)) / len(away))
                lines += [
                    "",
                    f"On other models, {words}: geometric mean {mean:.2f}, worst {max(away):.2f}, "
                    f"{lost} of {len(away)} above 1.",
                ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "moved", "show"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sources", nargs="+", help="searched on: models, or several joined by +; default: --models")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--space", default=GaussNewton().space)
    parser.add_argument("--generality", type=float, default=0.0)
    parser.add_argument("--budget", type=int, default=20_000, help="model evaluations of each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", default="rmse", choices=("rmse", "median"))
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    options = parser.parse_args()
    if options.what != "show":
        settings = Settings(options.space, options.budget, options.seed, options.generality)
        measure = run if options.what == "run" else moved
        return measure(options.models, options.sources or options.models, options.steps, settings)
    rows.written(show(options.measure), options.write, "transfer")


if __name__ == "__main__":
    main()
