"""compare: solvers side by side on one model, from the same noise, against a fine reference."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .distance import Reference, three_digits
from .draws import Draws
from .files import write_json
from .names import Name, families, find_solver, is_file, known, published_steps
from .plots import plot_errors, plot_samples
from .sampling import sample
from .schedule import Schedule
from .solver import Solver
from .target import Model, Samples, Target
from .trajectory import dense_grid, integrate

REFERENCE_EVALUATIONS = 160  # with so many calls the fourth-order teacher errs far less than any few-step solver
PICTURES, WORST = 16, 4  # of each solver the first samples are kept, and those that err most


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured.

    rows: one dict per solver. images: title -> its first samples (B, C, H, W), "reference" among them. worst: title ->
    its samples that err most, each with the reference from the same noise on its right, (B, C, H, 2 W).
    """

    rows: list[dict[str, Any]]
    images: dict[str, Tensor] = field(repr=False)
    worst: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The rows as aligned text, best error first within each number of steps, and the answer to "better than the
        best hand-made?" below; errors in three digits, the noise floor of a distance in its title."""
        rows = sorted(self.rows, key=lambda r: (r["num_steps"], r["rmse"]))
        titles = {"solver": "solver", "nfe": "NFE", "rmse": "RMSE", "interval": "95 % interval"}
        titles |= {k: t for k, t in _OPTIONAL.items() if any(r.get(k) is not None for r in rows)}
        for key in ("frechet", "energy"):
            if key in titles and rows[0][f"{key}_floor"] is not None:
                titles[key] += f" (floor {three_digits(rows[0][f'{key}_floor'])})"
        titles["ms_per_sample"] = "ms/sample"
        lines = [list(titles.values())]
        for row in rows:
            interval = f"{three_digits(row['rmse_low'])} to {three_digits(row['rmse_high'])}"
            lines.append([_cell(key, {**row, "interval": interval}.get(key)) for key in titles])
        widths = [max(len(line[k]) for line in lines) for k in range(len(titles))]
        text = [
            "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", *self._verdicts()]).rstrip()

    def best(self, num_steps: int, searched: bool = False) -> dict[str, Any] | None:
        """The row of least RMSE among the hand-made and published solvers, or among the others, of N; None: none."""
        rows = [r for r in self.rows if r["num_steps"] == num_steps and r["searched"] == searched]
        return min(rows, key=lambda r: r["rmse"], default=None)

    def _verdicts(self) -> list[str]:
        """Per N the best hand-made or published solver, and what part of its errors each searched one has."""
        lines = []
        for n in sorted({r["num_steps"] for r in self.rows}):
            best, mine = self.best(n), [r for r in self.rows if r["num_steps"] == n and r["searched"]]
            if best is None:
                continue
            line = f"N = {n}: the best hand-made or published solver is {best['solver']}"
            for row in mine:
                parts = (f"{name} x {three_digits(row[k] / best[k])}" for k, name in _RATIOS if best[k])
                line += f"; {row['solver']} against it: {', '.join(parts)}"
            lines.append(line)
        return lines

    def save(self, path: str | os.PathLike[str]) -> None:
        """The rows as JSON."""
        write_json(path, self.rows)

    def plot(self, path: str | os.PathLike[str], *, metric: str = "rmse") -> Path:
        """Error against steps, a line per method. Needs matplotlib."""
        return plot_errors(self.rows, path, metric=metric)

    def plot_samples(
        self, path: str | os.PathLike[str], solvers: Sequence[str] | None = None, *, count: int = 8
    ) -> Path:
        """Samples above each other from the same noise, the reference last; at the end of each row the solver's own
        worst, beside the reference from the same noise. Needs matplotlib."""
        titles = list(self.images) if solvers is None else [*solvers, "reference"]
        worst = {t: self.worst[t] for t in titles if t in self.worst}
        return plot_samples({t: self.images[t] for t in titles}, path, count=count, worst=worst)


