"""What a search may move: the numbers theta behind a solver's table, and the table's derivative in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import Schedule
from ..solver import ROW_SUM_TOLERANCE, Solver
from ..table import Guidance, StepTable
from ..tensors import SolverTensors

SPACES = {
    "plain": (),
    "noise": ("noise",),
    "noise+start": ("noise", "start"),
    "noise+times": ("noise", "times"),
}
DENSE = 64  # steps of a table whose derivative is kept whole, 80 MB
MAX_LOG_INCREMENT, MAX_TIME = 1.0, 0.1  # of one step; Gauss-Newton is not trusted further
ROWS = 0.1  # by which rows of a table to start from may miss 1: those of release 0.2, told another first time, miss .05


@dataclass(frozen=True)
class Space:
    """theta (P,), float64, of a table with N steps; its parts in order:

        raws     N           timedeltas = softmax(raws)
        triangle N(N-1)/2    strict lower triangle, row by row             c_ii = 1 - the rest of its row
        noise    N           weights on the initial noise
        shares   row by row  weights on the differences of the steps that call both branches, all of a row but its last,
                             which is one less the rest; where ``guided_steps`` says which steps do
        times    1 or N      u at which the network is first called, or each time, less the timestep

    kind: a key of ``SPACES``: ``"plain"`` is the paper's. short_tail: the last two rows weigh the two newest
    predictions alone, as the paper has it for N = 5 and 6; the triangle is that much shorter.

    Where the network is told another time in the first call, a flow's rows sum to 1 after the first column is divided
    by sigma of that time: a constant x0 is then met exactly, and what :meth:`Solver.moved` makes of a table is in the
    space again. Searches in it leave .85 to 1.01 of the error of searches whose rows sum to 1 as they are.

    At u = 0 a network has only the mean to say, so a first
    call a little later (u = .05 on the MNIST flow) is most of what free times gain: at N = 5 and 24,000 evaluations
    .58 of the best hand-made error, .56 with all times free, .71 with none. Rows that need not sum to one, which an
    earlier release searched too, gain nothing beside the weights on the noise from N = 5 on, and their tables err up
    to ten times more on another network.
    """

    kind: str
    schedule: Schedule
    num_steps: int
    short_tail: bool = False
    guided_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in SPACES:
            raise ValueError(f"space={self.kind!r}: choose {', '.join(SPACES)}")

    def sizes(self) -> list[int]:
        """How many numbers each part of theta has."""
        n, free = self.num_steps, SPACES[self.kind]
        times = n if "times" in free else int("start" in free)
        shares = 0 if self.guided_steps is None else len(free_places(n, self.guided_steps)[0])
        return [n, len(self._places()[0]), n * ("noise" in free), shares, times]

    def theta(self, solver: Solver) -> Tensor:
        """The numbers behind a solver's table. Raises ValueError for a table that holds what the space has not."""
        table, n = solver.tensors(), self.num_steps
        _, _, noise, _, times = self.sizes()
        if solver.guided_steps != self.guided_steps:
            its, ours = ("all" if steps is None else steps for steps in (solver.guided_steps, self.guided_steps))
            raise ValueError(
                f"{solver.label} calls the unconditional branch at steps {its}, this search at {ours}; start from "
                f"another table, or search with as many calls: calls={solver.guided_calls}"
            )
        zero = torch.zeros(n, dtype=torch.float64)
        timesteps, coeffs, own, called = table.timesteps, table.coeffs, table.timesteps[:-1], table.told
        steps, shares = self.guided_steps, table.guidance_coeffs
        if times:
            gain = gain_of(self.schedule, called)
            coeffs = torch.cat([coeffs[:, :1] / gain, coeffs[:, 1:]], 1)
            shares = None if shares is None else torch.cat([shares[:, :1] / gain, shares[:, 1:]], 1)
        held = torch.tril(coeffs, -1).index_put(self._places(), zero[:1])
        for missing, word, remedy in (
            (solver.noise_coeffs is not None and not noise, "weights on the noise", "space='noise+times'"),
            (bool((called != own)[times:].any()), "network times of its own", "space='noise+times'"),
            (bool(held.any()), "more than two weights in its last two rows", "short_tail=False"),
        ):
            if missing:
                raise ValueError(f"{solver.label} has {word}, which this search does not move; set {remedy}")
        # Where a path begins with data in its noise, the first row of what was moved there is longer.
        kept = slice(int(float(self.schedule.alpha_sigma(zero[:1])[0]) > 0), None)
        if bool(((coeffs.sum(1) - 1).abs()[kept] > ROWS).any()):
            raise ValueError(f"{solver.label} has rows that do not sum to 1, which no search moves; start from another")
        if shares is not None and bool(((shares.sum(1) - 1).abs()[kept] > ROWS).any()):
            raise ValueError(
                f"{solver.label} weighs differences by rows that do not sum to 1, as moved tables do; start elsewhere"
            )
        weights = zero if table.noise_coeffs is None else table.noise_coeffs
        parts = [
            (timesteps.diff() * n).log(),
            coeffs[self._places()],
            weights if noise else zero[:0],
            zero[:0] if steps is None or shares is None else shares[free_places(n, steps)],
            (called - own)[:times],
        ]
        return torch.cat(parts)

    def holds(self, solver: Solver) -> bool:
        """Whether a table is in the space, or near enough to start from."""
        try:
            self.theta(solver)
        except ValueError:
            return False
        return True

    def numbers(self, theta: Tensor) -> SolverTensors:
        """The table's numbers, differentiable."""
        n = self.num_steps
        raws, triangle, noise, shares, times = theta.split(self.sizes())
        u = _timesteps(raws)
        rows = theta.new_zeros(n, n).index_put(self._places(), triangle)
        coeffs = rows + torch.diag(1 - rows.sum(1))
        called = _called(u[:-1], times) if len(times) else None
        shared = None if self.guided_steps is None else self._shared(shares, self.guided_steps)
        if called is not None:
            gain = gain_of(self.schedule, called)
            coeffs = torch.cat([coeffs[:, :1] * gain, coeffs[:, 1:]], 1)
            shared = None if shared is None else torch.cat([shared[:, :1] * gain, shared[:, 1:]], 1)
        return SolverTensors(u, coeffs, noise if len(noise) else None, called, self.guided_steps, shared)

    def noise(self, theta: Tensor) -> Tensor:
        """The weights on the noise, a view of theta; empty where the space has none."""
        parts: tuple[Tensor, ...] = theta.split(self.sizes())
        return parts[2]

    def table(self, theta: Tensor, guidance: Guidance | None = 1.0) -> StepTable:
        """The table that steps read, float64, differentiable; None: with a scale to be filled in."""
        return StepTable.build(self.schedule, self.numbers(theta), guidance)

    def solver(self, theta: Tensor) -> Solver:
        """The table as a Solver."""
        numbers = self.numbers(theta)
        free = bool(((numbers.coeffs.sum(1) - 1).abs() > ROW_SUM_TOLERANCE).any())
        return Solver(schedule=self.schedule, free_rows=free, **numbers.fields())

    def targets(self, theta: Tensor) -> Tensor:
        """(N,) the u whose teacher state x_1..x_N should meet: where the network sees it, and 1."""
        return torch.cat([self.numbers(theta).told[1:], theta.new_ones(1)])

    def jacobian(self, theta: Tensor) -> Tensor:
        """(N (4 + K) + N + N, P): d(weights, times, targets)/d theta, each flattened."""
        found: Tensor = torch.autograd.functional.jacobian(self._flat, theta)
        return found

    def back(self, theta: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        """How gradients (C, B, N (4 + K) + N) in weights and times, and (C, B, N - 1) in targets, if any, become
        gradients (C, B, P) in theta.

        By the Jacobian, or, of more than ``DENSE`` steps, where it takes gigabytes, row by row through the table.
        """
        if self.num_steps <= DENSE:
            jacobian = self.jacobian(theta)

            def product(flat: Tensor, moves: Tensor | None) -> Tensor:
                rows = flat @ jacobian[: flat.shape[2]]
                return rows if moves is None else rows + moves @ jacobian[flat.shape[2] : -1]

            return product
        with torch.enable_grad():
            leaf = theta.detach().clone().requires_grad_()
            numbers = self._flat(leaf)

        def pulled(flat: Tensor, moves: Tensor | None) -> Tensor:
            rows = flat.new_zeros(*flat.shape[:2], len(numbers))
            rows[..., : flat.shape[2]] = flat
            if moves is not None:
                rows[..., flat.shape[2] : -1] = moves
            found = [torch.autograd.grad(numbers, leaf, row, retain_graph=True)[0] for row in rows.flatten(0, 1)]
            stacked: Tensor = torch.stack(found).unflatten(0, rows.shape[:2])
            return stacked

        return pulled

    def _flat(self, theta: Tensor) -> Tensor:
        table = self.table(theta, None)
        return torch.cat([table.weights.flatten(), table.times, self.targets(theta)])

    def move(self, theta: Tensor, step: Tensor) -> Tensor:
        """theta + step, the step shortened to what is trusted, times kept in [0, 1]."""
        raws, _, _, _, times = step.split(self.sizes())
        longest = max(1.0, float(raws.abs().max()) / MAX_LOG_INCREMENT)
        longest = max(longest, float(times.abs().max()) / MAX_TIME) if len(times) else longest
        raws, triangle, noise, shares, times = (theta + step / longest).split(self.sizes())
        if len(times):
            own = _timesteps(raws)[: len(times)]
            times = (own + times).clamp(0, 1) - own
        return torch.cat([raws, triangle, noise, shares, times])

    def _shared(self, shares: Tensor, steps: tuple[int, ...]) -> Tensor:
        """V (N, N) of its free numbers."""
        n = self.num_steps
        rows = shares.new_zeros(n, n).index_put(free_places(n, steps), shares)
        last = torch.zeros(n, n, dtype=torch.float64)
        last[range(n), [max(j for j in steps if j <= i) for i in range(n)]] = 1
        return rows + last * (1 - rows.sum(1))[:, None]

    def _places(self) -> tuple[Tensor, Tensor]:
        """The rows and columns of the triangle's numbers."""
        rows, columns = torch.tril_indices(self.num_steps, self.num_steps, -1)
        free = (rows < self.num_steps - 2) | (columns == rows - 1) | (not self.short_tail)
        return rows[free], columns[free]


def gain_of(schedule: Schedule, told: Tensor) -> Tensor:
    """(1,) what the first prediction is multiplied by, where the network is told another time than u = 0: as a
    velocity from u = 0 it is sigma of that time."""
    _, s = schedule.x0(torch.cat([told.new_zeros(1), told[:1]]))
    return s[1:] / s[:1]


def _timesteps(raws: Tensor) -> Tensor:
    """The N + 1 timesteps."""
    inner = torch.softmax(raws, 0).cumsum(0)[:-1]
    return torch.cat([raws.new_zeros(1), inner, raws.new_ones(1)])


def _called(own: Tensor, times: Tensor) -> Tensor:
    """(N,) the u of each call: the first ones beside their timesteps, the others at them."""
    moved = (own[: len(times)] + times).clamp(0, 1)
    return torch.cat([moved, own[len(times) :]])


def free_places(num_steps: int, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of V's free numbers: of each row all but that of the last step known, which is one less the
    rest."""
    places = [(i, j) for i in range(num_steps) for j in [s for s in steps if s <= i][:-1]]
    found = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
    return found[:, 0], found[:, 1]
