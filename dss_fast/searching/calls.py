"""Calls: at which steps a search calls the unconditional branch, and what forecasts it at the others.

A table with V in place of c for the differences moves the end point, to first order, by

    sum_ij b_i (V_ij - c_ij) <g_{i+1}, e_j>          e_j = q_j (guidance - 1) (m_cond - m_uncond)

with g the adjoints of the states at the table where V = c. They come from one rollout with both branches at all steps,
pulled back along random signs: the weights' gradients in the columns of the e_j. So one quadratic form says of every
choice of steps what the best V leaves, and of that V what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..draws import mix
from ..solver import Solver
from ..table import HISTORY, StepTable
from ..unroll import Rollout
from .budget import Ledger
from .space import free_places, gain_of
from .starts import Start, parts_of
from .teacher import Teacher

SKETCHES = 2  # random signs a sample
SKETCHED = 24  # samples
BEAM = 8  # choices kept while steps are taken away one by one
# Of the best choices by the form so many run on so many samples of each target, the better ones on more: the first by
# the form is often not the one that ends best, and a race of a few rounds sees too few samples.
CHOICES, JUDGES = 4, 24
RIDGE = 0.1  # of the form's mean diagonal, towards the linear forecast: of few samples the form knows a part alone
MOST = 40  # steps of which some are chosen: that takes a minute of one thread then, and 3 s for 26
STEPS = 0.66  # of the calls, of the candidate beside both branches at all steps: 7 of 10 and 11, 8 of 12, 9 of 14


def splits(calls: int, num_steps: Sequence[int] | None = None) -> dict[int, int]:
    """N -> how many steps call both branches: those given, or of two candidates, one with both at all steps. Raises
    ValueError where there is none."""
    if num_steps is None:
        found = {n: min(n, calls - n) for n in (calls // 2, round(STEPS * calls))}
    else:
        found = {n: calls - n for n in num_steps}
    for n, guided in found.items():
        if not 1 <= guided <= n:
            raise ValueError(
                f"calls={calls!r}: {n} steps take from {n + 1} calls, with both branches at the first alone, to {2 * n}"
            )
    return found


@dataclass(frozen=True, eq=False)
class Worth:
    """What differences are worth at the end point of a table with both branches at all steps.

    form: (N, N, N, N), the mean over samples and signs of the products of b_i <g_{i+1}, e_j> and b_k <g_{k+1}, e_l>.
    """

    solver: Solver
    form: Tensor

    def best(self, guided: int, count: int) -> list[Solver]:
        """The ``count`` best tables with both branches at so many steps, best first: steps taken away one by one."""
        n = self.solver.num_steps
        level: list[tuple[int, ...]] = [tuple(range(n))]
        for _ in range(n - guided):
            fewer = {tuple(j for j in steps if j != gone) for steps in level for gone in steps if gone}
            level = sorted(sorted(fewer), key=lambda steps: self._fitted(steps)[0])[:BEAM]
        return [self._table(steps) for steps in level[:count]]

    def _table(self, steps: tuple[int, ...]) -> Solver:
        rows = self._fitted(steps)[1].tolist()
        return replace(self.solver, guided_steps=steps, guidance_coeffs=tuple(map(tuple, rows)))

    def _fitted(self, steps: tuple[int, ...]) -> tuple[float, Tensor]:
        """What the end point loses with both branches at these steps, and the V (N, N) that loses least."""
        n, coeffs = self.solver.num_steps, torch.tensor(self.solver.coeffs, dtype=torch.float64)
        start = forecast(self.solver, steps)
        rows, columns = free_places(n, steps)
        last = torch.tensor([max(j for j in steps if j <= i) for i in range(n)])[rows]
        if not len(rows):
            return self._loss(start - coeffs), start
        # V = start + sum_k t_k (one at its place, less one at its row's last), which keeps the rows' sums
        factor, form = _factor(self.solver), self.form.reshape(n * n, n * n)
        there, back, more, less = rows * n + columns, rows * n + last, factor[columns], factor[last]
        moved = more[:, None] * form[there] - less[:, None] * form[back]
        matrix, gradient = moved[:, there] * more - moved[:, back] * less, moved @ (start - coeffs).flatten()
        ridge = RIDGE * matrix.diagonal().mean() + 1e-300
        t = -torch.linalg.solve(matrix + ridge * torch.eye(len(rows), dtype=torch.float64), gradient)
        fitted = start.flatten().index_add(0, there, t * more).index_add_(0, back, -t * less).view(n, n)
        return self._loss(fitted - coeffs), fitted

    def _loss(self, change: Tensor) -> float:
        return float(torch.einsum("ij,ijkl,kl", change, self.form, change))


def worth(start: Start, ledger: Ledger, teacher: Teacher, limit: float) -> Worth:
    """The worth of differences along a table, from its rollouts on a few training samples of each target, as many as
    ``limit`` evaluations pay for; where they pay for none, the first steps call both branches."""
    draws, solver, n = teacher.draws, start.solver, start.solver.num_steps
    targets = len(draws.targets)
    full = replace(solver, guided_steps=tuple(range(n)), guidance_coeffs=solver.coeffs)
    steps, form = b_of(solver), torch.zeros(n * n, n * n, dtype=torch.float64)
    sizes = [teacher.sizes[t::targets] for t in range(targets)]
    seen = int(min(SKETCHED // targets or 1, *map(sum, sizes), limit // _cost(n, targets)))
    for t, unit in enumerate(start.units):
        for number, mine, _ in parts_of(sizes[t], slice(0, seen), draws):
            k = t + targets * number
            batch, _ = teacher[k]
            generator = torch.Generator().manual_seed(mix(draws.seed, "calls", n, k))
            signs = torch.randint(0, 2, (SKETCHES, batch.size, *batch.noise.shape[1:]), generator=generator) * 2 - 1
            signs = signs[:, draws.rank :: draws.world].to(batch.noise) * batch.noise[0].numel() ** -0.5
            for part in teacher.room.over(mine):
                with part as rows:
                    some = batch.rows(rows)
                    table = StepTable.of(full, guidance=some.guidance, dtype=some.noise.dtype, device=some.noise.device)
                    rollout = Rollout(some.denoiser(), some.noise, table.weights, table.times, wrt=("weights",))
                    pulled = rollout.pull(signs[:, rows]).weights
                    assert pulled is not None
                    products = (pulled[..., HISTORY + n + 1 :].double().cpu() * steps[:, None]).flatten(2).flatten(0, 1)
                    form += products.mT @ products / unit
    if seen > 0:
        ledger.spend(_cost(n, seen * targets))
        draws.all_reduce(form)
    return Worth(solver, form.reshape(n, n, n, n) / max(1, seen * targets * SKETCHES))


def b_of(solver: Solver) -> Tensor:
    """(N,) what a step's row is multiplied with."""
    b: Tensor = solver.schedule.transition(torch.tensor(solver.timesteps, dtype=torch.float64))[1]
    return b


