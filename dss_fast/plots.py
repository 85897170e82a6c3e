"""Pictures: a solver's table, a search, errors against steps, and samples of several solvers from the same noise.

Needs matplotlib (the ``plots`` extra), imported when a picture is drawn. Every function writes one PNG
and returns its path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import replacing
from .names import printable
from .solver import Solver

SEARCHED = "#c0392b"
OTHERS = ("#2980b9", "#16a085", "#8e44ad", "#d68910", "#2c3e50", "#7f8c8d", "#5dade2", "#a04000", "#82e0aa")


def plot_solver(solver: Solver, path: str | os.PathLike[str]) -> Path:
    """The coefficients as a heat map, row i = step i, above the timesteps they belong to."""
    height = cells_height(solver)
    figure, (top, bottom) = pyplot().subplots(
        2, 1, figsize=(height + 1.2, height + 1.8), height_ratios=[height, 1.3], layout="constrained"
    )
    draw_coefficients(top, solver, f"{written(solver.name) or 'solver'}: {solver.num_steps} steps, {solver.family}")
    draw_timesteps(bottom, solver)
    return write_figure(figure, path)


def cells_height(solver: Solver) -> float:
    """Inches that :func:`draw_coefficients` needs for numbers that do not touch, title and labels included."""
    return 1.0 + max(0.46 * solver.num_steps, 2.0)


def draw_coefficients(axes: Any, solver: Solver, title: str) -> None:
    """The lower triangle on the given axes, numbers in the cells, the weights on the initial noise before it."""
    n, noise = solver.num_steps, solver.noise_coeffs
    nan = float("nan")
    table = [[c if j <= i else nan for j, c in enumerate(row)] for i, row in enumerate(solver.coeffs)]
    names = [str(j) for j in range(n)]
    if noise is not None:
        table, names = [[c, nan, *row] for c, row in zip(noise, table, strict=True)], ["noise", "", *names]
    limit = max(abs(c) for row in table for c in row if c == c) or 1.0
    image = axes.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for i, row in enumerate(table if n <= 15 else []):
        for j, c in enumerate(row):
            if c and c == c:
                text = f"{c:.2f}".replace("-", "\N{MINUS SIGN}")
                axes.text(
                    j,
                    i,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if abs(c) > 0.6 * limit else "black",
                )
    axes.set(xlabel="prediction j", ylabel="step i", yticks=range(n), title=title)
    axes.set_xticks(range(len(names)), labels=names, fontsize=8)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label="coefficient")


def draw_timesteps(axes: Any, solver: Solver) -> None:
    """The timesteps as dots on the line from noise to data, equal steps as ticks behind them."""
    n = solver.num_steps
    axes.hlines(0, 0, 1, color="0.8")
    axes.plot([k / n for k in range(n + 1)], [0.0] * (n + 1), "|", color="0.6", ms=18, label="equal steps")
    axes.plot(solver.timesteps, [0.0] * (n + 1), "o", color=SEARCHED, ms=6, label="timesteps")
    if solver.network_timesteps is not None:
        axes.plot(solver.network_timesteps, [0.0] * n, "x", color="black", ms=6, label="given to the network")
    axes.set(yticks=[], xlabel="u: 0 noise, 1 data", ylim=(-1, 2.4), xlim=(-0.02, 1.02), box_aspect=0.22)
    axes.legend(loc="upper center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["left", "top", "right"]].set_visible(False)


def plot_errors(rows: Sequence[Any], path: str | os.PathLike[str], *, metric: str = "rmse") -> Path:
    """Error against network evaluations, a line per method, from the rows of a comparison; log scale."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    methods: dict[str, list[Any]] = {}
    for row in rows:
        if math.isfinite(getattr(row, metric)):
            methods.setdefault(row.method, []).append(row)
    colors = iter(OTHERS * 9)
    for method in sorted(methods, key=lambda m: min(getattr(r, metric) for r in methods[m])):
        line = sorted(methods[method], key=lambda r: r.num_steps)
        searched = line[0].searched
        if searched:
            style = {"color": SEARCHED, "lw": 2.4, "zorder": 3}
        else:
            style = {"color": next(colors), "lw": 1.2, "ls": "--" if "@" in method else "-"}
        steps, values = [r.num_steps for r in line], [getattr(r, metric) for r in line]
        axes.plot(steps, values, marker="o", ms=5, label=written(method), **style)
        if metric == "rmse":
            low, high = [r.rmse_low for r in line], [r.rmse_high for r in line]
            axes.fill_between(steps, low, high, alpha=0.2 if searched else 0.05, color=style["color"], lw=0)
    label = {"rmse": "RMSE to the fine reference"}.get(metric, metric)
    axes.set(xlabel="network evaluations per sample", ylabel=label)
    log_scale(axes)
    axes.set_xticks(sorted({r.num_steps for r in rows}), labels=map(str, sorted({r.num_steps for r in rows})))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return write_figure(figure, path)


