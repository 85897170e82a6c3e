"""A table of one resolution at another: moved by the ratio of the sides. Rows in benchmarks/results/resolutions.jsonl.

    python -m benchmarks.resolutions run                          # pairs of networks of the same data at two sizes
    python -m benchmarks.resolutions show --write docs/transfer.md

Each pair's networks know the same images at two sizes, and nothing else of each other: one is an MLP, a mixer or a
U-Net where the other is a mixer or a transformer. The table is searched at one size and moved by k = the ratio of the
sides, no call, or by the best of nine k on eight samples. Figures: RMSE on noise that no search draws, over that of a
search of as many evaluations at the size itself, and of the best hand-made solver there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dss_fast import search

from . import rows
from .search_table import Fresh, best_of, target
from .transfer import nearest

RESULTS = Path(__file__).parent / "results" / "resolutions.jsonl"
SIDES = {"digits8_mlp": 8, "digits16_mixer": 16, "digits24_dit": 24, "flow16": 16, "flow": 28}
PAIRS = (
    ("digits8_mlp", "digits16_mixer"), ("digits16_mixer", "digits8_mlp"), ("digits16_mixer", "digits24_dit"),
    ("digits24_dit", "digits16_mixer"), ("flow16", "flow"), ("flow", "flow16"),
)  # fmt: skip


def run(steps: list[int], budget: int, seed: int) -> None:
    """Appends a row for each pair and N that is not there yet."""
    about = {"budget": budget, "seed": seed}
    known = rows.read(RESULTS)
    for n in steps:
        found = {}
        for source, column in PAIRS:
            key = {"source": source, "target": column, "num_steps": n, **about}
            if any(key.items() <= row.items() for row in known):
                continue
            for name in (source, column):
                if name not in found:
                    found[name] = search(target(name), n, budget=budget, seed=seed, progress=False).solver
            fresh, k = Fresh(column), SIDES[column] / SIDES[source]
            schedule = fresh.target.schedule
            chosen = nearest(found[source], column)
            tables = {
                "own": found[column],
                "as_it_is": found[source].moved(1.0, schedule),
                "by_ratio": found[source].moved(k, schedule),
                "by_choice": chosen,
            }
            errors = {word: fresh.row(table)["rmse"] for word, table in tables.items()}
            errors["handmade"] = best_of(fresh, n)[0]["rmse"]
            rows.append(RESULTS, **key, ratio=k, chosen=chosen.provenance.get("moved", 1.0), **errors)


def show() -> str:
    """A line for each pair and N."""
    words = ("as it is", "by the ratio", "by the best of nine k")
    lines = [f"| searched at | run at | N | {' | '.join(words)} | best hand-made |", "| --- " * 7 + "|"]
    for r in rows.read(RESULTS):
        sides = [f"{name} ({SIDES[name]})" for name in (r["source"], r["target"])]
        cells = [f"{r[word] / r['own']:.2f}" for word in ("as_it_is", "by_ratio", "by_choice", "handmade")]
        cells[1] += f" (k = {r['ratio']:.3g})"
        cells[2] += f" (k = {r['chosen']:.3g})"
        lines.append(f"| {sides[0]} | {sides[1]} | {r['num_steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--budget", type=int, default=20_000, help="model evaluations of each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    options = parser.parse_args()
    if options.what == "run":
        return run(options.steps, options.budget, options.seed)
    rows.written(show(), options.write, "resolutions")


if __name__ == "__main__":
    main()