def cost_of_worth(num_steps: int, samples: int, targets: int) -> int:
    """Evaluations that :func:`worth` and its best choices take of so many samples."""
    return _cost(num_steps, min(samples, SKETCHED)) + cost_of_choice(num_steps, samples // targets, targets)


def cost_of_choice(num_steps: int, samples: int, targets: int) -> int:
    """Evaluations in which one of the best choices is found, where each target has so many samples."""
    return 2 * CHOICES * JUDGES * num_steps * targets if samples >= JUDGES else 0


def _cost(num_steps: int, samples: int) -> int:
    return num_steps * samples * (1 + 2 * SKETCHES)


def forecast(solver: Solver, steps: Sequence[int]) -> Tensor:
    """V (N, N), float64, where the differences of the other steps are continued linearly in u from the last two known.

    V = c M, with M_kj what step k's difference takes from step j's. Where c weighs the first prediction by a factor,
    as where its call is told another time, so does V.
    """
    n, u = solver.num_steps, solver.timesteps
    coeffs = torch.tensor(solver.coeffs, dtype=torch.float64)
    factor = _factor(solver)
    taken = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        known = [j for j in steps if j <= k]
        taken[k, known[-1]] = 1
        if known[-1] < k and len(known) > 1:
            before, last = known[-2:]
            slope = (u[k] - u[last]) / (u[last] - u[before])
            taken[k, last] += slope
            taken[k, before] -= slope
    return coeffs / factor @ taken * factor


def _factor(solver: Solver) -> Tensor:
    """(N,) what c's columns are multiplied by over rows that sum to one: other than 1 for the first alone."""
    factor = torch.ones(solver.num_steps, dtype=torch.float64)
    factor[:1] = gain_of(solver.schedule, solver.tensors().told)
    return factor
