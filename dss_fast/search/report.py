"""What a search leaves for people to look at: report.md and its pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..handmade import handmade
from ..plots import draw_coefficients, draw_timesteps, plot_samples, pyplot, write_figure
from ..problem import Batch, Problem
from ..sampling import sample
from ..solver import Solver, write_atomically
from ..teacher import dense_grid, evaluations, integrate

SAMPLES = 16  # a batch of its own, drawn for the pictures only


def overview(result, path: str | os.PathLike) -> None:
    """One picture: error over evaluations, then coefficients and timesteps of each solver."""
    count = len(result.solvers)
    figure, axes = pyplot().subplots(1 + count, 2, figsize=(11, 3.2 * (1 + count)), squeeze=False, layout="constrained")
    for axis, key, title in (
        (axes[0, 0], "loss", "training loss"),
        (axes[0, 1], "held_out", "held-out error"),
    ):
        for n in result.solvers:
            at, values = result.curve(key, n)
            axis.plot(at, values, marker="." if len(at) < 50 else None, lw=1, label=f"N = {n}")
        axis.set(title=title, xlabel="model evaluations", yscale="log")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    for row, (n, solver) in zip(axes[1:], result.solvers.items(), strict=True):
        draw_coefficients(row[0], solver, f"N = {n}")
        draw_timesteps(row[1], solver)
    write_figure(figure, path)


def write_report(result, problem: Problem, config: dict, *, decode: Callable | None = None) -> Path:
    """report.md in the run folder, with overview.png, stages.png and, given decode, samples-N.png.

    The pictures take SAMPLES trajectories of their own, which the search's evaluations do not include.
    """
    out = Path(result.out)
    spent = problem.evaluations
    try:
        pictures, errors = _pictures(result, problem, decode, out)
    finally:
        problem.evaluations = spent
    lines = [f"# Search: {', '.join(f'N = {n}' for n in result.solvers)}, method {config['method']}", ""]
    lines += [
        f"{result.evaluations:,} model evaluations (forward 1, backward 2, guidance once). "
        f"The pictures took {SAMPLES} more samples, not counted.",
        "",
        "| N | held-out error, first | held-out error, best | end-point RMSE here, before | after | solver |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for n in result.solvers:
        _, values = result.curve("held_out", n)
        first, best = (f"{values[0]:.4g}", f"{min(values):.4g}") if values else ("", "")
        before, after = errors[n]
        lines.append(f"| {n} | {first} | {best} | {before:.4g} | {after:.4g} | [solver-{n}.json](solver-{n}.json) |")
    lines += [
        "",
        f"Before: Euler (DDIM) on equal steps. RMSE to the fine trajectory, {SAMPLES} samples, per element.",
        "",
        *(f"![{picture.stem}]({picture.name})\n" for picture in pictures),
        "```json",
        json.dumps(config, indent=1),
        "```",
        "",
    ]
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


@torch.no_grad()
def _pictures(result, problem: Problem, decode: Callable | None, out: Path) -> tuple[list[Path], dict]:
    whole = Problem(
        problem.model, problem.shape, problem.schedule, problem.draw, problem.uncond, problem.guidance_scale,
        problem.guided_channels, problem.device, problem.dtype, problem.seed,
    )  # fmt: skip
    whole.rank, whole.world = 0, 1
    batch = whole.batch("report", 0, SAMPLES)
    trajectory = integrate(whole.predictor(batch), batch.noise, dense_grid(problem.schedule))
    overview(result, out / "overview.png")
    pictures, errors = [out / "overview.png"], {}
    width = 5 * len(result.solvers)
    figure, axes = pyplot().subplots(1, len(result.solvers), figsize=(width, 3.6), squeeze=False, layout="constrained")
    for axis, (n, solver) in zip(axes[0], result.solvers.items(), strict=True):
        ends = []
        for label, table in (("before", handmade("euler", n, problem.schedule)), ("after", solver)):
            states = _run(whole, batch, table)
            u = torch.tensor(table.timesteps[1:], dtype=torch.float64)
            error = (states - trajectory.at(u)).square().flatten(2).mean((0, 2)).sqrt()
            axis.plot(u.tolist(), error.tolist(), marker="o", ms=3, label=label)
            ends.append((float(error[-1]), states[:, -1]))
        axis.set(title=f"N = {n}: error by stage", xlabel="u (0 noise, 1 data)", ylabel="RMSE", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
        errors[n] = (ends[0][0], ends[1][0])
        if decode is not None:
            columns = {f"before, N = {n}": ends[0][1], "after": ends[1][1]}
            columns[f"teacher, {evaluations(trajectory.grid)} calls"] = trajectory.last
            images = {title: decode(x) for title, x in columns.items()}
            pictures.append(plot_samples(images, out / f"samples-{n}.png"))
    write_figure(figure, out / "stages.png")
    pictures.insert(1, out / "stages.png")
    return pictures, errors


def _run(problem: Problem, batch: Batch, solver: Solver) -> Tensor:
    """The states x_1..x_N, (B, N, *S)."""
    scale = problem.guidance_scale if batch.scale is None else batch.scale[:, None]
    _, states = sample(
        problem.model,
        batch.noise,
        solver,
        schedule=problem.schedule,
        cond=batch.cond,
        uncond=problem.uncond if problem.guided else None,
        guidance_scale=scale,
        guided_channels=problem.guided_channels,
        return_trajectory=True,
    )
    return states[1:].transpose(0, 1)