Curves = Mapping[int, tuple[Sequence[int], Sequence[float]]]  # N -> evaluations and values


def plot_overview(solvers: Mapping[int, Solver], loss: Curves, held_out: Curves, path: str | os.PathLike[str]) -> Path:
    """One picture of a search: error over evaluations, then coefficients and timesteps of each solver."""
    heights = [2.8, *(cells_height(solver) for solver in solvers.values())]
    figure, axes = pyplot().subplots(
        1 + len(solvers),
        2,
        figsize=(5 + max(heights[1:]), sum(heights)),
        height_ratios=heights,
        width_ratios=[max(heights[1:]), 4.5],
        squeeze=False,
        layout="constrained",
    )
    for axis, curves, title in ((axes[0, 0], loss, "training loss"), (axes[0, 1], held_out, "held-out RMSE")):
        curves = {n: curve for n, curve in curves.items() if curve[0]}
        for n, (at, values) in curves.items():
            axis.plot(at, values, marker="." if len(at) < 50 else None, lw=1, label=f"N = {n}")
        if curves:
            axis.set(title=title, xlabel="model evaluations")
            axis.locator_params(axis="x", nbins=5)
            log_scale(axis)
            axis.grid(alpha=0.3)
            axis.legend()
        else:
            axis.axis("off")
            axis.text(0.5, 0.5, f"no {title}: the budget allowed no such samples", ha="center", color="0.4")
    for line, (n, solver) in zip(axes[1:], solvers.items(), strict=True):
        draw_coefficients(line[0], solver, f"N = {n}")
        draw_timesteps(line[1], solver)
    return write_figure(figure, path)


def plot_stages(stages: Mapping[int, Sequence[Any]], path: str | os.PathLike[str]) -> Path:
    """The error of the state after each step, of some rows of a comparison for each N. Full dots at the end, which
    counts, and faint ones before it."""
    figure, axes = pyplot().subplots(
        1, len(stages), figsize=(4.6 * len(stages), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (n, rows) in zip(axes[0], stages.items(), strict=True):
        colors = iter(OTHERS)
        for row in rows:
            color, last = SEARCHED if row.searched else next(colors), row.stages[-1]
            axis.plot(
                row.timesteps[1:], row.stages, marker="o", ms=4, mfc="white", lw=1, ls=":", color=color, alpha=0.7
            )
            axis.plot(1, last, marker="o", ms=9, ls="", color=color, label=written(row.solver))
            beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "color": color}
            axis.annotate(f"{last:.3g}", (1, last), **beside)
        axis.set(title=f"N = {n}", xlabel="u reached (0 noise, 1 data)", xlim=(0, 1.3))
        log_scale(axis)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8, title="at the end", title_fontsize=8)
    axes[0, 0].set_ylabel("RMSE to the fine trajectory")
    return write_figure(figure, path)


