"""compare: solvers side by side on one model, from the same noise, against a fine reference."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_json
from .names import Name, find_solver, is_file, known, published_steps
from .plots import plot_errors, plot_samples
from .progress import bar
from .sampling import sample
from .schedule import Schedule
from .search.draws import Draws
from .search.teacher import dense_grid, integrate
from .solver import Solver
from .target import Model, Target

REFERENCE_EVALUATIONS = 160  # of the fourth-order teacher; its own error is far below any few-step solver's


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured: ``rows``, one dict per solver, and ``images``, title -> samples (a few)."""

    rows: list[dict[str, Any]]
    images: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The rows as aligned text, best error first within each number of steps."""
        rows = sorted(self.rows, key=lambda r: (r["num_steps"], r["rmse"]))
        titles = {"solver": "solver", "nfe": "NFE", "rmse": "RMSE", "interval": "95 % interval"}
        titles |= {k: t for k, t in _OPTIONAL.items() if any(r.get(k) is not None for r in rows)}
        titles["ms_per_sample"] = "ms/sample"
        lines = [list(titles.values())]
        for row in rows:
            cells = {**row, "interval": f"{row['rmse_low']:.4f}-{row['rmse_high']:.4f}"}
            lines.append([_cell(key, cells.get(key)) for key in titles])
        widths = [max(len(line[k]) for line in lines) for k in range(len(titles))]
        text = [
            "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])

    def save(self, path: str | os.PathLike[str]) -> None:
        """The rows as JSON."""
        write_json(path, self.rows)

    def plot(self, path: str | os.PathLike[str], *, metric: str = "rmse") -> Path:
        """Error against steps, a line per method. Needs matplotlib."""
        return plot_errors(self.rows, path, metric=metric)

    def plot_samples(
        self, path: str | os.PathLike[str], solvers: Sequence[str] | None = None, *, rows: int = 8
    ) -> Path:
        """Samples side by side from the same noise, the reference last. Needs matplotlib."""
        titles = list(self.images) if solvers is None else [*solvers, "reference"]
        return plot_samples({t: self.images[t] for t in titles}, path, rows=rows)


_OPTIONAL = {"frechet": "Frechet", "accuracy": "label acc."}


@torch.no_grad()
def compare(
    target: Target | Model,
    solvers: Sequence[Solver | str | os.PathLike[str]],
    *,
    num_steps: Sequence[int] = (5, 10),
    samples: int = 256,
    batch_size: int = 64,
    seed: int = 20_000,
    real_features: Tensor | None = None,
    progress: bool = True,
    **fields: Any,
) -> Comparison:
    """Runs each solver on the same fresh noise and measures it.

        RMSE = sqrt(mean over samples and elements of (x_solver - x_reference)^2)

    with a 95 % interval over noises (normal, on the mean of per-sample squares). The reference is the fourth-order
    teacher with ``REFERENCE_EVALUATIONS`` calls from the same noise.

    target: a Target with a shape, or the model alone, with ``fields`` of a :class:`Target` as keyword arguments.
        Its ``features`` give the Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) to real_features
        (R, F), or to the reference's own features when none are given; its ``classify`` and ``labels`` the share of
        samples read as what was asked; its ``decode`` the pictures. Samples live where the target does.
    solvers: Solvers, names or paths; a name without ``/N`` is run at each of num_steps, a published one at those of
        them that it exists for.
    samples, batch_size, seed: of the noise. The seed's noises are used by no search.

    Returns a :class:`Comparison`; its rows hold solver, method, searched, num_steps, nfe, rmse, rmse_low, rmse_high,
    frechet, accuracy, ms_per_sample, samples. Raises ValueError before any work when a solver does not fit the
    target's schedule, and for a target whose guidance_scale is a range.
    """
    draws = Draws.of(Target.of(target, **fields), seed).alone  # each process of a group measures everything
    target, schedule = draws.target, draws.target.schedule
    assert schedule is not None
    if isinstance(target.guidance_scale, tuple):
        raise ValueError(f"the target's guidance_scale is a range, {target.guidance_scale}; give one to compare at")
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples={samples!r}, batch_size={batch_size!r}: need at least 1 of each")
    table = _expand(solvers, schedule, num_steps)
    grid = dense_grid(schedule, REFERENCE_EVALUATIONS)
    sizes = [min(batch_size, samples - k) for k in range(0, samples, batch_size)]
    sums = {title: _Sums(target) for title in [*table, "reference"]}
    with bar(progress, total=len(sizes) * len(sums), leave=False) as shown:
        for number, size in enumerate(sizes):
            batch = draws.batch("compare", number, size)
            shown.set_description("reference")
            reference = integrate(batch.predictor(), batch.noise, grid).last
            sums["reference"].add(reference, reference, 0.0, batch.cond)
            shown.update()
            for title, solver in table.items():
                shown.set_description(title)
                start = time.perf_counter()
                x = sample(target, batch.noise, solver, cond=batch.cond, check_finite=True)
                assert isinstance(x, Tensor)
                sums[title].add(x, reference, time.perf_counter() - start, batch.cond)
                shown.update()
    real = real_features if real_features is not None else sums["reference"].features_so_far()
    rows = [
        {
            "solver": title,
            "method": title.partition("/")[0] + ("@" + title.partition("@")[2] if "@" in title else ""),
            "searched": solver.source != "hand-made",
            "num_steps": solver.num_steps,
            "nfe": f"{solver.num_steps}{'x2' if target.guided else ''}",
            **sums[title].measure(real),
        }
        for title, solver in table.items()
    ]
    return Comparison(rows, {title: s.images for title, s in sums.items() if s.images is not None})


class _Sums:
    """What is kept of one solver's samples."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.squares: list[Tensor] = []
        self.seconds: list[float] = []
        self.features: list[Tensor] = []
        self.hits = self.labelled = 0
        self.images: Tensor | None = None

    def add(self, x: Tensor, reference: Tensor, seconds: float, cond: Mapping[str, Any]) -> None:
        target = self.target
        self.squares.append((x.double() - reference.double()).square().flatten(1).mean(1).cpu())
        self.seconds.append(seconds / len(x))
        if target.features is not None:
            self.features.append(target.features(x).double().cpu())
        if target.classify is not None and target.labels is not None:
            self.hits += int((target.classify(x).argmax(-1).cpu() == target.labels(cond).cpu()).sum())
            self.labelled += len(x)
        if self.images is None:
            self.images = (x if target.decode is None else target.decode(x))[:16].cpu()

    def features_so_far(self) -> Tensor | None:
        return torch.cat(self.features) if self.features else None

    def measure(self, real: Tensor | None) -> dict[str, Any]:
        squares, features = torch.cat(self.squares), self.features_so_far()
        mean = float(squares.mean())
        half = 1.96 * float(squares.std()) / math.sqrt(len(squares)) if len(squares) > 1 else 0.0
        frechet = None if features is None or real is None else frechet_distance(features, real)
        return {
            "rmse": math.sqrt(mean),
            "rmse_low": math.sqrt(max(mean - half, 0.0)),
            "rmse_high": math.sqrt(mean + half),
            "frechet": None if frechet is None or math.isnan(frechet) else frechet,  # JSON has no NaN
            "accuracy": self.hits / self.labelled if self.labelled else None,
            "ms_per_sample": 1000 * sorted(self.seconds)[len(self.seconds) // 2],
            "samples": len(squares),
        }


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two sets of features (n, F), in float64."""
    first, second = first.double().cpu(), second.double().cpu()
    if len(first) < 2 or len(second) < 2:
        return math.nan
    c1, c2 = torch.cov(first.T).reshape(first.shape[1], -1), torch.cov(second.T).reshape(first.shape[1], -1)
    # tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), all real.
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return float((shift + c1.trace() + c2.trace() - 2 * cross).clamp_min(0))


def _expand(
    solvers: Sequence[Solver | str | os.PathLike[str]], schedule: Schedule, num_steps: Sequence[int]
) -> dict[str, Solver]:
    """title -> solver, in order, names without steps once for each number of steps."""
    table: dict[str, Solver] = {}
    for item in solvers:
        for n in _open_steps(item, num_steps):
            solver = find_solver(item, schedule, n)
            solver.on(schedule)
            title = given = solver.name or f"solver {len(table) + 1}/{solver.num_steps}"
            name, slash, rest = given.partition("/")
            number = 1
            while table.get(title, solver) != solver:  # two files may hold solvers of one name
                number += 1
                title = f"{name}-{number}{slash}{rest}"
            table[title] = solver
    if not table:
        raise ValueError("no solvers to compare")
    return table


def _open_steps(item: Solver | str | os.PathLike[str], num_steps: Sequence[int]) -> Sequence[int | None]:
    """The numbers of steps to run an item at; [None] where it says itself."""
    if not isinstance(item, str) or is_file(item):
        return [None]
    name = Name.parse(item)
    if name.num_steps is not None:
        return [None]
    if name.handmade:
        return num_steps
    steps = [n for n in num_steps if n in published_steps(name.name)]
    if not steps:
        raise ValueError(f"{item!r} exists for none of num_steps={tuple(num_steps)}; there are {known()}")
    return steps


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "accuracy":
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return f"{value:.3f}" if key in ("frechet", "ms_per_sample") else f"{value:.4f}"
    return str(value)
