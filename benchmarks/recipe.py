"""The paper's recipe against every hand-made solver, on the shipped MNIST flow and VP models.

    python -m benchmarks.recipe            # about 25 minutes on two cores; rows to benchmarks/results/recipe.csv

Searches N = 5 and N = 10 together with ``Lion`` on ``UNIQUE`` noises seen five times, then measures
all solvers on fresh noise. Hand-made solvers run on every spacing they are used with.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dss_fast import Lion, compare, search
from examples import mnist

STEPS = (5, 10)
UNIQUE, EPOCHS = 1024, 5
METHODS = ("euler", "ab2", "ab3", "ab4", "dpmpp_2m", "dpmpp_3m", "unip2", "unip3", "deis", "deis3")
SPACINGS = {
    "flow": ("uniform", "lambda", "karras", "shift0.5", "shift3"),
    "vp": ("uniform", "lambda", "karras"),
}
RESULTS = Path(__file__).parent / "results" / "recipe.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["flow", "vp"], choices=["flow", "vp"])
    parser.add_argument("--samples", type=int, default=128, help="fresh noises to measure on")
    options = parser.parse_args()
    for model in options.models:
        target = replace(getattr(mnist, model)(), name="lion")
        result = search(target, STEPS, method=Lion(samples=UNIQUE * EPOCHS, unique_samples=UNIQUE))
        names = [f"{m}/{n}@{s}" for n in STEPS for m in METHODS for s in SPACINGS[model]]
        table = compare(target, [*names, *result.solvers.values()], samples=options.samples)
        print(f"{model}, {result.evaluations} model evaluations\n{table}\n")
        stamp = {
            "model": f"mnist {model}",
            "evaluations": result.evaluations,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }
        _replace(stamp["model"], [{**stamp, **asdict(r)} for r in table.rows])


def _replace(model: str, new: list[dict[str, Any]]) -> None:
    """The rows of one model in the results, the others kept."""
    kept = [r for r in csv.DictReader(RESULTS.open()) if r["model"] != model] if RESULTS.exists() else []
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]))
        writer.writeheader()
        writer.writerows(kept + new)


if __name__ == "__main__":
    main()
