"""A solver written in the noise and the clean predictions, where data of another size are one factor.

    x_i = e_i * eps + sum_{l<i} A_il * D_l          D_l = the network's x0 at x_l, as of the time it is told
                 [+ sum_{l<i} B_il * (guidance - 1) * (D_l - D_l of the unconditional branch)]

With data k times as large the noise level sigma/alpha at which a network does the same is k times as large: with A and
the excess of noise e_i - sigma_i at its new level kept, a solver of one model is one of the other, exactly on flows.
This is the resolution shift of SD3 and FLUX (arXiv 2403.03206, section 5.3.2) with k = shift.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .schedule import Schedule, inverse
from .tensors import SolverTensors

ZERO = 1e-12  # what float64 leaves of a weight of 0 comes to less


@dataclass(frozen=True, eq=False)
class X0Form:
    """N steps as N states, float64, differentiable.

    own: (N + 1,) noise levels sigma/alpha of the timesteps, falling, infinite where alpha is 0. told: (N,) those of the
    times that the network is told; the first call's is sigma^2/alpha, because its state is noise whatever it is told,
    and to first order what is predicted from noise is the mean and the covariance times alpha/sigma^2.
    weights: (N, N) lower triangle, row i holds A of x_{i+1} over alpha where it is seen; a row sums to 1 where a
    constant prediction is met. excess: (N,) by how much the noise in x_{i+1} exceeds sigma there, over alpha.
    guided_steps: as the solver's. shares: (N, N) like weights, of B, for a table that weighs the differences of the
    branches by a second triangle.
    """

    own: Tensor
    told: Tensor
    weights: Tensor
    excess: Tensor
    guided_steps: tuple[int, ...] | None = None
    shares: Tensor | None = None

    @classmethod
    def of(cls, schedule: Schedule, numbers: SolverTensors) -> X0Form:
        """The form of a table on its path."""
        n, u, told = len(numbers.coeffs), numbers.timesteps, numbers.told
        a, b = schedule.transition(u)
        r, s = _clean(schedule, u[:-1], told)
        weights = b[:, None] * torch.tril(numbers.coeffs)
        # x_{i+1} - a_i x_i - sum_j w_ij (-r_j / s_j) x_j = sum_j w_ij / s_j D_j + n_i eps
        left, right = torch.eye(n + 1, dtype=u.dtype), torch.zeros(n + 1, n + 1, dtype=u.dtype)
        left[1:, :-1] = left[1:, :-1] + weights * (r / s) - torch.diag(a)
        right[0, 0] = 1
        right[1:, 1:] = weights / s
        if numbers.noise_coeffs is not None:
            right[1:, 0] = b * numbers.noise_coeffs
        states = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)[1:]
        alpha, sigma = schedule.alpha_sigma(_seen(u, told))
        levels = torch.cat([_levels(schedule, told[:1], 2), _levels(schedule, told[1:])])
        own, weights = _levels(schedule, u), states[:, 1:] / alpha[:, None]
        form = cls(own, levels, weights, (states[:, 0] - sigma) / alpha, numbers.guided_steps)
        if numbers.guidance_coeffs is None:
            return form
        added = torch.cat([right.new_zeros(1, n), b[:, None] * torch.tril(numbers.guidance_coeffs) / s])
        parts = torch.linalg.solve_triangular(left, added, upper=False, unitriangular=True)[1:]
        return replace(form, shares=parts / alpha[:, None])

    def moved(self, k: float) -> X0Form:
        """The same solver for data k times as large."""
        return replace(self, own=k * self.own, told=k * self.told, excess=k * self.excess)

    def told_its_own(self) -> X0Form:
        """With the first call told the time of its state, wherever the path begins."""
        return replace(self, told=torch.cat([self.told.new_full((1,), torch.inf), self.told[1:]]))

    def tensors(self, schedule: Schedule) -> SolverTensors:
        """The table's numbers on a path; levels beyond its ends are brought back."""
        n = len(self.told)
        u, first, told = _at(schedule, self.own), _at(schedule, self.told[:1], 2), _at(schedule, self.told[1:])
        told = torch.cat([first, told])
        u = torch.cat([u.new_zeros(1), u[1:-1], u.new_ones(1)])
        a, b = schedule.transition(u)
        r, s = _clean(schedule, u[:-1], told)
        alpha, sigma = schedule.alpha_sigma(_seen(u, told))
        weights = alpha[:, None] * self.weights
        # x_{i+1} - sum_j A_ij r_j x_j = sum_j A_ij s_j y_j + e_i eps
        left, right = torch.eye(n + 1, dtype=u.dtype), torch.zeros(n + 1, n + 1, dtype=u.dtype)
        left[1:, :-1] = left[1:, :-1] - weights * r
        right[0, 0] = 1
        right[1:, 1:], right[1:, 0] = weights * s, sigma + alpha * self.excess
        states = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)
        steps = (states[1:] - a[:, None] * states[:-1]) / b[:, None]
        coeffs, noise = torch.tril(steps[:, 1:]), steps[:, 0]
        shared = None
        if self.shares is not None:  # what c leaves of the differences in the states is V's
            parts = torch.cat([u.new_zeros(1, n), alpha[:, None] * self.shares])
            left_over = (parts[1:] - a[:, None] * parts[:-1]) / b[:, None] + coeffs @ ((r / s)[:, None] * parts[:-1])
            shared = torch.tril(left_over * s)
        return SolverTensors(
            u,
            coeffs,
            noise if bool((noise.abs() > ZERO).any()) else None,
            told if bool(((told - u[:-1]).abs() > ZERO).any()) else None,
            self.guided_steps,
            shared,
        )


def _seen(u: Tensor, told: Tensor) -> Tensor:
    """(N,) where the states x_1..x_N are seen: at the times the network is told, and at the end."""
    return torch.cat([told[1:], u[-1:]])


def _clean(schedule: Schedule, u: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """(r, s) with D = r * x + s * y: the x0 that the network says at the time it is told, from what the history stores.

    y = p x + q m with p, q of the timestep; the same output m says P x + Q m at the time told, and x0 = R x + S (P x +
    Q m) there.
    """
    p, q = schedule.prediction(u)
    told_p, told_q = schedule.prediction(told)
    r, s = schedule.x0(told)
    return r + s * (told_p - told_q / q * p), s * told_q / q


def _levels(schedule: Schedule, u: Tensor, power: int = 1) -> Tensor:
    """sigma^power / alpha, infinite where alpha is 0."""
    alpha, sigma = schedule.alpha_sigma(u)
    return sigma**power / alpha


def _at(schedule: Schedule, levels: Tensor, power: int = 1) -> Tensor:
    """The u of noise levels, those beyond the path's ends at its ends."""

    def share(u: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(u)
        return alpha / (alpha + sigma**power)

    wanted = (1 / (1 + levels)).detach()
    low, high = share(wanted.new_zeros(1)), share(wanted.new_ones(1))
    u = inverse(share, wanted.clamp(low, high))
    return torch.where(wanted <= low, 0.0, torch.where(wanted >= high, 1.0, u))
