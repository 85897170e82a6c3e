"""Where a search starts: the best table there is already, found by successive halving on a few samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distance import squares
from ..draws import Draws
from ..methods import handmade
from ..rivals import handmade_tables
from ..schedule import Schedule
from ..solver import Solver
from ..table import StepTable
from ..unroll import Rollout
from .budget import Ledger
from .gauss_newton import ROBUST, robust
from .teacher import Teacher

LOST = 1e30  # the error of a table that diverges to NaN or Inf
THIRD = 3  # of the tables a third is kept, and run on three times the samples


def candidates(schedule: Schedule, num_steps: int, done: dict[int, Solver]) -> list[Solver]:
    """Every table that may be the best there is, likely ones first, none twice.

    Hand-made methods on all spacings, and on the timesteps that were found for the nearest N of ``done``.
    """
    found = []
    if done:
        near = min(done, key=lambda n: abs(n - num_steps))
        u = respaced(torch.tensor(done[near].timesteps, dtype=torch.float64), num_steps)
        methods = ("ab2", "ab3") if schedule.family == "flow" else ("dpmpp_2m", "ab2")
        like = [handmade(method, schedule=schedule, timesteps=u) for method in methods]
        found += [replace(solver, name=f"{solver.name} on the spacing found for N = {near}") for solver in like]
    found += handmade_tables(schedule, num_steps)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Start:
    """A table to start from. units: what each target's squares are counted in, the median of the table's there; 1 for
    a single target."""

    solver: Solver
    units: tuple[float, ...]


@torch.no_grad()
def ranked(draws: Draws, ledger: Ledger, teacher: Teacher, tables: Sequence[Solver], limit: int) -> list[Start]:
    """The best of the tables, best first; at most ``limit`` evaluations, 0 for a single table and target.

    Each is run on one sample, the better third of them on two more, and so on, as far as the first batch of each
    target reaches. With too small a limit for all, the first ones take part. Score: the robust mean of
    |x_N - teacher(1)|^2, of several targets the geometric mean of theirs.
    """
    left, count = list(tables), 0
    errors: dict[Solver, Tensor] = {}  # (targets, samples so far)
    n, targets, wanted = left[0].num_steps, len(draws.targets), draws.world
    most = min(teacher.sizes[:targets]) // draws.world * draws.world
    left = left[: max(1, limit // (2 * n * wanted * targets))]
    wanted = most if len(left) == 1 else wanted
    while count < wanted <= most:
        cost = n * (wanted - count) * targets * len(left)
        if (len(left) == 1 or cost > limit) and (targets == 1 or errors):
            break
        mine = slice(count // draws.world, wanted // draws.world)
        found = torch.zeros(len(left), targets, wanted - count, dtype=torch.float64)
        for t in range(targets):
            batch, trajectory = teacher[t]
            part, end = batch.rows(mine), trajectory.last[mine]
            for k, solver in enumerate(left):
                parts: list[Tensor] = []
                for one in teacher.room.over(slice(0, len(part))):
                    with one as rows:
                        some = part.rows(rows)
                        table = StepTable.of(
                            solver, guidance=some.guidance, dtype=some.noise.dtype, device=some.noise.device
                        )
                        try:
                            rollout = Rollout(some.denoiser(), some.noise, table.weights, table.times, wrt=())
                            error = squares(rollout.states[:, -1], end[rows])
                        except FloatingPointError:
                            error = torch.full((len(some),), LOST, dtype=torch.float64)
                        parts.append(error.nan_to_num(nan=LOST, posinf=LOST).clamp_max(LOST))
                found[k, t, draws.rank :: draws.world] = torch.cat(parts)
        draws.all_reduce(found)
        ledger.spend(cost)
        limit -= cost
        for solver, rows in zip(left, found, strict=True):
            errors[solver] = torch.cat([errors[solver], rows], 1) if solver in errors else rows
        scales = ROBUST * torch.stack([errors[solver] for solver in left], 1).flatten(1).median(1).values
        scores = {solver: _score(errors[solver], scales) for solver in left}
        left.sort(key=scores.__getitem__)
        count, wanted = wanted, min(THIRD * wanted, most)
        if count < wanted:
            left = left[: max(2, math.ceil(len(left) / THIRD))]
    if targets == 1:
        return [Start(solver, (1.0,)) for solver in left]
    return [Start(solver, tuple(errors[solver].median(1).values.clamp_min(1e-300).tolist())) for solver in left]


def of_different_spacings(starts: Sequence[Start]) -> list[Start]:
    """The first start on each spacing."""
    known: dict[tuple[float, ...], Start] = {}
    for start in starts:
        known.setdefault(start.solver.timesteps, start)
    return list(known.values())


def respaced(timesteps: Tensor, num_steps: int) -> Tensor:
    """The spacing of one table carried over to another number of steps: linear in the step's fraction. float64."""
    old = torch.linspace(0, 1, len(timesteps), dtype=torch.float64)
    new = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    k = torch.searchsorted(old, new, right=True).sub(1).clamp(0, len(old) - 2)
    fraction = (new - old[k]) / (old[k + 1] - old[k])
    u = timesteps[k] + fraction * (timesteps[k + 1] - timesteps[k])
    u[0], u[-1] = 0, 1
    return u


def _score(errors: Tensor, scales: Tensor) -> float:
    """The sum over targets of the logarithm of their robust mean; errors (targets, samples), scales (targets,)."""
    pairs = zip(errors, scales.clamp_min(1e-300).tolist(), strict=True)
    return sum(math.log(max(robust(values, scale), 1e-300)) for values, scale in pairs)
