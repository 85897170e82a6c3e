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
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..draws import Draws
from ..names import find_solver
from ..schedule import VP, Schedule
from ..solver import Solver
from ..table import StepTable
from ..target import Samples
from ..trajectory import sent
from ..unroll import unroll
from .ledger import Ledger
from .settings import check_counts, graph_memory
from .store import Store


@dataclass(frozen=True)
class Lion:
    """Settings of Algorithms 1 (flow) and 2 (VP) of the paper. All N share each batch and its teacher trajectory.

    samples, batch_size: trajectories in all, and per step of Lion. unique_samples: repeat so many of them
        (a multiple of batch_size), their trajectories kept. None: each is new.
    lr, betas, weight_decay: of Lion (arXiv 2302.06675).
    huber_weight: of 1000 * Huber(huber_delta) on the last point; 0 leaves the trajectory MSE alone.
    teacher_steps: of Euler; for VP the points of DDIM.
    short_tail: the last two rows use the immediately preceding output only; None: for N = 5 and 6.
    check_every: batches between looks at ``check_samples`` held-out ones, 20 looks by default. The solver
        with the smallest held-out error at the end point is kept. check_samples=0: the last is.
    memory: bytes of kept trajectories, see ``Teacher``. memory_budget: of a rollout's graphs, see ``unroll``; by
        default 512 MB, on a GPU half of its free memory.
    """

    samples: int = 50_000
    batch_size: int = 32
    unique_samples: int | None = None
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    huber_weight: float = 1000.0
    huber_delta: float = 1e-3
    teacher_steps: int = 100
    short_tail: bool | None = None
    check_every: int | None = None
    check_samples: int = 128
    memory: int = 2 << 30
    memory_budget: int | float | None = None
    name: ClassVar = "lion"

    def __post_init__(self) -> None:
        check_counts(self, "samples", "batch_size", "unique_samples", "teacher_steps", "check_every")
        check_counts(self, "check_samples", "memory", least=0)
        unique = self.unique_samples
        if unique is not None and unique < self.samples and unique % self.batch_size:
            raise ValueError(f"unique_samples={unique!r}: give a multiple of batch_size={self.batch_size}")

    def budget(self, steps: tuple[int, ...]) -> int | None:
        """The evaluations spent when the user sets no limit: ``samples`` settles them."""
        return None

    def run(
        self,
        draws: Draws,
        ledger: Ledger,
        steps: tuple[int, ...],
        *,
        initial: str | Solver | None = None,
        cache: Path | None = None,
        state: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The events of a search, see ``runs``."""
        update, schedule = _lion_update(), draws.schedule
        total = math.ceil(self.samples / self.batch_size)
        check_every = self.check_every or max(1, total // 20)
        points = {n: _Point(n, schedule, initial, self.short_tail) for n in steps}
        done = 0
        if state is not None:
            done = state["done"]
            for n, point in points.items():
                point.load(state["points"][n])

        def event(**values: Any) -> dict[str, Any]:
            return {
                "stage": "lion",
                "done": done,
                "total": total,
                "unit": "batches",
                "complete": done == total,
                "solvers": {n: point.best() for n, point in points.items()},
                "state": {"done": done, "points": {n: p.save() for n, p in points.items()}},
                **values,
            }

        described = {"kind": "paper", "steps": self.teacher_steps, "batch_size": self.batch_size}
        kept = None
        if self.unique_samples is not None and self.unique_samples < self.samples:
            kept = Store(draws, described, cache=cache, memory=self.memory)
        numbers = (self.unique_samples or self.samples) // self.batch_size if kept else total
        calls = len(paper_points(schedule, self.teacher_steps)) - 1
        held_out = _HeldOut(draws, ledger, self, cache)

        if state is None:
            yield event(state=None)
            if self.check_samples and ledger.affords(held_out.cost(steps)):
                yield event(held_out={n: point.offer(held_out.error(point)) for n, point in points.items()})
        while done < total:
            number = done % numbers
            new = kept is None or done < numbers
            if not ledger.affords(self.batch_size * (calls * new + 3 * sum(steps))):
                break
            batch = draws.batch("train", number, self.batch_size)
            trajectory = _paper_states(batch, self.teacher_steps, kept, number)
            if new:
                ledger.spend(self.batch_size * calls)
            losses = {}
            for n, point in points.items():
                loss = self._loss(point, batch, trajectory)
                gradients = torch.autograd.grad(loss, point.parameters)
                loss = loss.detach()
                draws.all_reduce(loss, *gradients)
                ledger.spend(self.batch_size * 3 * n)
                if not all(bool(v.isfinite().all()) for v in (loss, *gradients)):
                    raise FloatingPointError(
                        f"the loss of N = {n} is {float(loss):.4g} with gradients not all finite, at batch "
                        f"{done} of {total}; a smaller lr than {self.lr} may help"
                    )
                with torch.no_grad():
                    for value, gradient, moment in zip(point.parameters, gradients, point.moments, strict=True):
                        update(value, gradient, moment, self.lr, self.weight_decay, *self.betas)
                losses[n] = float(loss)
            done += 1
            looks = {}
            due = self.check_samples and (done % check_every == 0 or done == total)
            if due and ledger.affords(held_out.cost(steps)):
                looks = {"held_out": {n: point.offer(held_out.error(point)) for n, point in points.items()}}
            yield event(loss=losses, **looks)

    def _loss(self, point: _Point, batch: Samples, trajectory: Tensor) -> Tensor:
        """The loss of this process's rows; summed over processes it is that of the batch."""
        states, timesteps = _states(point, batch, graph_memory(self.memory_budget, batch.noise.device))
        last = trajectory.shape[1] - 1
        nearest = (timesteps[1:].detach() * last).round().long().clamp(0, last).to(trajectory.device)
        real = torch.promote_types(states.dtype, torch.float32)
        difference = (states - sent(trajectory[:, nearest], states.device)).to(real)
        share = batch.size * difference[0, 0].numel()
        loss = difference.square().sum() / share
        if self.huber_weight:
            end = difference[:, -1]
            huber = torch.nn.functional.huber_loss(end, torch.zeros_like(end), reduction="sum", delta=self.huber_delta)
            loss = loss + self.huber_weight * huber / share
        return loss


class _Point:
    """A point of the paper's space: raws (N,) and the free entries of the strict triangle, float64."""

    def __init__(self, num_steps: int, schedule: Schedule, initial: str | Solver | None, short_tail: bool | None):
        n = self.num_steps = num_steps
        self.schedule = schedule
        row, column = torch.tril_indices(n, n, -1)
        if n in (5, 6) if short_tail is None else short_tail:
            free = (row < n - 2) | (column == row - 1)
            row, column = row[free], column[free]
        self.places = row, column
        start = find_solver(initial or "euler", schedule, n)
        if start.num_steps != n:
            raise ValueError(f"initial={start.name!r} has {start.num_steps} steps; the search is for {n}")
        start.on(schedule)
        if start.free_rows or start.noise_coeffs is not None or start.network_timesteps is not None:
            raise ValueError(
                f"initial={start.name!r} has free rows, noise weights or network times, which the paper's space has "
                "not; search with method='gauss_newton'"
            )
        table = start.tensors()
        timesteps, coeffs = table["timesteps"], table["coeffs"]
        assert timesteps is not None and coeffs is not None
        left = torch.tril(coeffs, -1).index_put(self.places, torch.zeros(len(row), dtype=torch.float64))
        if bool(left.any()):
            raise ValueError(
                f"initial={start.name!r} uses more than the preceding output in its last two rows, which short_tail "
                "leaves out; pass Lion(short_tail=False)"
            )
        # Equal steps give raws of 1, the paper's start.
        self.raws = 1 + (timesteps.diff() * n).log()
        self.lower = coeffs[self.places]
        self.parameters = [self.raws.requires_grad_(), self.lower.requires_grad_()]
        self.moments = [torch.zeros_like(p) for p in self.parameters]
        self.best_error = math.inf
        self.chosen = [p.detach().clone() for p in self.parameters]

    def table(self) -> tuple[Tensor, Tensor]:
        """timesteps (N + 1,) and coeffs (N, N), differentiable."""
        return point_table(self.raws, self.lower, self.places)

    def offer(self, error: float) -> float:
        """Keeps the present values if their held-out error is the smallest so far."""
        if error < self.best_error:
            self.best_error, self.chosen = error, [p.detach().clone() for p in self.parameters]
        return error

    def best(self) -> Solver:
        """The table of the smallest held-out error, or the present one where none was ever measured."""
        values = self.parameters if math.isinf(self.best_error) else self.chosen
        raws, lower = (v.detach() for v in values)
        _, coeffs = point_table(raws, lower, self.places)
        rows = [row[:i] for i, row in enumerate(coeffs.tolist())]
        return Solver.from_timedeltas(torch.softmax(raws, 0).tolist(), rows, self.schedule)

    def save(self) -> dict[str, Any]:
        """The state that :meth:`load` continues from, bit for bit."""
        return {
            "raws": self.raws.detach().clone(),
            "lower": self.lower.detach().clone(),
            "moments": [moment.clone() for moment in self.moments],
            "chosen": list(self.chosen),
            "best_error": self.best_error,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Goes on from what :meth:`save` returned."""
        with torch.no_grad():
            self.raws.copy_(saved["raws"])
            self.lower.copy_(saved["lower"])
        self.moments = [moment.clone() for moment in saved["moments"]]
        self.chosen, self.best_error = list(saved["chosen"]), saved["best_error"]


class _HeldOut:
    """The end-point error on noise that is never trained on, against the same teacher."""

    def __init__(self, draws: Draws, ledger: Ledger, settings: Lion, cache: Path | None):
        self.draws, self.ledger, self.teacher_steps = draws, ledger, settings.teacher_steps
        samples, batch_size = settings.check_samples, settings.batch_size
        self.sizes = [min(batch_size, samples - k) for k in range(0, samples, batch_size)]
        self.calls = len(paper_points(draws.schedule, self.teacher_steps)) - 1
        described = {"kind": "paper end", "steps": self.teacher_steps, "sizes": self.sizes}
        self.store = Store(draws, described, cache=cache) if samples else None

    def cost(self, steps: tuple[int, ...]) -> int:
        """Evaluations of one look at solvers of these N."""
        new = "held-out teacher" not in self.ledger.counted
        return sum(self.sizes) * (sum(steps) + self.calls * new)

    @torch.no_grad()
    def error(self, point: _Point) -> float:
        """Root mean square over samples, elements and processes."""
        sums = torch.zeros(2, dtype=torch.float64)
        for k, size in enumerate(self.sizes):
            batch = self.draws.batch("held_out", k, size)
            target = _paper_states(batch, self.teacher_steps, self.store, k, last=True)
            states, _ = _states(point, batch, None)
            error = (states[:, -1] - sent(target[:, -1], states.device)).double().square()
            sums += torch.tensor([float(error.sum()), error.numel()], dtype=torch.float64)
        self.ledger.spend_once("held-out teacher", sum(self.sizes) * self.calls)
        self.ledger.spend(sum(self.sizes) * point.num_steps)
        self.draws.all_reduce(sums)
        return float((sums[0] / sums[1]).sqrt())


def point_table(raws: Tensor, lower: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """timesteps (N + 1,) and coeffs (N, N) from raws (N,) and the triangle's free entries; differentiable."""
    n = len(raws)
    timesteps = torch.cat([raws.new_zeros(1), torch.softmax(raws, 0).cumsum(0)])
    triangle = raws.new_zeros(n, n).index_put(places, lower)
    return timesteps, triangle + torch.diag(1 - triangle.sum(1))


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


def _states(point: _Point, batch: Samples, memory_budget: int | float | None) -> tuple[Tensor, Tensor]:
    """The rollout's states x_1..x_N, (B, N, *S), and the timesteps; differentiable in the point."""
    timesteps, coeffs = point.table()
    table = StepTable.build(point.schedule, timesteps, coeffs, guidance=batch.guidance)
    table, x = table.to(batch.noise.device, batch.noise.dtype), batch.noise
    return unroll(batch.denoiser(None), x, table.weights, table.times, memory_budget=memory_budget), timesteps


def _paper_states(batch: Samples, num: int, kept: Store | None, number: int, last: bool = False) -> Tensor:
    """The teacher's states of a batch, (B, L + 1, *S), or the last one only; where the store has them, if it does."""
    found = None if kept is None else kept.find(number, batch)
    if found is None:
        states = paper_trajectory(batch.predictor(None), batch.noise, batch.schedule, num)
        found = {"states": states[:, -1:] if last else states}
        if kept is not None:
            found = kept.keep(number, batch, found)
    return found["states"]


def _lion_update() -> Callable[..., None]:
    """Lion's update of one tensor, of the lion-pytorch package. Its Optimizer would import the compiler, seconds."""
    try:
        from lion_pytorch.lion_pytorch import update_fn
    except ImportError as error:
        raise ImportError("method='lion' needs lion-pytorch: pip install 'dss_fast[search]'") from error
    return update_fn
