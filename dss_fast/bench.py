"""The bench: fresh noises, where a fine solver takes them, and solvers run from the same noises."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import adaptive
from .distance import Reference, squares, three_digits
from .draws import Draws
from .files import shortened
from .names import printable
from .sampling import sample
from .solver import Solver
from .target import Samples
from .trajectory import Trajectory, dense_grid, integrate

CHECKED, COARSER = 8, 0.75  # on so many samples a reference of so many times the calls must agree
SCALES = 0.05, 3.0  # of the samples' root mean square; the MNIST flow has 0.96, with the wrong schedule 1.5 to 700
AGREEMENT = 0.1  # two references may differ by this part of the samples' scale, and by half of the error they measure
PICTURES, WORST = 16, 4  # of each solver the first samples are kept, and those that err most
PLANE = 2  # numbers of a sample that is a point to draw, of which all are kept


@dataclass(frozen=True)
class Row:
    """A solver's figures, see :meth:`dss_fast.distance.Reference.measure`; None where one cannot be told.

    method: the name without its steps. searched: neither hand-made nor published. nfe: calls, ``"10x2"`` with guidance,
        ``"7+4"`` where 4 of 7 steps call the unconditional branch. num_steps: of an adaptive solver the calls it took,
        the mean over batches.
    rmse: infinite where the solver diverges to NaN or Inf. timesteps: u, N + 1 of them. stages: RMSE of the state after
    each step, to the fine trajectory at the same u, over the first ``PICTURES`` samples. ms_per_sample: the median over
    batches.
    """

    solver: str
    method: str
    searched: bool
    num_steps: int
    nfe: str
    samples: int
    rmse: float = math.inf
    rmse_low: float = math.inf
    rmse_high: float = math.inf
    median: float = math.inf
    p90: float = math.inf
    worst: float = math.inf
    switched: float | None = None
    accuracy: float | None = None
    frechet: float | None = None
    energy: float | None = None
    frechet_floor: float | None = None
    energy_floor: float | None = None
    ms_per_sample: float | None = None
    timesteps: tuple[float, ...] = ()
    stages: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """A solver run on all noises: its row, (S,) mean squares, first samples, and the worst beside the reference's.

    solver: None of one that is no table.
    """

    row: Row
    solver: Solver | None
    errors: Tensor
    first: Tensor | None = None
    worst: tuple[Tensor, Tensor] | None = None


class Bench:
    """Fresh noises, where a fine solver takes them, and the solvers measured on them, by their titles.

    samples, calls: how many noises, and evaluations of the reference from each. shown: a progress bar that counts
    evaluations. Raises FloatingPointError where the reference diverges.
    """

    def __init__(
        self, draws: Draws, samples: int, calls: int, batch_size: int, real_features: Tensor | None, shown: Any
    ) -> None:
        self.target, self.schedule, self.samples, self.calls = draws.target, draws.schedule, samples, calls
        self.shown = shown
        sizes = [min(batch_size, samples - k) for k in range(0, samples, batch_size)]
        self.batches = [draws.batch("compare", number, size) for number, size in enumerate(sizes)]
        self.evaluations = 0
        self.runs: dict[str, Run] = {}
        try:
            last, self.fine, self.apart = self._reference()
        except FloatingPointError as error:
            raise FloatingPointError(
                f"the fine reference diverges to NaN or Inf, so nothing can be compared with it: {error}. Is "
                f"{self.schedule!r} the model's schedule?"
            ) from error
        self.reference = self._measure_of(last, real_features)
        real, width = self.reference.real, self.reference.features.shape[1]
        if real is not None and real.shape[1] != width:
            raise ValueError(f"real_features has {real.shape[1]} columns; the features of a sample here are {width}")
        self.kept = samples if last[0].numel() == PLANE and self.target.decode is None else PICTURES
        self.scale = math.sqrt(float(last.double().square().mean()))
        self.floor = self.reference.distances()

    def _reference(self) -> tuple[Tensor, Trajectory, float]:
        """Where the fine solver ends, its way on the first samples, and how far a coarser one ends from there."""
        found: list[Trajectory] = []
        for batch in self.batches:
            path = integrate(batch.predictor(), batch.noise, dense_grid(self.schedule, self.calls))
            # Of the whole way a few samples are kept, off the device: a batch of latents takes gigabytes.
            states, slopes = (part[: PICTURES * (not found)].cpu().clone() for part in (path.states, path.slopes))
            found.append(replace(path, states=states, slopes=slopes))
            self._spend(self.calls * len(batch), "reference")
        last = torch.cat([path.last for path in found])
        if not bool(last.isfinite().all()):
            raise FloatingPointError("its samples are not finite")
        few, calls = self.batches[0].rows(slice(CHECKED)), max(16, round(COARSER * self.calls))
        coarse = integrate(few.predictor(), few.noise, dense_grid(self.schedule, calls)).last
        self._spend(calls * len(few), "reference")
        apart = math.sqrt(float(squares(coarse, last[: len(few)]).mean()))
        return last, replace(found[0], last=found[0].last[:PICTURES]), apart

    def _measure_of(self, last: Tensor, real_features: Tensor | None) -> Reference:
        """The reference by which samples are measured; without the user's functions, and a word, where one fails."""
        labels = self.target.labels
        try:
            asked = None if labels is None else torch.cat([labels(_copied(batch.cond)) for batch in self.batches]).cpu()
            if asked is not None and asked.is_floating_point() and bool(asked.isnan().any()):
                raise ValueError(f"labels returned NaN for {int(asked.isnan().sum())} of {len(asked)} samples")
            return Reference(self.target, last, asked, real_features)
        except Exception as error:
            what = f"{type(error).__name__}: {shortened(error)}"
            warnings.warn(
                f"the target's features, classify or labels failed ({what}): distances are of the samples themselves, "
                "and none is read as a class",
                stacklevel=4,
            )
            return Reference(replace(self.target, features=None, classify=None, labels=None), last)

    def _spend(self, evaluations: int, title: str) -> None:
        self.evaluations += evaluations
        self.shown.set_description(printable(title), refresh=False)
        self.shown.update(evaluations)

    def _sampled(self, solver: Solver, batch: Samples, **options: Any) -> Any:
        """What ``sample`` returns for a batch; FloatingPointError where the model returns NaN or Inf."""
        options |= {"cond": batch.cond, "guidance_scale": batch.guidance, "check_finite": True}
        found = sample(self.target, batch.noise, solver, **options)
        self._spend(solver.num_steps * len(batch), solver.name)
        return found

    def squares(self, solver: Solver, start: int, stop: int) -> Tensor:
        """(stop - start,) float64: each sample's mean square from the reference, infinite where the solver diverges."""
        try:
            x = torch.cat([self._sampled(solver, batch) for batch in self._between(start, stop)])
        except FloatingPointError:
            return torch.full((stop - start,), math.inf, dtype=torch.float64)
        return squares(x, self.reference.samples[start:stop]).nan_to_num(nan=math.inf)

    def _between(self, start: int, stop: int) -> Iterator[Samples]:
        """The batches of the samples from start to stop."""
        at = 0
        for batch in self.batches:
            low, high = max(start - at, 0), min(stop - at, len(batch))
            if low < high:
                yield batch.rows(slice(low, high))
            at += len(batch)

    def measure(self, title: str, solver: Solver, searched: bool) -> Run:
        """Runs a solver on all noises; its errors are infinite where it diverges."""
        name, at, spacing = title.partition("@")
        row = Row(
            solver=title,
            method=name.partition("/")[0] + at + spacing,
            searched=searched,
            num_steps=solver.num_steps,
            nfe=self._calls(solver),
            samples=self.samples,
            frechet_floor=self.floor["frechet"],
            energy_floor=self.floor["energy"],
            timesteps=solver.timesteps,
        )
        self.runs[title] = run = Run(row, solver, torch.full((self.samples,), math.inf, dtype=torch.float64))
        ends: list[Tensor] = []
        times: list[float] = []
        stages: tuple[float, ...] = ()
        try:
            for batch in self.batches:
                start = time.perf_counter()
                x = self._sampled(solver, batch, return_trajectory=not ends)
                times.append(1000 * (time.perf_counter() - start) / len(batch))
                if not ends:
                    x, stages = x[0], self._stages(solver, x[1])
                ends.append(x)
        except FloatingPointError:
            return run
        self.runs[title] = run = self._run(replace(row, stages=stages), solver, ends, times)
        return run

    def _run(self, row: Row, solver: Solver | None, ends: list[Tensor], times: list[float]) -> Run:
        """The run that ended at these samples, batch by batch, after so many milliseconds a sample."""
        x = torch.cat(ends)
        if not bool(x.isfinite().all()):
            return Run(row, solver, torch.full((self.samples,), math.inf, dtype=torch.float64))
        row = replace(row, **self.reference.measure(x), ms_per_sample=sorted(times)[len(times) // 2])
        return Run(row, solver, squares(x, self.reference.samples), x[: self.kept], self.reference.worst(x, WORST))

    def measure_adaptive(self, num_steps: Sequence[int]) -> None:
        """Runs the adaptive solver on all noises, at the tolerances whose calls on the first batch are nearest to each
        of num_steps, and to two and four times the most of them, because it seldom arrives with so few; a row each."""
        taken: dict[float, int] = {}

        def calls(tolerance: float) -> int:
            if tolerance not in taken:
                taken[tolerance] = self._adaptive(self.batches[0], tolerance)[1]
            return taken[tolerance]

        try:
            wanted = sorted({*num_steps, 2 * max(num_steps), 4 * max(num_steps)})
            tolerances = {adaptive.nearest(calls, n): None for n in wanted}
        except FloatingPointError as error:
            warnings.warn(f"{adaptive.NAME} has no row: {shortened(error)}", stacklevel=3)
            return
        for tolerance in tolerances:
            ends, times, counts = [], [], []
            try:
                for batch in self.batches:
                    start = time.perf_counter()
                    x, count = self._adaptive(batch, tolerance)
                    times.append(1000 * (time.perf_counter() - start) / len(batch))
                    ends.append(x)
                    counts.append(count * len(batch))
            except FloatingPointError as error:
                warnings.warn(f"{adaptive.NAME} has no row at {tolerance:.1g}: {shortened(error)}", stacklevel=3)
                continue
            mean = sum(counts) / self.samples
            title = f"{adaptive.NAME}/{round(mean)}, tolerance {tolerance:.1g}"
            row = Row(
                solver=title,
                method=adaptive.NAME,
                searched=False,
                num_steps=round(mean),
                nfe=f"{mean:.3g}" + "x2" * self.target.guided,
                samples=self.samples,
                frechet_floor=self.floor["frechet"],
                energy_floor=self.floor["energy"],
            )
            self.runs[title] = self._run(row, None, ends, times)

    def _adaptive(self, batch: Samples, tolerance: float) -> tuple[Tensor, int]:
        """The samples of a batch, and the calls that the adaptive solver took for it."""
        x, calls = adaptive.solve(batch.predictor(), batch.noise, self.schedule, self.fine.grid.end, tolerance)
        self._spend(calls * len(batch), adaptive.NAME)
        return x, calls

    def _calls(self, solver: Solver) -> str:
        if not self.target.guided:
            return f"{solver.num_steps}"
        steps = solver.guided_steps
        return f"{solver.num_steps}x2" if steps is None else f"{solver.num_steps}+{len(steps)}"

    def _stages(self, solver: Solver, states: Tensor) -> tuple[float, ...]:
        """The RMSE of the state after each step, to the fine trajectory at the same u, on the first samples."""
        fine = self.fine.at(torch.tensor(solver.timesteps[1:], dtype=torch.float64)).transpose(0, 1)
        return tuple((states[1:, :PICTURES] - fine).square().flatten(1).mean(1).sqrt().tolist())

    def doubt(self, mine: Tensor, theirs: Tensor) -> str:
        """Why the reference is none to measure by; "" where it is."""
        if not SCALES[0] <= self.scale <= SCALES[1]:
            return (
                f"The reference samples have a root mean square of {three_digits(self.scale)}, where data have "
                f"{SCALES[0]} to {SCALES[1]}: the schedule does not seem to be the model's."
            )
        if not bool(theirs.isfinite().all()):
            return "Every rival diverges to NaN or Inf: the schedule does not seem to be the model's."
        error = math.sqrt(float(mine[:CHECKED].mean()))
        if self.apart > AGREEMENT * self.scale or self.apart > error / 2:
            return (
                f"Fine references of {self.calls} and {COARSER:.0%} as many calls end "
                f"{three_digits(self.apart)} apart, too far to measure an error of {three_digits(error)}."
            )
        return ""

    def images(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By title the first samples, "reference" among them, and those that err most beside the reference's; decoded.
        Raises whatever the target's decode does, and ValueError where that returns no images."""
        firsts = {title: self._decoded(run.first) for title, run in self.runs.items() if run.first is not None}
        pairs = {title: run.worst for title, run in self.runs.items() if run.worst is not None}
        worst = {title: torch.cat([self._decoded(part) for part in pair], -1) for title, pair in pairs.items()}
        return {**firsts, "reference": self._decoded(self.reference.samples[: self.kept])}, worst

    def _decoded(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) on the CPU; the samples themselves without a decode."""
        if self.target.decode is None:
            return x.cpu()
        images = self.target.decode(x.clone())  # which may work in place
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"it returned {what}; images are (B, C, H, W) in [0, 1], C = 1 or 3")
        return images.cpu().clone()


def _copied(cond: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions for a user's function, which may work in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in cond.items()}
