"""Stage 1: rows by linear least squares along the solver's own rollout, over a family of spacings. No backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..handmade import grid
from ..problem import Batch, Problem
from ..schedule import Schedule, transition
from ..solver import Solver
from ..teacher import Trajectory
from .space import SPACES, respaced

RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
# Fitted by the paper to its searched timesteps (arXiv 2505.21114, section 5): u as a polynomial of i / N.
FITTED = {"flow": (0.43, -0.97, 3.51, -1.96), "vp": (2.17, -4.744, 6.30, -2.73)}
FAMILY = {
    "flow": ("uniform", "shift1.5", "shift2", "fitted", "shift0.67", "lambda"),
    "vp": ("uniform", "fitted", "lambda", "shift2", "shift0.67", "karras"),
}
WARP = 0.25  # first step of the refinement, in log increments


@dataclass(frozen=True)
class Fit:
    """A table fitted in closed form. score: the held-out robust error, smaller is better; errors: (n,) |e|^2."""

    solver: Solver
    score: float
    spacing: str
    ridges: tuple[float, ...]


def spacing(name: str, num_steps: int, schedule: Schedule) -> Tensor:
    """N + 1 points u: ``"fitted"``, the paper's polynomial for the family, or any of ``handmade.grid``."""
    if name != "fitted":
        return grid(num_steps, schedule, name)
    i = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    u = sum(c * i ** (k + 1) for k, c in enumerate(FITTED[schedule.family]))
    return (u / u[-1]).clamp(0, 1)


def warped(timesteps: Tensor, direction: int, amount: float) -> Tensor:
    """Timesteps whose log increments moved along a Legendre polynomial of degree 1, 2 or 3 in the step."""
    steps = len(timesteps) - 1
    z = torch.linspace(-1, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    shape = (z, 1.5 * z**2 - 0.5, 2.5 * z**3 - 1.5 * z)[direction]
    increments = torch.softmax(timesteps.diff().log() + amount * shape, 0)
    inner = increments.cumsum(0)[:-1]
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.ones(1, dtype=torch.float64)])


@torch.no_grad()
def fit(
    problem: Problem,
    data: Iterable[tuple[Batch, Trajectory]],
    timesteps: Tensor,
    *,
    free_rows: bool = False,
    noise: bool = False,
    ridges: tuple[float, ...] = RIDGES,
    scale: float | None = None,
    name: str = "",
) -> tuple[Fit, float]:
    """Rows that land nearest the teacher, each given the states that the rows before it led to:

        min over d  sum_b |F_b d - r_b|^2 + ridge |D d|^2,    r = teacher(u_{i+1}) - a_i x_i - b_i y_i

    F's columns are b_i (y_j - y_i), j < i; with free rows also b_i y_i, with noise also b_i x_init; D^2 is the
    diagonal of F'F. Every fourth sample is held out: it chooses each row's ridge and gives the score,
    the mean of log(1 + |e|^2 / scale) at the end point.

    data: pairs of batch and teacher trajectory; their states and histories are kept, N + 1 numbers per
    element. Costs N model evaluations per sample. scale: by default ten medians of |e|^2, returned.
    """
    u = timesteps.double()
    steps, schedule = len(u) - 1, problem.schedule
    a, b = transition(schedule, u)
    runs = [_Run(problem, batch, trajectory.at(u[1:])) for batch, trajectory in data]
    size = sum(run.batch.size for run in runs)
    coeffs = torch.zeros(steps, steps, dtype=torch.float64)
    weights_noise = torch.zeros(steps, dtype=torch.float64)
    chosen = []
    for i in range(steps):
        for run in runs:
            run.call(u[i])
        # The initial noise and a flow's first velocity differ by the data's mean only.
        with_noise = noise and i > 0
        grams = sum(run.gram(i, float(a[i]), float(b[i]), free_rows, with_noise) for run in runs)
        problem.all_reduce(grams)
        solution, ridge = _solve(grams, ridges)
        chosen.append(ridge)
        coeffs[i, :i] = solution[:i]
        coeffs[i, i] = 1 - solution[:i].sum()
        if free_rows:
            coeffs[i, i] += solution[i]
        if with_noise:
            weights_noise[i] = solution[-1]
        for run in runs:
            run.advance(float(a[i]), float(b[i]) * coeffs[i, : i + 1], float(b[i] * weights_noise[i]))
    problem.spend(size * steps)
    errors = torch.zeros(size, dtype=torch.float64)
    start = 0
    for run in runs:
        errors[start + problem.rank : start + run.batch.size : problem.world] = run.error().cpu()
        start += run.batch.size
    problem.all_reduce(errors)
    scale = 10 * float(errors.median()) if scale is None else scale
    score = float((errors[3::4] if size > 3 else errors).div(scale).log1p().mean())
    solver = Solver(
        tuple(u.tolist()),
        tuple(map(tuple, coeffs.tolist())),
        schedule.family,
        noise_coeffs=tuple(weights_noise.tolist()) if noise else None,
        free_rows=free_rows,
    )
    return Fit(solver, score, name, tuple(chosen)), scale