_OPTIONAL = {"median": "median", "p90": "90 %", "switched": "switched", "frechet": "Frechet", "energy": "energy"}
_OPTIONAL |= {"accuracy": "label acc."}
_RATIOS = (("rmse", "RMSE"), ("median", "median"))


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

    with a 95 % interval over noises; median and 90 %: of the samples' own root mean squares. The reference is the
    fourth-order teacher with ``REFERENCE_EVALUATIONS`` calls from the same noise. A few samples that end elsewhere
    can carry a whole RMSE: ``switched`` is their share (another class, or, without ``classify``, further off than half
    of the median distance between two different samples). Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1
    C2)^(1/2)) and energy distance 2 E d(a, b) - E d(a, a') - E d(b, b') are between independent draws: the solver's
    samples and the reference's from other noises. Their floor is what two draws of the reference have, half of the
    noises each: Frechet's, which is biased, counts by how much it is above; see
    :meth:`dss_fast.distance.Reference.distances`.

    target: a Target with a shape, or the model alone, with ``fields`` of a :class:`Target` as keyword arguments.
        Its ``features`` are what both distances compare, or else the flattened samples; its ``classify`` and
        ``labels`` give the share of samples read as what was asked; its ``decode`` the pictures. Samples live where
        the target does.
    real_features: (R, F) to compare the features of all samples with, instead of the reference's from other noises.
    solvers: Solvers, names or paths; a name without ``/N`` is run at each of num_steps, a published one at those of
        them that it exists for.
    samples, batch_size, seed: of the noise. The seed's noises are used by no search.

    Returns a :class:`Comparison`; its rows hold solver, method, searched (neither hand-made nor published), num_steps,
    nfe, rmse, rmse_low, rmse_high, median, p90, switched, accuracy, frechet, energy, frechet_floor, energy_floor,
    ms_per_sample, samples; None where one cannot be told. Raises ValueError before any work when a solver does not
    fit the target's schedule, and for a target whose guidance_scale is a range.
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
    batches = [draws.batch("compare", number, size) for number, size in enumerate(sizes)]
    decode = target.decode or (lambda x: x)
    rows, images, worst = [], {}, {}
    with tqdm(disable=not progress, total=len(sizes) * (len(table) + 1), leave=False) as shown:

        def run(title: str, one: Callable[[Samples], Tensor]) -> tuple[Tensor, float]:
            """Samples of all batches, and the median over batches of the milliseconds per sample."""
            shown.set_description(title)
            found, times = [], []
            for batch in batches:
                start = time.perf_counter()
                found.append(one(batch))
                times.append(1000 * (time.perf_counter() - start) / len(batch))
                shown.update()
            return torch.cat(found), sorted(times)[len(times) // 2]

        last, _ = run("reference", lambda batch: integrate(batch.predictor(), batch.noise, grid).last)
        asked = None if target.labels is None else torch.cat([target.labels(batch.cond) for batch in batches]).cpu()
        reference = Reference(target, last, asked, real_features)
        floor = {f"{name}_floor": value for name, value in reference.distances().items()}
        for title, solver in table.items():
            x, milliseconds = run(title, partial(_run, target, solver))
            images[title] = decode(x[:PICTURES]).cpu()
            worst[title] = torch.cat([decode(part) for part in reference.worst(x, WORST)], -1).cpu()
            rows.append(
                {
                    "solver": title,
                    "method": title.partition("/")[0] + ("@" + title.partition("@")[2] if "@" in title else ""),
                    "searched": solver.source != "hand-made" and title.partition("/")[0] not in families(),
                    "num_steps": solver.num_steps,
                    "nfe": f"{solver.num_steps}{'x2' if target.guided else ''}",
                    **reference.measure(x),
                    **floor,
                    "ms_per_sample": milliseconds,
                }
            )
    images["reference"] = decode(last[:PICTURES]).cpu()
    return Comparison(rows, images, worst)


def _run(target: Target, solver: Solver, batch: Samples) -> Tensor:
    """The samples (B, *S) of a batch; FloatingPointError where the model returns NaN or Inf."""
    x = sample(target, batch.noise, solver, cond=batch.cond, check_finite=True)
    assert isinstance(x, Tensor)
    return x


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
    """A figure as the table prints it: shares in percent, errors in three digits."""
    if value is None:
        return "-"
    if key in ("accuracy", "switched"):
        return f"{100 * value:.1f} %"
    return three_digits(value) if isinstance(value, float) else str(value)
