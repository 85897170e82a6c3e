"""What a search leaves for people to look at: report.md and its pictures."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distance import Reference, squares, three_digits
from ..files import write_text
from ..methods import handmade
from ..plots import SEARCHED, cells_height, draw_coefficients, draw_timesteps, plot_samples, pyplot, write_figure
from ..sampling import sample
from ..solver import Solver
from ..target import Samples
from .draws import Draws
from .runs import SearchResult
from .teacher import Trajectory, dense_grid, evaluations, integrate

SAMPLES = 32  # a batch of its own, drawn for the report only
REFERENCE_EVALUATIONS = 48  # of its fine trajectories: they err by 0.0006 on the MNIST flow
SCREENED = 8  # of them choose the best hand-made solver
RIVALS = tuple(
    f"{method}@{spacing}" for spacing in ("uniform", "shift3") for method in ("euler", "ab2", "dpmpp_2m", "unip2")
)
HAND_MADE = "#2980b9"


def overview(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """One picture: error over evaluations, then coefficients and timesteps of each solver."""
    solvers = result.solvers
    heights = [3.2, *(cells_height(solver) for solver in solvers.values())]
    figure, axes = pyplot().subplots(
        1 + len(solvers),
        2,
        figsize=(6 + max(heights[1:]), sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, key, title in (
        (axes[0, 0], "loss", "RMSE of the samples searched on"),
        (axes[0, 1], "held_out", "RMSE of the held-out samples"),
    ):
        for n in solvers:
            at, values = result.curve(key, n)
            axis.plot(at, values, marker="." if len(at) < 50 else None, lw=1, label=f"N = {n}")
        axis.set(title=title, xlabel="model evaluations", yscale="log")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    for row, (n, solver) in zip(axes[1:], solvers.items(), strict=True):
        draw_coefficients(row[0], solver, f"N = {n}")
        draw_timesteps(row[1], solver)
    write_figure(figure, path)


@dataclass(frozen=True, eq=False)
class Run:
    """A solver on the report's noise. states: x_1..x_N, (B, N, *S). figures: of the last, see ``Reference.measure``."""

    name: str
    solver: Solver
    states: Tensor
    figures: dict[str, Any]


@torch.no_grad()
def write_report(result: SearchResult, draws: Draws, config: dict[str, Any]) -> Path:
    """report.md in the run folder, with overview.png, stages.png and, where the target decodes, samples-N.png.

    It compares with the best of a few hand-made solvers, on noise of its own that the search's evaluations do not
    include.
    """
    assert result.out is not None
    out, batch = result.out, draws.alone.batch("report", 0, SAMPLES)
    trajectory = integrate(batch.predictor(), batch.noise, dense_grid(batch.schedule, REFERENCE_EVALUATIONS))
    asked = None if batch.target.labels is None else batch.target.labels(batch.cond).cpu()
    reference = Reference(batch.target, trajectory.last, asked)
    runs = {n: (_best(batch, n, reference), _run(batch, s, reference, "searched")) for n, s in result.solvers.items()}
    overview(result, out / "overview.png")
    pictures = [out / "overview.png", _stages(runs, trajectory, out / "stages.png")]
    pictures += _samples(runs, reference, evaluations(trajectory.grid), out)
    lines = [
        f"# Search: {', '.join(f'N = {n}' for n in result.solvers)}, method {config['method']}",
        "",
        f"{result.evaluations:,} model evaluations (forward 1, backward 2, guidance once), this report's not counted.",
        "",
        *_table(result, runs, reference),
        "",
        *(f"![{picture.stem}]({picture.name})\n" for picture in pictures),
        "```json",
        json.dumps(config, indent=1),
        "```",
        "",
    ]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _table(result: SearchResult, runs: dict[int, tuple[Run, Run]], reference: Reference) -> list[str]:
    """The best hand-made solver and the searched one of each N, and what the numbers are."""
    digits = lambda value: "-" if value is None else three_digits(value)  # noqa: E731
    lines = [
        "| N | solver | RMSE | 95 % interval | median | 90 % | switched | Frechet | energy | held-out RMSE |",
        "| --- " * 10 + "|",
    ]
    for n, pair in runs.items():
        _, values = result.curve("held_out", n)
        for run, held_out in zip(pair, (None, min(values, default=None)), strict=True):
            f, name = run.figures, run.name if run is pair[0] else f"[solver-{n}.json](solver-{n}.json)"
            cells = [str(n), name, digits(f["rmse"]), f"{digits(f['rmse_low'])} to {digits(f['rmse_high'])}"]
            cells += [digits(f["median"]), digits(f["p90"])]
            cells += ["-" if f["switched"] is None else f"{100 * f['switched']:.0f} %"]
            cells += [digits(f[key]) for key in ("frechet", "energy")] + [digits(held_out)]
            lines.append(f"| {' | '.join(cells)} |")
    floor = reference.distances()
    switched = (
        "the classifier reads as another class than the reference's"
        if reference.target.classify is not None
        else f"ends further than {three_digits(reference.reach)} from the reference (root mean square, half of the "
        "median distance between two samples)"
    )
    compared = "features" if reference.target.features is not None else "samples"
    lines += [
        "",
        *(f"N = {n}: against {pair[0].name}, {', '.join(_ratios(*pair))}.  " for n, pair in runs.items()),
        "",
        f"RMSE, median and 90 %: root mean square per element to a fine trajectory from the same noise, over all of "
        f"{SAMPLES} samples and of each alone, on noise that the search has not seen. Held-out RMSE: the same unit, on "
        "the noise by which the search chose, against its own teacher. Switched: the share of samples that "
        f"{switched}. Frechet and energy distance of {compared}: to the reference from other noises; two draws of the "
        f"reference of {SAMPLES // 2} noises each are {digits(floor['frechet'])} and {digits(floor['energy'])} apart. "
        f"The best hand-made solver is the best of {', '.join(RIVALS)} on {SCREENED} of the samples. "
        "`dss_fast.compare` measures more solvers on more samples.",
    ]
    return lines