def candidates(
    problem: Problem,
    data: list[tuple[Batch, Trajectory]],
    start: list[tuple[str, Tensor]],
    trials: int,
    **options,
) -> Iterator[Fit]:
    """Fits the spacings in ``start``, then warps the best one's increments: pattern search, ``trials`` fits in all.

    The best so far is the fit with the smallest score. Yields each fit.
    """
    best, scale = None, None
    for name, u in start[: max(1, trials)]:
        if bool((u.diff() <= 0).any()):
            continue
        found, scale = fit(problem, data, u, scale=scale, name=name, **options)
        best = found if best is None or found.score < best.score else best
        trials -= 1
        yield found
    if best.solver.num_steps == 1:
        return
    amount, direction, sign, failures = WARP, 0, 1.0, 0
    while trials > 0 and amount > WARP / 8:
        u = torch.tensor(best.solver.timesteps, dtype=torch.float64)
        found, _ = fit(problem, data, warped(u, direction, sign * amount), scale=scale, name="warped", **options)
        trials -= 1
        yield found
        if found.score < best.score:
            best, failures = found, 0
            continue
        failures += 1
        sign = -sign
        if failures % 2 == 0:
            direction, sign = (direction + 1) % 3, 1.0
        if failures == 6:
            amount, failures = amount / 2, 0


def extras(space: str) -> dict:
    """What of a space's freedom the closed form can use."""
    return {"free_rows": "rows" in SPACES[space], "noise": "noise" in SPACES[space]}


def stage_one(
    problem: Problem,
    few: list[tuple[Batch, Trajectory]],
    n: int,
    space: str,
    trials: int,
    first: dict[str, list],
    given: Solver | None,
) -> Iterator[Fit]:
    """Fits over the family of spacings, or from a neighbour's when one N is already done."""
    names = FAMILY[problem.schedule.family]
    start = [(name, spacing(name, n, problem.schedule)) for name in names]
    if first:
        near = min(first, key=lambda done: abs(int(done) - n))
        u = torch.tensor(first[near][0].timesteps, dtype=torch.float64)
        start = [(f"from N = {near}", respaced(u, n)), *start[:1]]
        trials = min(trials, 6)
    if given is not None:
        u = torch.tensor(given.timesteps, dtype=torch.float64)
        if not any(torch.allclose(u, other) for _, other in start):
            start.insert(0, (given.name or "initial", u))
    size = sum(batch.size for batch, _ in few)
    if problem.budget is not None:
        trials = max(1, min(trials, int((problem.budget - problem.evaluations) * 0.3 // (n * size))))
    yield from candidates(problem, few, start, trials, **extras(space))


class _Run:
    """One batch on its way: the state, what the network said so far, where the teacher is."""

    def __init__(self, problem: Problem, batch: Batch, targets: Tensor):
        self.problem, self.batch = problem, batch
        self.predict = problem.predictor(batch)
        self.targets = targets.flatten(2)
        self.x = self.first = batch.noise
        self.history: list[Tensor] = []
        numbers = torch.arange(problem.rank, batch.size, problem.world)
        self.held_out = (numbers % 4 == 3).to(batch.noise.device)

    def call(self, u: Tensor) -> None:
        self.history.append(self.predict(self.x, u))

    def gram(self, i: int, a: float, b: float, free_rows: bool, noise: bool) -> Tensor:
        """(2, k + 1, k + 1) float64: F and r's inner products over training and held-out samples."""
        now = self.history[i]
        columns = [b * (y - now) for y in self.history[:i]]
        columns += [b * now] if free_rows else []
        columns += [b * self.first] if noise else []
        columns.append(self.targets[:, i].reshape(now.shape) - a * self.x - b * now)
        f = torch.stack([c.flatten(1) for c in columns], 1).double()
        grams = f @ f.mT
        both = torch.stack([grams[~self.held_out].sum(0), grams[self.held_out].sum(0)])
        return both

    def advance(self, a: float, row: Tensor, noise: float) -> None:
        x = a * self.x
        for w, y in zip(row.tolist(), self.history, strict=True):
            x = x + w * y
        self.x = x + noise * self.first if noise else x

    def error(self) -> Tensor:
        """(B,) mean of squares at the end point."""
        return (self.x.flatten(1) - self.targets[:, -1]).double().square().mean(1)


def _solve(grams: Tensor, ridges: tuple[float, ...]) -> tuple[Tensor, float]:
    """The solution whose ridge does best on the held-out inner products (on its own when there are none)."""
    grams = grams.cpu()
    train, held_out = grams
    if not bool((held_out.diagonal() > 0).any()):
        held_out = train
    matrix, right = train[:-1, :-1], train[:-1, -1]
    if not len(right):
        return right, 0.0
    scale = matrix.diagonal().clamp_min(1e-300).sqrt()
    unit = matrix / scale[:, None] / scale
    best = None
    for ridge in ridges:
        system = unit + ridge * torch.eye(len(right), dtype=torch.float64)
        d = torch.linalg.solve(system, right / scale) / scale
        error = float(d @ held_out[:-1, :-1] @ d - 2 * d @ held_out[:-1, -1])
        if best is None or error < best[0]:
            best = error, d, ridge
    return best[1], best[2]
