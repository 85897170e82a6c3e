"""Stage 1: rows by linear least squares along the solver's own rollout, over a family of spacings. No backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import grid
from ..schedule import Schedule
from ..solver import Solver
from ..target import Samples
from .draws import Draws
from .teacher import Trajectory

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
    """A table fitted in closed form. score: the held-out robust error, smaller is better; spacing: its name."""

    solver: Solver
    score: float
    spacing: str
    ridges: tuple[float, ...]


def spacing(name: str, num_steps: int, schedule: Schedule) -> Tensor:
    """N + 1 points u: ``"fitted"``, the paper's polynomial for the family, or any of ``methods.grid``."""
    if name != "fitted":
        return grid(num_steps, schedule, name)
    i = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    u = torch.stack([c * i ** (k + 1) for k, c in enumerate(FITTED[schedule.family])]).sum(0)
    return (u / u[-1]).clamp(0, 1)


def warped(timesteps: Tensor, direction: int, amount: float) -> Tensor:
    """Timesteps whose log increments moved along a Legendre polynomial of degree 1, 2 or 3 in the step."""
    steps = len(timesteps) - 1
    z = torch.linspace(-1, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    shape = (z, 1.5 * z**2 - 0.5, 2.5 * z**3 - 1.5 * z)[direction]
    increments = torch.softmax(timesteps.diff().log() + amount * shape, 0)
    inner = increments.cumsum(0)[:-1]
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.ones(1, dtype=torch.float64)])


def respaced(timesteps: Tensor, num_steps: int) -> Tensor:
    """The spacing of one table carried over to another number of steps: linear in the step's fraction. float64."""
    old = torch.linspace(0, 1, len(timesteps), dtype=torch.float64)
    new = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    k = torch.searchsorted(old, new, right=True).sub(1).clamp(0, len(old) - 2)
    fraction = (new - old[k]) / (old[k + 1] - old[k])
    u = timesteps[k] + fraction * (timesteps[k + 1] - timesteps[k])
    u[0], u[-1] = 0, 1
    return u


@torch.no_grad()
def fit(
    draws: Draws,
    data: Iterable[tuple[Samples, Trajectory]],
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
    schedule = draws.target.schedule
    assert schedule is not None
    u = timesteps.double()
    steps = len(u) - 1
    a, b = schedule.transition(u)
    runs = [_Run(draws, batch, trajectory.at(u[1:])) for batch, trajectory in data]
    coeffs = torch.zeros(steps, steps, dtype=torch.float64)
    weights_noise = torch.zeros(steps, dtype=torch.float64)
    chosen = []
    for i in range(steps):
        for run in runs:
            run.history.append(run.predict(run.x, u[i]))
        # The initial noise and a flow's first velocity differ by the data's mean only.
        with_noise = noise and i > 0
        grams = torch.stack([run.gram(i, float(a[i]), float(b[i]), free_rows, with_noise) for run in runs]).sum(0)
        draws.all_reduce(grams)
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
    size = sum(run.batch.size for run in runs)
    errors = torch.zeros(size, dtype=torch.float64)
    start = 0
    for run in runs:
        errors[draws.mine(start, run.batch.size)] = run.error().cpu()
        start += run.batch.size
    draws.all_reduce(errors)
    scale = 10 * float(errors.median()) if scale is None else scale
    score = float((errors[3::4] if size > 3 else errors).div(scale).log1p().mean())
    solver = Solver(
        tuple(u.tolist()),
        tuple(map(tuple, coeffs.tolist())),
        schedule,
        noise_coeffs=tuple(weights_noise.tolist()) if noise else None,
        free_rows=free_rows,
    )
    return Fit(solver, score, name, tuple(chosen)), scale


@dataclass
class Spacings:
    """Which spacing to fit next: those to start from, then warps of the best one's increments, a pattern search.

    After each fit, :meth:`tell` it: the best so far is the fit with the smallest score.
    """

    start: list[tuple[str, Tensor]]
    trials: int
    best: Fit | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, u in self.start[: max(1, self.trials)]:
            if bool((u.diff() <= 0).any()):
                continue
            self.trials -= 1
            yield name, u
        if self.best is None or self.best.solver.num_steps == 1:
            return
        amount, direction, sign, failures = WARP, 0, 1.0, 0
        while self.trials > 0 and amount > WARP / 8:
            before, u = self.best, torch.tensor(self.best.solver.timesteps, dtype=torch.float64)
            self.trials -= 1
            yield "warped", warped(u, direction, sign * amount)
            if self.best is not before:
                failures = 0
                continue
            failures += 1
            sign = -sign
            if failures % 2 == 0:
                direction, sign = (direction + 1) % 3, 1.0
            if failures == 6:
                amount, failures = amount / 2, 0

    def tell(self, found: Fit) -> None:
        """Takes note of the fit of the spacing that was given last."""
        if self.best is None or found.score < self.best.score:
            self.best = found


def starts(schedule: Schedule, num_steps: int, done: dict[int, Solver], trials: int) -> Spacings:
    """The family of spacings, or, when one N is already done, that of its nearest neighbour first."""
    names = [(name, spacing(name, num_steps, schedule)) for name in FAMILY[schedule.family]]
    if not done:
        return Spacings(names, trials)
    near = min(done, key=lambda n: abs(n - num_steps))
    u = torch.tensor(done[near].timesteps, dtype=torch.float64)
    return Spacings([(f"from N = {near}", respaced(u, num_steps)), *names[:1]], min(trials, 6))


class _Run:
    """One batch on its way: the state, what the network said so far, where the teacher is."""

    def __init__(self, draws: Draws, batch: Samples, targets: Tensor):
        self.batch = batch
        self.predict = batch.predictor(check_finite=None)
        self.targets = targets.flatten(2)
        self.x = self.first = batch.noise
        self.history: list[Tensor] = []
        numbers = torch.arange(draws.rank, batch.size, draws.world)
        self.held_out = (numbers % 4 == 3).to(batch.noise.device)

    def gram(self, i: int, a: float, b: float, free_rows: bool, noise: bool) -> Tensor:
        """(2, k + 1, k + 1) float64: F and r's inner products over training and held-out samples."""
        now = self.history[i]
        columns = [b * (y - now) for y in self.history[:i]]
        columns += [b * now] if free_rows else []
        columns += [b * self.first] if noise else []
        columns.append(self.targets[:, i].reshape(now.shape) - a * self.x - b * now)
        f = torch.stack([c.flatten(1) for c in columns], 1).double()
        grams = f @ f.mT
        return torch.stack([grams[~self.held_out].sum(0), grams[self.held_out].sum(0)])

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
    train, held_out = grams.cpu()
    if not bool(grams.isfinite().all()):  # on a GPU nobody has looked before
        raise FloatingPointError("the model returned NaN or Inf while rows were fitted")
    if not bool((held_out.diagonal() > 0).any()):
        held_out = train
    matrix, right = train[:-1, :-1], train[:-1, -1]
    if not len(right):
        return right, 0.0
    scale = matrix.diagonal().clamp_min(1e-300).sqrt()
    unit = matrix / scale[:, None] / scale

    def solution(ridge: float) -> Tensor:
        return torch.linalg.solve(unit + ridge * torch.eye(len(right), dtype=torch.float64), right / scale) / scale

    def error(d: Tensor) -> float:
        return float(d @ held_out[:-1, :-1] @ d - 2 * d @ held_out[:-1, -1])

    return min(((solution(ridge), ridge) for ridge in ridges), key=lambda found: error(found[0]))
