"""The pictures of docs/concepts.md and docs/tutorial.md.

    python -m scripts.pictures --out docs/pictures        # about two minutes on two cores

Everything is computed here, on exact flows of mixtures of Gaussians and on the tutorial's own network.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dss_fast import VP, DiscreteVP, Flow, Solver, Target, find_solver, sample, search
from dss_fast.distance import squares
from dss_fast.draws import Draws
from dss_fast.plots import OTHERS, SEARCHED, draw_coefficients, draw_timesteps, pyplot
from dss_fast.searching.budget import Ledger
from dss_fast.searching.starts import candidates, rounds_of
from dss_fast.searching.teacher import Teacher
from examples.mixture import Mixture, digits

ROOT = Path(__file__).parent.parent
DPI = 100


def schedules(path: Path) -> None:
    """alpha and sigma of four schedules over u."""
    figure, axes = pyplot().subplots(figsize=(6.4, 3.4), layout="constrained")
    u = torch.linspace(0, 1, 201, dtype=torch.float64)
    shown = {
        "Flow()": Flow(),
        "Flow(shift=3)": Flow(shift=3.0),
        "VP()": VP(),
        "DiscreteVP.scaled_linear()": DiscreteVP.scaled_linear(),
    }
    for (name, schedule), color in zip(shown.items(), OTHERS, strict=False):
        alpha, sigma = schedule.alpha_sigma(u)
        axes.plot(u, alpha, color=color, label=name)
        axes.plot(u, sigma, color=color, ls="--")
    axes.set(xlabel="u: 0 noise, 1 data", ylabel="alpha (solid), sigma (dashed)")
    _finish(figure, axes, path)


def trajectories(path: Path) -> None:
    """A flow in one dimension: where it goes, and where solvers of 5 calls go from the same noise."""
    flow = Mixture(torch.tensor([[-1.0], [0.4], [1.2]]), 0.12)
    target = Target(flow, (1,), Flow())
    mine = search(target, 5, budget=40_000, progress=False).solver
    noise = torch.linspace(-2.2, 2.2, 23)[:, None]
    _, fine = sample(target, noise, "ab4/200", return_trajectory=True)
    names = {"euler/5": find_solver("euler/5"), "ab2/5": find_solver("ab2/5"), "searched, 5 calls": mine}
    figure, axes = pyplot().subplots(1, 3, figsize=(10.5, 3.4), sharey=True, layout="constrained")
    for axis, (name, solver), color in zip(axes, names.items(), (*OTHERS[:2], SEARCHED), strict=True):
        axis.plot(torch.linspace(0, 1, 201), fine[:, :, 0], color="0.75", lw=0.8)
        _, states = sample(target, noise[3::4], solver, return_trajectory=True)
        axis.plot(solver.timesteps, states[:, :, 0], color=color, marker="o", ms=4, lw=1.4)
        _, exact = sample(target, noise[3::4], "ab4/200", return_trajectory=True)
        error = math.sqrt(float(squares(states[-1], exact[-1]).mean()))
        axis.set(title=f"{name}: ends {error:.3f} off", xlabel="u: 0 noise, 1 data")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="x")
    _save(figure, path)


def tables(path: Path) -> None:
    """Three textbook solvers and a learned one as what they are: timesteps and a lower triangle."""
    shown = [find_solver(name) for name in ("euler/5", "ab2/5", "dpmpp_2m/5@lambda", "sit-xl-2-256/5")]
    figure, axes = pyplot().subplots(2, 4, figsize=(13, 4.4), height_ratios=[3, 1.1], layout="constrained")
    for column, solver in zip(axes.T, shown, strict=True):
        draw_coefficients(column[0], solver, solver.name)
        draw_timesteps(column[1], solver)
        column[1].get_legend().remove()
    _save(figure, path)


def ladder(path: Path, budget: int = 60_000) -> None:
    """A search from inside: candidates by successive halving, then the rounds of Gauss-Newton."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    _halving(left)
    result = search(digits(), 5, budget=budget, progress=False)
    rounds = [e for e in result.history if e.stage == "gauss-newton"]
    accepted = [e for e in rounds if e.accepted]
    right.plot(*result.curve("loss", 5), color="0.5", marker=".", label="samples searched on")
    right.plot(*result.curve("held_out", 5), color=SEARCHED, marker="o", ms=4, label="held-out samples")
    started = next(e.evaluations for e in result.history if e.stage == "start")
    for low, high, name in (
        (0, started, "teacher, start"),
        (started, rounds[-1].evaluations, f"Gauss-Newton: {len(accepted)} rounds accepted of {len(rounds)}"),
    ):
        right.axvspan(low, high, color="#2980b9" if low else "0.5", alpha=0.08, lw=0)
        at = (low + high) / 2 if low else high / 2
        right.text(at, 1.01, name, transform=right.get_xaxis_transform(), ha="center", fontsize=8)
    right.set(xlabel="model evaluations", ylabel="RMSE at the end", yscale="log")
    _finish(figure, right, path)


def _halving(axes: Any) -> None:
    """Each candidate's error on as many samples as it was given."""
    target, n, most = digits(), 5, 27
    draws = Draws.of(target, 0)
    teacher = Teacher(draws, Ledger(None), "train", 2 * most, 2 * most, 24)
    batch, trajectory = teacher[0]
    left = candidates(draws.schedule, n, {})
    squared = {one: squares(sample(target, batch.noise[:most], one), trajectory.last[:most]) for one in left}
    errors: dict[Solver, float] = {}
    for count, kept in rounds_of(len(left), 1 << 30, most):
        left = sorted(left, key=lambda one: errors.get(one, 0.0))[:kept]
        errors = {one: math.sqrt(float(squared[one][:count].mean())) for one in left}
        axes.plot([count] * len(left), list(errors.values()), "o", ms=4, alpha=0.3, color=OTHERS[0], mec="none")
        axes.annotate(f"{len(left)}", (count, 0.98), fontsize=7.5, ha="center", va="top",
                      xycoords=("data", "axes fraction"))  # fmt: skip
    best = min(errors, key=lambda solver: errors[solver])
    axes.annotate(best.name, (count, errors[best]), xytext=(-6, -12), textcoords="offset points", ha="right",
                  fontsize=8, color=SEARCHED)  # fmt: skip
    axes.plot(count, errors[best], "o", ms=6, color=SEARCHED)
    axes.set(xscale="log", yscale="log", xlabel="samples each table was run on; above: tables",
             ylabel="RMSE at the end", xlim=(0.6, 48), ylim=(None, 3),
             xticks=[1, 3, 9, 27], xticklabels=["1", "3", "9", "27"])  # fmt: skip
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def tutorial(path: Path) -> None:
    """The samples that the tutorial's own blocks compare."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "tutorial"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            exec(compile(block, "docs/tutorial.md", "exec"), names)
        shutil.copy("out/digits/compare.png", path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    pyplot().close(figure)


PICTURES = {f.__name__: f for f in (schedules, trajectories, tables, ladder, tutorial)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="where the pictures go")
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], help="only these")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        PICTURES[name](options.out / f"{name}.png")
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
