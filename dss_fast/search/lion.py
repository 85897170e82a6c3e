"""The paper's recipe (arXiv 2505.21114): softmax increments, a strict triangle, Lion on the unrolled run.

    dt = softmax(raws),  u_{i+1} = u_i + dt_i,  c_ii = 1 - sum_{j<i} c_ij
    loss = sum_i mean |x_i - teacher[round(u_i L)]|^2 + 1000 mean huber_{0.001}(x_N - teacher[L])

The released code differs from the paper where it cannot have made its tables: increments that skip the
softmax, a second update per VP step, in-place sums that break the gradient, the doubled batch at scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..problem import Batch, Problem
from ..sampling import find_solver
from ..solver import Solver
from ..teacher import paper_trajectory
from ..teacher_store import Store
from ..unroll import unroll


def lion(
    problem: Problem,
    steps: tuple[int, ...],
    *,
    state: dict | None = None,
    initial: str | Solver = "euler",
    cache: str | Path | None = None,
    key: str | None = None,
    samples: int = 50_000,
    batch_size: int = 32,
    unique_samples: int | None = None,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    huber_weight: float = 1000.0,
    huber_delta: float = 1e-3,
    teacher_steps: int = 100,
    short_tail: bool | None = None,
    check_every: int | None = None,
    check_samples: int = 128,
    memory: int = 2 << 30,
    memory_budget: int | float | None = 1 << 30,
) -> Iterator[dict]:
    """Algorithms 1 (flow) and 2 (VP) of the paper. All N share each batch and its teacher trajectory.

    samples, batch_size: trajectories in all, and per step of Lion. unique_samples: repeat so many of them
        (a multiple of batch_size), their trajectories kept. None: each is new.
    huber_weight: of 1000 * Huber(huber_delta) on the last point; 0 leaves the trajectory MSE alone.
    teacher_steps: of Euler; for VP the points of DDIM.
    short_tail: the last two rows use the immediately preceding output only; None: for N = 5 and 6.
    check_every: batches between looks at ``check_samples`` held-out ones, 20 looks by default. The solver
        with the smallest held-out error at the end point is kept. check_samples=0: the last is.
    cache, key, memory: of kept trajectories, see ``Teacher``. memory_budget: see ``unroll``.
    """
    update = _lion_update()
    total = math.ceil(samples / batch_size)
    check_every = check_every or max(1, total // 20)
    points = {n: _Point(n, problem, initial, short_tail) for n in steps}
    done = 0
    if state is not None:
        done = state["done"]
        for n, point in points.items():
            point.load(state["points"][str(n)])

    def event(**values) -> dict:
        return {
            "stage": "lion",
            "done": done,
            "total": total,
            "solvers": {n: point.best() for n, point in points.items()},
            "state": {"done": done, "points": {str(n): p.save() for n, p in points.items()}},
            **values,
        }

    settings = {"kind": "paper", "steps": teacher_steps, "batch_size": batch_size}
    kept = None
    if unique_samples is not None and unique_samples < samples:
        if unique_samples % batch_size or unique_samples < batch_size:
            raise ValueError(f"unique_samples={unique_samples!r}: give a multiple of batch_size={batch_size}")
        kept = Store(problem, settings, cache=cache, memory=memory, key=key)
    numbers = (unique_samples or samples) // batch_size if kept else total
    calls = teacher_steps if problem.schedule.family == "flow" else teacher_steps - 1
    held_out = _HeldOut(problem, check_samples, batch_size, teacher_steps, calls, cache, key)

    if state is None:
        yield event(state=None)
        if check_samples and problem.affords(held_out.cost(steps)):
            yield event(held_out={n: point.offer(held_out.error(point)) for n, point in points.items()})
    while done < total:
        number = done % numbers
        new = kept is None or done < numbers
        if not problem.affords(batch_size * (calls * new + 3 * sum(steps))):
            break
        batch = problem.batch("train", number, batch_size)
        trajectory = _paper_states(problem, batch, teacher_steps, kept, number)
        if new:
            problem.spend(batch_size * calls)
        losses = {}
        for n, point in points.items():
            loss = point.loss(problem, batch, trajectory, huber_weight, huber_delta, memory_budget)
            gradients = torch.autograd.grad(loss, point.parameters)
            loss = loss.detach()
            problem.all_reduce(loss, *gradients)
            problem.spend(batch_size * 3 * n)
            if not all(bool(v.isfinite().all()) for v in (loss, *gradients)):
                raise FloatingPointError(
                    f"the loss of N = {n} is {float(loss):.4g} with gradients not all finite, at batch "
                    f"{done} of {total}; a smaller lr than {lr} may help"
                )
            with torch.no_grad():
                for value, gradient, moment in zip(point.parameters, gradients, point.moments, strict=True):
                    update(value, gradient, moment, lr, weight_decay, *betas)
            losses[n] = float(loss)
        done += 1
        looks = {}
        due = check_samples and (done % check_every == 0 or done == total)
        if due and problem.affords(held_out.cost(steps)):
            looks = {"held_out": {n: point.offer(held_out.error(point)) for n, point in points.items()}}
        yield event(loss=losses, **looks)


class _Point:
    """A point of the paper's space: raws (N,) and the free entries of the strict triangle, float64."""

    def __init__(self, num_steps: int, problem: Problem, initial: str | Solver, short_tail: bool | None):
        n = self.num_steps = num_steps
        self.family = problem.schedule.family
        row, column = torch.tril_indices(n, n, -1)
        if n in (5, 6) if short_tail is None else short_tail:
            free = (row < n - 2) | (column == row - 1)
            row, column = row[free], column[free]
        self.places = row, column
        start = initial if isinstance(initial, Solver) else find_solver(initial, problem.schedule, n)
        if start.num_steps != n or start.family != self.family:
            raise ValueError(
                f"initial={start.name!r} has {start.num_steps} steps for {start.family}; "
                f"the search is for {n} steps and {self.family}"
            )
        table = start.tensors()
        # 1 for equal steps, the paper's start
        self.raws = 1 + (table["timesteps"].diff() * n).log()
        self.lower = table["coeffs"][self.places]
        self.parameters = [self.raws.requires_grad_(), self.lower.requires_grad_()]
        self.moments = [torch.zeros_like(p) for p in self.parameters]
        self.best_error = math.inf
        self.chosen = [p.detach().clone() for p in self.parameters]

    def table(self) -> tuple[Tensor, Tensor]:
        """timesteps (N + 1,) and coeffs (N, N), differentiable."""
        return point_table(self.raws, self.lower, self.places)

    def loss(self, problem, batch, trajectory, huber_weight, huber_delta, memory_budget) -> Tensor:
        """The loss of this process's rows; summed over processes it is that of the batch."""
        timesteps, coeffs = self.table()
        weights, times = problem.weights(batch, timesteps, coeffs)
        real = torch.promote_types(problem.dtype, torch.float32)
        states = unroll(
            problem.denoiser(batch),
            batch.noise,
            weights.to(problem.device, real),
            times.to(problem.device, real),
            guided=problem.guided_elements,
            memory_budget=memory_budget,
        )
        last = trajectory.shape[1] - 1
        nearest = (timesteps[1:].detach() * last).round().long().clamp(0, last).to(trajectory.device)
        difference = (states - trajectory[:, nearest]).to(real)
        share = batch.size * math.prod(problem.shape)
        loss = difference.square().sum() / share
        if huber_weight:
            end = difference[:, -1]
            huber = torch.nn.functional.huber_loss(end, torch.zeros_like(end), reduction="sum", delta=huber_delta)
            loss = loss + huber_weight * huber / share
        return loss

    def offer(self, error: float) -> float:
        """Keeps the present values if their held-out error is the smallest so far."""
        if error < self.best_error:
            self.best_error, self.chosen = error, [p.detach().clone() for p in self.parameters]
        return error

    def best(self) -> Solver:
        """The chosen point, or the present one when nothing was ever chosen."""
        values = self.parameters if math.isinf(self.best_error) else self.chosen
        raws, lower = (v.detach() for v in values)
        _, coeffs = point_table(raws, lower, self.places)
        rows = [row[:i] for i, row in enumerate(coeffs.tolist())]
        return Solver.from_timedeltas(torch.softmax(raws, 0), rows, self.family)

    def save(self) -> dict:
        return {
            "raws": self.raws.detach().clone(),
            "lower": self.lower.detach().clone(),
            "moments": [moment.clone() for moment in self.moments],
            "chosen": list(self.chosen),
            "best_error": self.best_error,
        }

    def load(self, saved: dict) -> None:
        with torch.no_grad():
            self.raws.copy_(saved["raws"])
            self.lower.copy_(saved["lower"])
        self.moments = [moment.clone() for moment in saved["moments"]]
        self.chosen, self.best_error = list(saved["chosen"]), saved["best_error"]


