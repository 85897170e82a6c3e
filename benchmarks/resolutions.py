"""A table of one resolution at another: moved by the ratio of the sides. Rows in benchmarks/results/resolutions.jsonl.

    python -m benchmarks.resolutions run                          # pairs of networks of the same data at two sizes
    python -m benchmarks.resolutions start --seeds 0 1            # small searches from the moved tables
    python -m benchmarks.resolutions again --seeds 1              # other seeds of the search that figures are over
    python -m benchmarks.resolutions show --write docs/transfer.md

Each pair's networks know the same images at two sizes, and nothing else of each other: one is an MLP, a mixer or a
U-Net where the other is a mixer or a transformer. The table is searched at one size and moved by k: the ratio of the
sides, no call; the best of nine k on eight samples, or of 17 on 32; or, to know what any choice of k could give, the
best of 21 on the noise that it is measured on. Then it is where a small search at the other size begins, beside one
that begins at the library.

Figures: RMSE on noise that no search draws, over that of a search of as many evaluations at the size itself. The
library that searches begin at has seen no model of the target's kind (library.py).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from dss_fast import Solver, search
from dss_fast.rivals import contest, halved

from . import rows
from .library import KIND, of_other_kinds
from .search_table import Fresh, target
from .transfer import nearest

RESULTS = Path(__file__).parent / "results" / "resolutions.jsonl"
SIDES = {"digits8_mlp": 8, "digits16_mixer": 16, "digits24_dit": 24, "flow16": 16, "flow": 28}
PAIRS = (
    ("digits8_mlp", "digits16_mixer"), ("digits16_mixer", "digits8_mlp"), ("digits16_mixer", "digits24_dit"),
    ("digits24_dit", "digits16_mixer"), ("flow16", "flow"), ("flow", "flow16"),
)  # fmt: skip
POWERS = [place / 4 for place in range(-10, 11)]  # of 2: the k of the best choice there could be, .18 to 5.7
MORE, FINER = 32, 2  # samples, and k between two of the nine, of the dearer choice
SMALL = (1000, 3000)  # evaluations of searches from a moved table


def unseen(name: str) -> str:
    """The kinds of which the library that serves a model has seen none: two libraries, each for two kinds."""
    return "conv+mixture" if KIND[name] in ("conv", "mixture") else "mixer+transformer"


def found(**key: Any) -> dict[str, Any] | None:
    """The newest row that says this already."""
    return next((row for row in reversed(rows.read(RESULTS)) if key.items() <= row.items()), None)


def table(name: str, column: str, num_steps: int, budget: int, seed: int) -> Solver:
    """The table of a search on a model, with the library that serves the column's."""
    key = {"kind": "search", "model": name, "num_steps": num_steps, "budget": budget, "seed": seed}
    key["unseen"] = unseen(column)
    row = found(**key)
    if row is None:
        with of_other_kinds(column):
            result = search(target(name), num_steps, budget=budget, seed=seed, progress=False)
        row = rows.append(RESULTS, **key, evaluations=result.evaluations, solver=result.solver.to_dict())
    return Solver.from_dict(row["solver"])


@lru_cache(1)
def fresh_of(name: str) -> Fresh:
    """The held-out noise; a pair's N share it."""
    return Fresh(name)


def handmade(name: str, num_steps: int) -> float:
    """RMSE of the best hand-made table of all names; its row says how many there were."""
    key = {"kind": "handmade", "model": name, "num_steps": num_steps}
    row = found(**key)
    if row is None:
        fresh = fresh_of(name)
        best = contest(fresh.squares, fresh.target.schedule, num_steps, fresh.count)
        solver, errors = next(iter(best.best.items()))
        about = {"solver": solver.name, "names": best.tried}
        row = rows.append(RESULTS, **key, **about, rmse=math.sqrt(float(errors.mean())))
    return float(row["rmse"])


def best_k(solver: Solver, fresh: Fresh, ratio: float) -> tuple[float, float]:
    """The k that serves best on the noise of the figures itself, and the RMSE there."""
    schedule = fresh.target.schedule
    tables = {solver.moved(k, schedule): k for k in (ratio, *(2**power for power in POWERS))}
    best, errors = next(iter(halved(fresh.squares, list(tables), fresh.count).items()))
    return tables[best], math.sqrt(float(errors.mean()))


def run(steps: list[int], budget: int, seed: int) -> None:
    """Appends a row for each pair and N that is not there yet."""
    for source, column in PAIRS:
        for n in steps:
            key = {"kind": "pair", "source": source, "target": column, "num_steps": n, "budget": budget, "seed": seed}
            if found(**key) is not None:
                continue
            own, theirs = (table(name, column, n, budget, seed) for name in (column, source))
            fresh, ratio = fresh_of(column), SIDES[column] / SIDES[source]
            schedule = fresh.target.schedule
            few, more = nearest(theirs, column), nearest(theirs, column, MORE, FINER)
            tables = {
                "own": own,
                "as_it_is": theirs.moved(1.0, schedule),
                "by_ratio": theirs.moved(ratio, schedule),
                "by_choice": few,
                "by_more": more,
            }
            errors = {word: fresh.row(solver)["rmse"] for word, solver in tables.items()}
            errors["handmade"] = handmade(column, n)
            k, errors["by_best"] = best_k(theirs, fresh, ratio)
            chosen = {"chosen": few.provenance.get("moved", 1.0), "chosen_more": more.provenance.get("moved", 1.0)}
            rows.append(RESULTS, **key, ratio=ratio, **chosen, best=k, **errors)


