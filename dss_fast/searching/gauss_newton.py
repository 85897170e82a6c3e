"""The algebra of the search: robust least squares from two rows of the Jacobian a sample, and the damped step.

For sample b with residual e_b and J_b = d x_N / d theta, a backward with cotangent e_b gives J_b' e_b: its sum is
the gradient, and divided by |e_b| it is the row of J_b along the residual. A second backward, for half of
the samples, with a random sign vector orthogonal to e_b gives a row whose square averages to the rest of
J_b' J_b. So two rows of P numbers per sample stand for the whole Jacobian of D x P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MEMORY = 0.5  # of J'J from one round to the next
NO_NUMBER = "the gradient through the model is NaN or Inf, though its outputs are finite"
ROBUST = 10.0  # medians of |r|^2 at which a sample counts half


@dataclass(frozen=True, eq=False)
class Charge:
    """What a table's numbers add to the loss, theta' M theta - 2 b' theta: matrix M (P, P), pull b (P,)."""

    matrix: Tensor
    pull: Tensor

    def of(self, theta: Tensor) -> float:
        """The charge of theta (P,)."""
        return float(theta @ self.matrix @ theta - 2 * self.pull @ theta)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The loss around a table, g'd + d'Hd / 2 for a step d: gradient g (P,) and matrix H (P, P), J'J in the mean over
    samples, float64; mass: how many samples H rests on."""

    gradient: Tensor
    matrix: Tensor
    mass: float

    def remembering(self, before: Quadratic | None) -> Quadratic:
        """H averaged with what is left of the one before, by mass."""
        if before is None:
            return self
        kept = MEMORY * before.mass
        matrix = (kept * before.matrix).add_(self.mass * self.matrix).div_(kept + self.mass)
        return replace(self, matrix=matrix, mass=kept + self.mass)

    def with_charge(self, charge: Charge, theta: Tensor, basis: Tensor | None = None) -> Quadratic:
        """Plus the charge at theta + d, or at theta + basis d, in this one and so in every one that remembers it."""
        pull, matrix = 2 * (charge.matrix @ theta - charge.pull), 2 * charge.matrix
        if basis is not None:
            pull, matrix = basis.mT @ pull, basis.mT @ matrix @ basis
        return replace(self, gradient=self.gradient + pull, matrix=self.matrix + matrix)

    def step(self, damping: float) -> Tensor:
        """Levenberg-Marquardt's step, damping scaled by H's diagonal."""
        scale = self.matrix.diagonal().clamp_min(1e-12 * float(self.matrix.diagonal().max())).sqrt()
        system = (self.matrix / scale[:, None]).div_(scale)
        system.diagonal().add_(damping)
        step: Tensor = torch.linalg.solve(system, self.gradient / scale) / scale
        return -step

    def gain(self, step: Tensor) -> float:
        """How much smaller the loss should become by a step."""
        return -float(self.gradient @ step + 0.5 * step @ self.matrix @ step)


class Sums:
    """What becomes a Quadratic: sums over the samples of this process."""

    def __init__(self, parameters: int):
        self.gradient = torch.zeros(parameters, dtype=torch.float64)
        self.along, self.beside = torch.zeros(2, parameters, parameters, dtype=torch.float64)
        self.size = self.sketched = 0

    def add(self, rows: Tensor, values: Tensor, weights: Tensor, scale: float, size: int) -> None:
        """Rows (C, B, P) of the scaled Jacobian: along the residual, and, C = 2, along signs beside it.

        values, weights: (B, 1) |r|^2 in the mean over elements, and the robust weight. scale: of the rows,
        R^-1/2. size: samples over all processes.
        """
        self.size += size
        self.gradient += 2 * scale * (weights * rows[0]).sum(0)
        self.along += 2 * scale**2 * rows[0].mT @ (weights / values.clamp_min(1e-300) * rows[0])
        if len(rows) > 1:
            self.sketched += size
            self.beside += 2 * rows[1].mT @ (weights * rows[1])

    def add_whole(self, gradients: Tensor, matrices: Tensor, weights: Tensor, size: int) -> None:
        """J'e (B, P) and J'J (B, P, P) of samples, in the mean over elements, where all of J is known."""
        self.size += size
        self.gradient += 2 * (weights * gradients).sum(0)
        self.along += 2 * (weights[..., None] * matrices).sum(0)

    def quadratic(self, all_reduce: Callable[..., None]) -> Quadratic:
        """The mean over the samples of all processes; the sums are used up."""
        found = self.gradient, self.along, self.beside
        all_reduce(*found)
        if not all(bool(part.isfinite().all()) for part in found):
            raise FloatingPointError(NO_NUMBER)
        # In place: with 200 steps a matrix takes 3.3 GB.
        return Quadratic(
            self.gradient / self.size,
            self.along.div_(self.size).add_(self.beside.div_(max(1, self.sketched))),
            self.size,
        )


def robust(values: Tensor, scale: float) -> float:
    """mean of c log(1 + z / c) over squares z, c = scale."""
    return float(values.div(scale).log1p().mean()) * scale


def signs_beside(residual: Tensor, signs: Tensor) -> Tensor:
    """Signs (B, R) made orthogonal to the residual of each sample."""
    unit = residual / residual.norm(dim=1, keepdim=True).clamp_min(1e-30)
    along: Tensor = (signs * unit).sum(1, keepdim=True) * unit
    return signs - along