def _ratios(best: Run, mine: Run) -> list[str]:
    return [
        f"{name} x {three_digits(mine.figures[key] / best.figures[key])}"
        for key, name in (("rmse", "RMSE"), ("median", "median"))
        if best.figures[key]
    ]


def _best(batch: Samples, n: int, reference: Reference) -> Run:
    """The hand-made solver of RIVALS that errs least."""
    few = _first(batch, SCREENED)
    errors = {}
    for name in RIVALS:
        method, _, spacing = name.partition("@")
        solver = handmade(method, n, batch.schedule, spacing=spacing)
        errors[solver] = float(squares(_states(few, solver)[:, -1], reference.samples[:SCREENED]).mean())
    best = min(errors, key=lambda solver: errors[solver])
    return _run(batch, best, reference, best.name)


def _first(batch: Samples, count: int) -> Samples:
    """The first samples of a batch."""
    rows = lambda v: v[:count] if isinstance(v, Tensor) and v.ndim and len(v) == len(batch) else v  # noqa: E731
    cond = {key: rows(value) for key, value in batch.cond.items()}
    return replace(batch, noise=batch.noise[:count], cond=cond, scale=rows(batch.scale), size=count)


def _run(batch: Samples, solver: Solver, reference: Reference, name: str) -> Run:
    states = _states(batch, solver)
    return Run(name, solver, states, reference.measure(states[:, -1]))


def _states(batch: Samples, solver: Solver) -> Tensor:
    """The states x_1..x_N, (B, N, *S)."""
    target, scale = batch.target, batch.guidance
    _, states = sample(target, batch.noise, solver, cond=batch.cond, guidance_scale=scale, return_trajectory=True)
    return states[1:].transpose(0, 1)


def _stages(runs: dict[int, tuple[Run, Run]], trajectory: Trajectory, path: Path) -> Path:
    """Where along the way the error arises: of each state, to the fine trajectory at the same u."""
    figure, axes = pyplot().subplots(1, len(runs), figsize=(5 * len(runs), 3.8), squeeze=False, layout="constrained")
    for axis, (n, pair) in zip(axes[0], runs.items(), strict=True):
        for run, color in zip(pair, (HAND_MADE, SEARCHED), strict=True):
            u = torch.tensor(run.solver.timesteps[1:], dtype=torch.float64)
            error = (run.states - trajectory.at(u)).square().flatten(2).mean((0, 2)).sqrt()
            axis.plot(u.tolist(), error.tolist(), marker="o", ms=4, color=color, label=run.name)
        axis.set(title=f"N = {n}", xlabel="u reached (0 noise, 1 data)", ylabel="RMSE of the state", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle("Error of the state after each step, to the fine trajectory at the same u; the end is what counts")
    return write_figure(figure, path)


def _samples(runs: dict[int, tuple[Run, Run]], reference: Reference, calls: int, out: Path) -> list[Path]:
    """Samples of each N side by side, the worst ones below; none where the target does not decode."""
    decode = reference.target.decode
    if decode is None:
        return []
    pictures = []
    for n, pair in runs.items():
        ends = {f"{run.name}, N = {n}" if run is pair[1] else run.name: run.states[:, -1] for run in pair}
        columns = {title: decode(x[:6]) for title, x in ends.items()}
        columns[f"reference, {calls} calls"] = decode(reference.samples[:6])
        worst = {t: torch.cat([decode(part) for part in reference.worst(x, 3)], -1) for t, x in ends.items()}
        pictures.append(plot_samples(columns, out / f"samples-{n}.png", worst=worst))
    return pictures