def log_scale(axes: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2, 3 and 5 of each decade; powers alone leave one or none."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(pyplot().matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def plot_samples(
    rows: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    count: int = 8,
    worst: Mapping[str, Tensor] | None = None,
) -> Path:
    """Images of several solvers, a row for each, those above each other from the same noise.

    rows: title -> images (B, C, H, W), C = 1 or 3, of which the first ``count`` are drawn: floats in [0, 1], beyond
        which they are clamped, or whole numbers from 0 to 255.
    worst: title -> pairs (B, C, H, 2 W) for some of the rows, drawn at their end: a solver's own worst samples, the
        reference on their right.

    Raises ValueError for whole numbers of another range.
    """
    worst = {title: _pixels(title, images) for title, images in (worst or {}).items()}
    shown = {title: [*_pixels(title, images[:count])] for title, images in rows.items()}
    columns = max(map(len, shown.values()))
    pairs = max((len(worst.get(title, ())) for title in rows), default=0)
    ratio = max(image.shape[-1] / image.shape[-2] for images in shown.values() for image in images)
    widths = [ratio] * columns + [0.15] * bool(pairs) + [2 * ratio + 0.1] * pairs
    cell = min(1.1, 10.5 / sum(widths))  # inches; the whole is no wider than a page
    figure, grid = pyplot().subplots(
        len(rows),
        len(widths),
        figsize=(cell * sum(widths) + 1.4 * any(map(str.strip, rows)), cell * len(rows) + 0.25 * bool(pairs)),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    for line, (title, images) in zip(grid, shown.items(), strict=True):
        cells = [*zip(line, images, strict=False), *zip(line[columns + 1 :], worst.get(title, ()), strict=False)]
        for axes, image in cells:
            pixels = image.permute(1, 2, 0).numpy()
            axes.imshow(pixels, cmap="gray" if pixels.shape[-1] == 1 else None, vmin=0, vmax=1)
        for axes in line:
            axes.axis("off")
        if title.strip():
            line[0].text(-0.08, 0.5, written(title), transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    if pairs:
        grid[0][columns + 1].set_title("its worst | reference", fontsize=8, loc="left")
    return write_figure(figure, path)


def plot_points(rows: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Samples of two numbers as dots, a panel for each solver: where it ends, tied to where the reference does.

    rows: title -> (B, 2), ``"reference"`` among them, from the same noises; what is not finite is left out.
    """
    dots = {title: points.detach().cpu().float().flatten(1).numpy() for title, points in rows.items()}
    fine = dots.pop("reference")
    columns = min(3, max(1, len(dots)))
    lines = max(1, -(-len(dots) // columns))
    wide, high = (max(float(part), 1e-3) for part in fine.max(0) - fine.min(0))
    figure, grid = pyplot().subplots(
        lines,
        columns,
        figsize=(4.1 * columns, (0.8 + min(4.0, max(1.6, 3.6 * high / wide))) * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, ends) in zip(grid.flat, dots.items(), strict=False):
        axes.plot([fine[:, 0], ends[:, 0]], [fine[:, 1], ends[:, 1]], color="0.6", lw=0.7, zorder=1)
        axes.scatter(*fine.T, s=14, color="0.45", lw=0, label="reference", zorder=2)
        axes.scatter(*ends.T, s=9, color=SEARCHED, lw=0, label="ends at", zorder=3)
        axes.set_title(written(title), fontsize=10)
        axes.set_aspect("equal")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(dots) :]:
        axes.axis("off")
    grid[0][0].legend(frameon=False, fontsize=8)
    return write_figure(figure, path)


def _pixels(title: str, images: Tensor) -> Tensor:
    """The same images in float32 in [0, 1], on the CPU."""
    images = images.detach().cpu()
    if images.is_floating_point() or images.dtype == torch.bool:
        return images.float().clamp(0, 1)
    if images.numel() and (int(images.min()) < 0 or int(images.max()) > 255):
        raise ValueError(
            f"images of {title.strip() or 'samples'} are {images.dtype} from {int(images.min())} to "
            f"{int(images.max())}; let decode return floats in [0, 1] or whole numbers from 0 to 255"
        )
    return images.float() / 255


def written(name: str) -> str:
    """A user's name as matplotlib writes it: without what no font has, a dollar as a dollar and not as mathematics."""
    return printable(name).replace("$", r"\$")


def pyplot() -> Any:
    """matplotlib.pyplot without a window. Raises ImportError naming the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'dss_fast[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG and closes it."""
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=140)
    finally:
        pyplot().close(figure)
    return Path(path)