class _HeldOut:
    """The end-point error on noise that is never trained on, against the same teacher."""

    def __init__(self, problem, samples, batch_size, teacher_steps, calls, cache, key):
        self.problem, self.samples, self.calls = problem, samples, calls
        self.teacher_steps = teacher_steps
        self.sizes = [min(batch_size, samples - k) for k in range(0, samples, batch_size)]
        self.sizes = [size for size in self.sizes if size >= problem.world]
        settings = {"kind": "paper end", "steps": teacher_steps, "sizes": self.sizes}
        self.store = Store(problem, settings, cache=cache, key=key) if samples else None

    def cost(self, steps: tuple[int, ...]) -> int:
        new = "held-out teacher" not in self.problem.counted
        return sum(self.sizes) * (sum(steps) + self.calls * new)

    @torch.no_grad()
    def error(self, point: _Point) -> float:
        """Root mean square over samples, elements and processes."""
        problem, sums = self.problem, torch.zeros(2, dtype=torch.float64)
        for k, size in enumerate(self.sizes):
            batch = problem.batch("held_out", k, size)
            target = self.store.get(k, batch, lambda b=batch: self._end(b))["end"].to(problem.device)
            timesteps, coeffs = point.table()
            weights, times = problem.weights(batch, timesteps, coeffs)
            real = torch.promote_types(problem.dtype, torch.float32)
            weights, times = weights.to(problem.device, real), times.to(problem.device, real)
            states = unroll(problem.denoiser(batch), batch.noise, weights, times, guided=problem.guided_elements)
            error = (states[:, -1] - target).double().square()
            sums += torch.tensor([float(error.sum()), error.numel()], dtype=torch.float64)
        problem.spend_once("held-out teacher", sum(self.sizes) * self.calls)
        problem.spend(sum(self.sizes) * point.num_steps)
        problem.all_reduce(sums)
        return float((sums[0] / sums[1]).sqrt())

    def _end(self, batch: Batch) -> dict[str, Tensor]:
        problem = self.problem
        states = paper_trajectory(problem.predictor(batch), batch.noise, problem.schedule, self.teacher_steps)
        return {"end": states[:, -1]}


def point_table(raws: Tensor, lower: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """timesteps (N + 1,) and coeffs (N, N) from raws (N,) and the triangle's free entries; differentiable."""
    n = len(raws)
    timesteps = torch.cat([raws.new_zeros(1), torch.softmax(raws, 0).cumsum(0)])
    triangle = raws.new_zeros(n, n).index_put(places, lower)
    return timesteps, triangle + torch.diag(1 - triangle.sum(1))


def _paper_states(problem: Problem, batch: Batch, num: int, kept: Store | None, number: int) -> Tensor:
    def build() -> dict[str, Tensor]:
        states = paper_trajectory(problem.predictor(batch), batch.noise, problem.schedule, num)
        return {"states": states}

    if kept is None:
        return build()["states"]
    return kept.get(number, batch, build)["states"].to(problem.device)


def _lion_update():
    """Lion's update of one tensor, of the lion-pytorch package. Its Optimizer would import the compiler, seconds."""
    try:
        from lion_pytorch.lion_pytorch import update_fn
    except ImportError as error:
        raise ImportError("method='lion' needs lion-pytorch: pip install dss_fast[search]") from error
    return update_fn
