"""What a search may move: the numbers theta behind a solver's table, and the table's derivative in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import Schedule, step_weights
from ..solver import Solver

SPACES = {
    "plain": (),
    "rows": ("rows",),
    "rows+times": ("rows", "times"),
    "rows+noise": ("rows", "noise"),
    "full": ("rows", "noise", "times"),
}
MAX_LOG_INCREMENT, MAX_TIME = 1.0, 0.1  # of one step; Gauss-Newton is not trusted further


@dataclass(frozen=True)
class Space:
    """theta (P,), float64, of a table with N steps; its parts in order:

        raws     N           timedeltas = softmax(raws)                    where timesteps move
        triangle N(N-1)/2    strict lower triangle, row by row             c_ii = 1 - the rest of its row
                 N(N+1)/2    with the diagonal                             when rows are free
        noise    N           weights on the initial noise
        times    N           u at which the network is called, less the timestep where timesteps move

    kind: a key of ``SPACES``: ``"plain"`` is the paper's. With free rows and network times of their own, the
    solver's timesteps add nothing to what a table can do (its increments multiply free rows). In a flow they
    then stay where they were. In VP they move all the same: a_i and b_i bend with them, and the search gets
    further along a path that bends alike (N = 10 on MNIST: RMSE .0130 instead of .0158).
    timesteps: (N + 1,) those that stay.
    """

    kind: str
    family: str
    timesteps: tuple[float, ...]

    def __post_init__(self):
        if self.kind not in SPACES:
            raise ValueError(f"space={self.kind!r}: choose {', '.join(SPACES)}")

    @property
    def num_steps(self) -> int:
        return len(self.timesteps) - 1

    @property
    def free_rows(self) -> bool:
        return "rows" in SPACES[self.kind]

    @property
    def moves_timesteps(self) -> bool:
        return self.family == "vp" or not {"rows", "times"} <= set(SPACES[self.kind])

    def sizes(self) -> list[int]:
        """How many numbers each part of theta has."""
        n, free = self.num_steps, SPACES[self.kind]
        triangle = n * (n + 1) // 2 if "rows" in free else n * (n - 1) // 2
        return [n if self.moves_timesteps else 0, triangle, n * ("noise" in free), n * ("times" in free)]

    def theta(self, solver: Solver) -> Tensor:
        """The numbers behind a solver's table; what the space does not have is left out."""
        table, n = solver.tensors(), self.num_steps
        raws, _, noise, times = self.sizes()
        zero = torch.zeros(n, dtype=torch.float64)
        own = table["timesteps"][:-1]
        called = own if table["network_timesteps"] is None else table["network_timesteps"]
        rows = table["coeffs"][self._places()]
        parts = [
            (table["timesteps"].diff() * n).log() if raws else zero[:0],
            rows,
            (zero if table["noise_coeffs"] is None else table["noise_coeffs"]) if noise else zero[:0],
            (called - own if raws else called) if times else zero[:0],
        ]
        return torch.cat(parts)

    def table(self, theta: Tensor) -> dict[str, Tensor | None]:
        """timesteps, coeffs, noise_coeffs, network_timesteps: arguments of ``step_weights``, differentiable."""
        n = self.num_steps
        raws, triangle, noise, times = theta.split(self.sizes())
        u, own = self._timesteps(raws)
        rows = theta.new_zeros(n, n).index_put(self._places(), triangle)
        if not self.free_rows:
            rows = rows + torch.diag(1 - rows.sum(1))
        return {
            "timesteps": u,
            "coeffs": rows,
            "noise_coeffs": noise if len(noise) else None,
            "network_timesteps": (own + times).clamp(0, 1) if len(times) else None,
        }

    def solver(self, theta: Tensor, **fields) -> Solver:
        """The table as a Solver."""
        table = {k: None if v is None else v.tolist() for k, v in self.table(theta).items()}
        return Solver(family=self.family, free_rows=self.free_rows, **table, **fields)

    def targets(self, theta: Tensor) -> Tensor:
        """(N,) the u whose teacher state x_1..x_N should meet: where the network sees it, and 1."""
        table = self.table(theta)
        seen = table["network_timesteps"]
        seen = table["timesteps"][:-1] if seen is None else seen
        return torch.cat([seen[1:], theta.new_ones(1)])

    def jacobian(self, theta: Tensor, schedule: Schedule) -> Tensor:
        """(N (4 + K) + N + N, P): d(weights, times, targets)/d theta, each flattened."""

        def flat(theta: Tensor) -> Tensor:
            weights, times = step_weights(schedule, **self.table(theta))
            return torch.cat([weights.flatten(), times, self.targets(theta)])

        return torch.autograd.functional.jacobian(flat, theta)

    def move(self, theta: Tensor, step: Tensor) -> Tensor:
        """theta + step, the step shortened to what is trusted, times kept in [0, 1]."""
        raws, _, _, times = step.split(self.sizes())
        longest = max(
            [1.0]
            + [float(raws.abs().max()) / MAX_LOG_INCREMENT for _ in range(len(raws) > 0)]
            + [float(times.abs().max()) / MAX_TIME for _ in range(len(times) > 0)]
        )
        raws, triangle, noise, times = (theta + step / longest).split(self.sizes())
        if len(times):
            _, own = self._timesteps(raws)
            times = (own + times).clamp(0, 1) - own
        return torch.cat([raws, triangle, noise, times])

    def _timesteps(self, raws: Tensor) -> tuple[Tensor, Tensor | float]:
        """The N + 1 timesteps, and what times count from: the timestep of each call, or 0 where those stay."""
        if not len(raws):
            return torch.tensor(self.timesteps, dtype=raws.dtype), 0.0
        inner = torch.softmax(raws, 0).cumsum(0)[:-1]
        u = torch.cat([raws.new_zeros(1), inner, raws.new_ones(1)])
        return u, u[:-1]

    def _places(self) -> tuple[Tensor, Tensor]:
        rows, columns = torch.tril_indices(self.num_steps, self.num_steps, 0 if self.free_rows else -1)
        return rows, columns


def respaced(timesteps: Tensor, num_steps: int) -> Tensor:
    """The spacing of one table carried over to another number of steps: linear in the step's fraction. float64."""
    old = torch.linspace(0, 1, len(timesteps), dtype=torch.float64)
    new = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    k = torch.searchsorted(old, new, right=True).sub(1).clamp(0, len(old) - 2)
    fraction = (new - old[k]) / (old[k + 1] - old[k])
    u = timesteps[k] + fraction * (timesteps[k + 1] - timesteps[k])
    u[0], u[-1] = 0, 1
    return u
