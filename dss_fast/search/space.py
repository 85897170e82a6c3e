"""What a search may move: the numbers theta behind a solver's table, and the table's derivative in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..schedule import Schedule
from ..solver import Solver
from ..table import Guidance, StepTable

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
    schedule: the target's. timesteps: (N + 1,) those that stay.
    """

    kind: str
    schedule: Schedule
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
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
        return self.schedule.family == "vp" or not {"rows", "times"} <= set(SPACES[self.kind])

    def sizes(self) -> list[int]:
        """How many numbers each part of theta has."""
        n, free = self.num_steps, SPACES[self.kind]
        triangle = n * (n + 1) // 2 if "rows" in free else n * (n - 1) // 2
        return [n if self.moves_timesteps else 0, triangle, n * ("noise" in free), n * ("times" in free)]

    def theta(self, solver: Solver) -> Tensor:
        """The numbers behind a solver's table. Raises ValueError for a table that holds what the space has not."""
        table, n = solver.tensors(), self.num_steps
        raws, _, noise, times = self.sizes()
        for missing, word in (
            (solver.free_rows and not self.free_rows, "free rows"),
            (solver.noise_coeffs is not None and not noise, "weights on the noise"),
            (solver.network_timesteps is not None and not times, "network times of its own"),
        ):
            if missing:
                raise ValueError(f"{solver.label} has {word}, which space {self.kind!r} has not; take space='full'")
        zero = torch.zeros(n, dtype=torch.float64)
        timesteps, coeffs = table["timesteps"], table["coeffs"]
        assert timesteps is not None and coeffs is not None
        own = timesteps[:-1]
        called = own if table["network_timesteps"] is None else table["network_timesteps"]
        weights = zero if table["noise_coeffs"] is None else table["noise_coeffs"]
        parts = [
            (timesteps.diff() * n).log() if raws else zero[:0],
            coeffs[self._places()],
            weights if noise else zero[:0],
            (called - own if raws else called) if times else zero[:0],
        ]
        return torch.cat(parts)

    def numbers(self, theta: Tensor) -> dict[str, Any]:
        """timesteps, coeffs, noise_coeffs, network_timesteps: what ``StepTable.build`` takes, differentiable."""
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

    def table(self, theta: Tensor, guidance: Guidance = 1.0) -> StepTable:
        """The table that steps read, float64, differentiable."""
        return StepTable.build(self.schedule, **self.numbers(theta), guidance=guidance)

    def solver(self, theta: Tensor) -> Solver:
        """The table as a Solver."""
        numbers: dict[str, Any] = {k: v if v is None else v.tolist() for k, v in self.numbers(theta).items()}
        return Solver(schedule=self.schedule, free_rows=self.free_rows, **numbers)

    def targets(self, theta: Tensor) -> Tensor:
        """(N,) the u whose teacher state x_1..x_N should meet: where the network sees it, and 1."""
        numbers = self.numbers(theta)
        seen = numbers["network_timesteps"]
        seen = numbers["timesteps"][:-1] if seen is None else seen
        return torch.cat([seen[1:], theta.new_ones(1)])

    def jacobian(self, theta: Tensor) -> Tensor:
        """(N (4 + K) + N + N, P): d(weights, times, targets)/d theta, each flattened."""

        def flat(theta: Tensor) -> Tensor:
            table = self.table(theta)
            return torch.cat([table.weights.flatten(), table.times, self.targets(theta)])

        return torch.autograd.functional.jacobian(flat, theta)

    def move(self, theta: Tensor, step: Tensor) -> Tensor:
        """theta + step, the step shortened to what is trusted, times kept in [0, 1]."""
        raws, _, _, times = step.split(self.sizes())
        farthest = [float(part.abs().max()) if len(part) else 0.0 for part in (raws, times)]
        longest = max(1.0, farthest[0] / MAX_LOG_INCREMENT, farthest[1] / MAX_TIME)
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
