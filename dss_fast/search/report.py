"""What a search leaves for people to look at: report.md and its pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_text
from ..methods import handmade
from ..plots import draw_coefficients, draw_timesteps, plot_samples, pyplot, write_figure
from ..sampling import sample
from ..solver import Solver
from ..target import Samples
from .draws import Draws
from .runs import SearchResult
from .teacher import dense_grid, evaluations, integrate

SAMPLES = 16  # a batch of its own, drawn for the pictures only


def overview(result: SearchResult, path: str | os.PathLike[str]) -> None:
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


def write_report(result: SearchResult, draws: Draws, config: dict[str, Any]) -> Path:
    """report.md in the run folder, with overview.png, stages.png and, where the target decodes, samples-N.png.

    The pictures take SAMPLES trajectories of their own, which the search's evaluations do not include.
    """
    assert result.out is not None
    out = result.out
    pictures, errors = _pictures(result, draws, out)
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
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


@torch.no_grad()
def _pictures(result: SearchResult, draws: Draws, out: Path) -> tuple[list[Path], dict[int, tuple[float, float]]]:
    batch, decode = draws.alone.batch("report", 0, SAMPLES), draws.target.decode
    trajectory = integrate(batch.predictor(), batch.noise, dense_grid(batch.schedule))
    overview(result, out / "overview.png")
    pictures, errors = [out / "overview.png"], {}
    width = 5 * len(result.solvers)
    figure, axes = pyplot().subplots(1, len(result.solvers), figsize=(width, 3.6), squeeze=False, layout="constrained")
    for axis, (n, solver) in zip(axes[0], result.solvers.items(), strict=True):
        ends = []
        for label, table in (("before", handmade("euler", n, batch.schedule)), ("after", solver)):
            states = _run(batch, table)
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


def _run(batch: Samples, solver: Solver) -> Tensor:
    """The states x_1..x_N, (B, N, *S)."""
    target, scale = batch.target, batch.guidance
    _, states = sample(target, batch.noise, solver, cond=batch.cond, guidance_scale=scale, return_trajectory=True)
    return states[1:].transpose(0, 1)