def start(steps: list[int], budget: int, seed: int, seeds: list[int]) -> None:
    """Appends rows of small searches from each moved table, and from the library."""
    for source, column in PAIRS:
        for n in steps:
            initial = table(source, column, n, budget, seed).moved(SIDES[column] / SIDES[source])
            for small in SMALL:
                for one in seeds:
                    about = {"target": column, "num_steps": n, "budget": small, "seed": one}
                    moved = {"source": source, "searched": budget, "searched_seed": seed}
                    for begin, key in ((initial, {**about, **moved}), (None, {**about, "source": None})):
                        if found(kind="start", **key) is not None:
                            continue
                        with of_other_kinds(column):
                            given = {"initial": begin, "budget": small, "seed": one, "progress": False}
                            result = search(target(column), n, **given)
                        error = fresh_of(column).row(result.solver)["rmse"]
                        rows.append(RESULTS, kind="start", **key, evaluations=result.evaluations, rmse=error)


def again(steps: list[int], budget: int, seeds: list[int]) -> None:
    """Appends rows of searches of other seeds at the size itself, which say how far the figure they are over varies."""
    for column in dict.fromkeys(column for _, column in PAIRS):
        for n in steps:
            for seed in seeds:
                key = {"kind": "again", "target": column, "num_steps": n, "budget": budget, "seed": seed}
                if found(**key) is None:
                    error = fresh_of(column).row(table(column, column, n, budget, seed))["rmse"]
                    rows.append(RESULTS, **key, rmse=error)


def show() -> str:
    """Two tables with a line for each pair and N: for no search at the other size, and with a small one there."""
    every = rows.read(RESULTS)
    pairs = {(r["source"], r["target"], r["num_steps"]): r for r in every if r.get("kind") == "pair"}
    small: dict[tuple[Any, ...], dict[int, float]] = {}
    for r in every:
        if r.get("kind") in ("start", "again"):
            key = (r.get("source", r["kind"]), r["target"], r["num_steps"], r["budget"])
            small.setdefault(key, {})[r["seed"]] = r["rmse"]

    def word(name: str, k: str = "") -> Callable[[dict[str, Any]], tuple[float, str]]:
        return lambda r: (r[name] / r["own"], f" (k = {r[k]:.3g})" if k else "")

    def after(budget: int | None, begin: str | None) -> Callable[[dict[str, Any]], tuple[float, str]]:
        def cell(r: dict[str, Any]) -> tuple[float, str]:
            source = r["source"] if begin == "moved" else begin
            seeds = small.get((source, r["target"], r["num_steps"], budget or r["budget"]), {})
            return statistics.geometric_mean(seeds.values()) / r["own"] if seeds else math.nan, ""

        return cell

    calls = {
        "as it is": word("as_it_is"),
        "by the ratio": word("by_ratio", "ratio"),
        "by the best of 9 k, 8 samples": word("by_choice", "chosen"),
        "of 17 k, 32 samples": word("by_more", "chosen_more"),
        "by the best k there is": word("by_best", "best"),
        "best hand-made": word("handmade"),
    }
    searches = {"own search, other seeds": after(None, "again"), "moved, 0": word("by_ratio")}
    for budget in SMALL:
        searches[f"moved, {budget:,}"] = after(budget, "moved")
        searches[f"library, {budget:,}"] = after(budget, None)
    return "\n\n".join(_lines(list(pairs.values()), columns) for columns in (calls, searches))


def _lines(pairs: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], tuple[float, str]]]) -> str:
    """A table, and below it the geometric means and how many cells are within 1.1."""
    lines = [f"| searched at | run at | N | {' | '.join(columns)} |", "| --- " * (3 + len(columns)) + "|"]
    values: dict[str, list[float]] = {name: [] for name in columns}
    without: dict[str, list[float]] = {name: [] for name in columns}
    for r in sorted(pairs, key=lambda r: (r["num_steps"], PAIRS.index((r["source"], r["target"])))):
        cells = []
        for name, of in columns.items():
            value, text = of(r)
            if math.isnan(value):
                cells.append("")
                continue
            cells.append(f"{value:.2f}{text}")
            values[name].append(value)
            if "digits8_mlp" not in (r["source"], r["target"]):
                without[name].append(value)
        sides = [f"{name} ({SIDES[name]})" for name in (r["source"], r["target"])]
        lines.append(f"| {sides[0]} | {sides[1]} | {r['num_steps']} | {' | '.join(cells)} |")
    for title, group in (("geometric mean", values), ("without the MLP", without)):
        means = [f"**{statistics.geometric_mean(some):.2f}**" if some else "" for some in group.values()]
        lines.append(f"| {title} | | | {' | '.join(means)} |")
    for title, group in (("within 1.1", values), ("without the MLP", without)):
        within = [f"{sum(value <= 1.1 for value in some)} of {len(some)}" for some in group.values()]
        lines.append(f"| {title} | | | {' | '.join(within)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "start", "again", "show"))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--budget", type=int, default=20_000, help="evaluations of each search at the size itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of small or other searches")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    options = parser.parse_args()
    if options.what == "run":
        return run(options.steps, options.budget, options.seed)
    if options.what == "start":
        return start(options.steps, options.budget, options.seed, options.seeds)
    if options.what == "again":
        return again(options.steps, options.budget, options.seeds)
    rows.written(show(), options.write, "resolutions")


if __name__ == "__main__":
    main()
