"""The paper's recipe (arXiv 2505.21114): softmax increments, a strict triangle, Lion on the unrolled run.

    dt = softmax(raws),  u_{i+1} = u_i + dt_i,  c_ii = 1 - sum_{j<i} c_ij
    loss = sum_i mean |x_i - teacher[round(u_i L)]|^2 + 1000 mean huber_{0.001}(x_N - teacher[L])

The released code differs from the paper where it cannot have made its tables: increments that skip the
softmax, a second update per VP step, in-place sums that break the gradient, the doubled batch at scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..distance import squares
from ..names import find_solver
from ..schedule import VP, Schedule
from ..solver import Solver
from ..target import Samples
from ..trajectory import sent
from ..unroll import Rollout, unroll
from .best import Best, better
from .budget import Ledger
from .job import Job
from .result import Event
from .rounds import Candidate
from .settings import Lion
from .space import Space


@dataclass(eq=False)
class Point:
    """Where Lion stands for one N: theta, a leaf, its momentum, and the best table of all looks."""

    space: Space
    theta: Tensor
    momentum: Tensor
    best: Best | None = None

    @classmethod
    def at(cls, space: Space, solver: Solver) -> Point:
        """At a table. Equal steps get raws of 1, as the paper starts, which matters to weight decay alone."""
        theta = space.theta(solver)
        theta[: space.num_steps] += 1
        return cls(space, theta.requires_grad_(), torch.zeros_like(theta))

    def solver(self) -> Solver:
        """The table of the smallest held-out error, or the present one where none was ever measured."""
        return self.space.solver(self.theta.detach() if self.best is None else self.best.theta)


class Recipe:
    """What the paper's search computes: its loss on batches of a teacher of first order, and looks at held-out ones."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        assert isinstance(job.settings, Lion)
        self.draws, self.ledger, self.settings = job.draws, ledger, job.settings
        self.calls = len(paper_points(job.draws.schedule, self.settings.teacher_steps)) - 1
        size, unique, samples = self.settings.batch_size, self.settings.unique_samples, self.settings.check_samples
        self.repeats = unique is not None and unique < self.settings.samples
        self.numbers = (unique or 0) // size if self.repeats else math.ceil(self.settings.samples / size)
        self.held_out = [min(size, samples - k) for k in range(0, samples, size)]
        self.room, rows = job.room, -(-size // self.draws.world)
        one = (self.calls + 1) * math.prod(self.draws.target.shape or ()) * self.draws.target.dtype.itemsize
        # All of them or none, so that every process counts the same.
        self.kept = self.repeats and self.room.keeps(self.numbers * rows * one)
        self._made: dict[tuple[str, int], Tensor] = {}

    def cost(self, number: int, steps: tuple[int, ...]) -> int:
        """Evaluations of a batch for these N: its teacher, where it is new, a forward and a backward."""
        new = not self.kept or number < self.numbers
        return self.settings.batch_size * (self.calls * new + 3 * sum(steps))

    def batch(self, number: int) -> tuple[Samples, Tensor]:
        """A batch and its teacher's states (B, L + 1, *S)."""
        k = number % self.numbers
        batch = self.draws.batch("train", k, self.settings.batch_size)
        states = self._states("train", k, batch, keep=self.kept)
        if not self.kept or number < self.numbers:
            self.ledger.spend(self.settings.batch_size * self.calls)
        return batch, states

    def loss(self, point: Point, batch: Samples, trajectory: Tensor) -> tuple[Tensor, Tensor]:
        """The loss over all processes and its gradient in theta."""
        losses, gradients = [], []
        for part in self.room.over(slice(0, len(batch))):
            with part as rows:
                loss = self._part(point, batch.rows(rows), trajectory[rows], batch.size)
                gradients.append(torch.autograd.grad(loss, point.theta)[0])
                losses.append(loss.detach())
        loss, gradient = reduce(torch.add, losses), reduce(torch.add, gradients)
        self.draws.all_reduce(loss, gradient)
        self.ledger.spend(3 * self.settings.batch_size * point.space.num_steps)
        return loss, gradient

    def _part(self, point: Point, batch: Samples, trajectory: Tensor, size: int) -> Tensor:
        """What some samples add to the loss of a batch of ``size``."""
        table = point.space.table(point.theta, batch.guidance).to(batch.noise.device, batch.noise.dtype)
        states = unroll(batch.denoiser(None), batch.noise, table.weights, table.times, memory_budget=self.room.graphs)
        last = trajectory.shape[1] - 1
        timesteps = point.space.numbers(point.theta.detach()).timesteps
        nearest = (timesteps[1:] * last).round().long().clamp(0, last).to(trajectory.device)
        real = torch.promote_types(states.dtype, torch.float32)
        difference = (states - sent(trajectory[:, nearest], states.device)).to(real)
        share = size * difference[0, 0].numel()
        loss = difference.square().sum() / share
        if self.settings.huber_weight:
            end, delta = difference[:, -1], self.settings.huber_delta
            huber = torch.nn.functional.huber_loss(end, torch.zeros_like(end), reduction="sum", delta=delta)
            loss = loss + self.settings.huber_weight * huber / share
        return loss

    def affords_look(self, steps: tuple[int, ...]) -> bool:
        """Whether there are held-out samples and the budget allows a look at tables of these N."""
        new = "held-out teacher" not in self.ledger.counted
        return bool(self.held_out) and self.ledger.affords(sum(self.held_out) * (sum(steps) + self.calls * new))

    @torch.no_grad()
    def look(self, point: Point) -> float:
        """The root mean square error of the end points on noise that is never trained on, against the same teacher;
        infinite where one diverges."""
        candidate, errors = Candidate(point.space, point.theta.detach(), (1.0,)), []
        for k, size in enumerate(self.held_out):
            batch = self.draws.batch("held_out", k, size)
            end = self._states("held_out", k, batch, keep=True)[:, -1]
            parts: list[Tensor] = []
            for part in self.room.over(slice(0, len(batch))):
                with part as rows:
                    some = batch.rows(rows)
                    table = candidate.table(some)
                    states = Rollout(some.denoiser(None), some.noise, table.weights, table.times, wrt=()).states
                    parts.append(squares(states[:, -1], sent(end[rows], states.device)))
            errors.append(torch.cat(parts))
        self.ledger.spend_once("held-out teacher", sum(self.held_out) * self.calls)
        self.ledger.spend(sum(self.held_out) * point.space.num_steps)
        try:
            return float(self.draws.gathered(self.held_out, errors)[0].mean().sqrt())
        except FloatingPointError:
            return math.inf

    def _states(self, stream: str, k: int, batch: Samples, keep: bool) -> Tensor:
        """The teacher's states of a batch, of a held-out one the last; on the host where they are kept."""
        found = self._made.get((stream, k))
        if found is None:
            parts: list[Tensor] = []
            for part in self.room.over(slice(0, len(batch))):
                with part as rows:
                    some, num = batch.rows(rows), self.settings.teacher_steps
                    states = paper_trajectory(some.predictor(None), some.noise, some.schedule, num)
                    states = states[:, -1:] if stream == "held_out" else states
                    parts.append(states.cpu() if keep or self.room.rows else states)
            found = torch.cat(parts)
            if keep:
                self._made[stream, k] = found
        return found


def imitate(job: Job, ledger: Ledger, saved: dict[str, Any] | None = None) -> Iterator[Event]:
    """The events of a search by the paper's recipe. saved: the state of one to go on with."""
    settings, steps, recipe = job.settings, job.steps, Recipe(job, ledger)
    assert isinstance(settings, Lion)
    total = math.ceil(settings.samples / settings.batch_size)
    starts = job.initial or {n: find_solver("euler", job.draws.schedule, n) for n in steps}
    points = {n: Point.at(settings.space_of(job.draws.schedule, n), starts[n]) for n in steps}
    done = 0
    if saved is not None:
        done = saved["done"]
        for n, point in points.items():
            _load(point, saved["points"][n])

    def look() -> dict[int, float]:
        errors = {n: recipe.look(point) for n, point in points.items()}
        for n, point in points.items():
            point.best = better(point.best, point.theta.detach(), errors[n])
        return errors

    def event(*, resumable: bool = True, **told: Any) -> Event:
        state = {"done": done, "points": {n: _saved(point) for n, point in points.items()}}
        solvers = {n: point.solver() for n, point in points.items() if done or point.best}
        return Event(
            "lion", done, total, solvers, starts, state if resumable else None, done == total, "batches", **told
        )

    if saved is None:
        if not ledger.affords(recipe.cost(0, steps)):
            raise ValueError(f"budget={ledger.budget!r}: the first batch alone takes {recipe.cost(0, steps)}")
        yield event(resumable=False)
        if recipe.affords_look(steps):
            yield event(held_out=look())
    every = settings.check_every or max(1, total // 20)
    while done < total and ledger.affords(recipe.cost(done, steps)):
        batch, trajectory = recipe.batch(done)
        losses = {n: _step(point, recipe, batch, trajectory, f"batch {done} of {total}") for n, point in points.items()}
        done += 1
        due = done % every == 0 or done == total
        yield event(loss=losses, held_out=look() if due and recipe.affords_look(steps) else {})


def _step(point: Point, recipe: Recipe, batch: Samples, trajectory: Tensor, where: str) -> float:
    """One step of Lion; its loss. Raises FloatingPointError when that or its gradient is NaN or Inf."""
    from lion_pytorch.lion_pytorch import update_fn  # the Optimizer beside it imports the compiler, seconds

    settings = recipe.settings
    loss, gradient = recipe.loss(point, batch, trajectory)
    if not bool(loss.isfinite() & gradient.isfinite().all()):
        raise FloatingPointError(
            f"the loss of N = {point.space.num_steps} is {float(loss):.4g} with gradients not all finite, at {where}; "
            f"a smaller lr than {settings.lr} may help"
        )
    with torch.no_grad():
        update_fn(point.theta, gradient, point.momentum, settings.lr, settings.weight_decay, *settings.betas)
    return float(loss)


def _saved(point: Point) -> dict[str, Any]:
    best = None if point.best is None else vars(point.best)
    return {"theta": point.theta.detach().clone(), "momentum": point.momentum.clone(), "best": best}


def _load(point: Point, saved: dict[str, Any]) -> None:
    with torch.no_grad():
        point.theta.copy_(saved["theta"])
    point.momentum = saved["momentum"].clone()
    point.best = None if saved["best"] is None else Best(**saved["best"])


def paper_points(schedule: Schedule, num: int = 100) -> Tensor:
    """The paper's teacher grid: ``num`` Euler steps for a flow (num + 1 points), ``num`` points of DDIM for VP.

    VP: t from t_start to 0 in equal parts, the last clamped to t_end, so num - 1 model calls and no final
    jump to x0 (arXiv 2505.21114, released code).
    """
    if schedule.family == "flow":
        return torch.linspace(0, 1, num + 1, dtype=torch.float64)
    return torch.linspace(0, schedule.t_start if isinstance(schedule, VP) else 1.0, num, dtype=torch.float64)


@torch.no_grad()
def paper_trajectory(
    predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, schedule: Schedule, num: int = 100
) -> Tensor:
    """The states of the paper's teacher, (B, L + 1, *S): L = 100 first-order steps for a flow, 99 for VP."""
    points = paper_points(schedule, num)
    a, b = schedule.transition(points)
    states = [x]
    for i in range(len(points) - 1):
        y = predict(x, points[i])
        x = float(a[i]) * x + float(b[i]) * y
        states.append(x)
    return torch.stack(states, 1)
