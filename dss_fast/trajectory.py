"""Fine trajectories of a model: high order, and dense, so that the state at any u is known.

With scale and tau the schedule's clock and z = x / scale, the sampling ODE is dz/dtau = y, y being what a history
stores (velocity, x0). The grid is uniform in a variable s in which
trajectories are smooth. Between grid points y is a polynomial in s whose weights are integrated over tau:
Adams-Bashforth of order 3 predicts, the model is called once there, and Adams-Moulton of order 4 with that
call corrects, both of lower order in the first steps, where y hardly moves: measured order 4 overall. With a
predictor of order 4 and Runge-Kutta's start, less stable, 48 calls on the MNIST flow leave an RMSE of 0.011,
with this one 0.0006.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .schedule import Schedule, inverse

EVALUATIONS = 64
LOG_SHARE, SOFTENING = 0.5, 0.02  # they shape the grid variable s, see DenseGrid
LATEST = 500.0  # VP's clock alpha / sigma is infinite at sigma = 0; one step from here goes there


@dataclass(frozen=True, eq=False)
class DenseGrid:
    """M + 1 points u where a dense trajectory is known, uniform in s,

        s(u) = (1 - share) * u / end + share * (L(u) - L(0)) / (L(end) - L(0))
        L(u) = log((alpha + soft) / (sigma + soft))

    half linear in time and half in a log-SNR that stays finite where alpha or sigma vanish. ``end`` is
    where the network's time stops (0.998 for VP's t = 0.999 - u with t >= 0.001, 1 for a flow), or before, where the
    clock is ``LATEST``.

    jump: whether a last step from there to u = 1 remains (to clean data, where sigma is 0).
    open: whether the network is called at ``end``: a flow's may be undefined at sigma = 0.

    points: (M + 1,) u. slope: (M + 1, 2), dx/ds = slope_0 x + slope_1 y. predict, correct: (M, 4) weights on
    the four newest y, oldest first, of the two Adams formulas; ratio: (M,) the factor of x.
    """

    schedule: Schedule
    intervals: int
    share: float = LOG_SHARE
    end: float = field(init=False)
    points: Tensor = field(init=False, repr=False)
    slope: Tensor = field(init=False, repr=False)
    predict: Tensor = field(init=False, repr=False)
    correct: Tensor = field(init=False, repr=False)
    ratio: Tensor = field(init=False, repr=False)
    jump: bool = field(init=False)
    open: bool = field(init=False)

    def __post_init__(self) -> None:
        set_ = partial(object.__setattr__, self)
        schedule, m = self.schedule, self.intervals
        set_("end", _last_u(schedule))
        _, (end, final) = schedule.alpha_sigma(torch.tensor([self.end, 1.0], dtype=torch.float64))
        set_("jump", self.end < 1 and bool((end - final).abs() > 1e-9))
        set_("open", bool(end > 0))
        s = torch.linspace(0, 1, m + 1, dtype=torch.float64)
        u = self.inverse(s)
        set_("points", u)
        set_("slope", self._slope(u))
        # Integration by parts leaves values of tau only: int l tau' = [l tau] - int l' tau.
        nodes, node_weights = _gauss_legendre(8)
        inner = s[:-1, None] + nodes / m
        (scale, tau), (_, tau_inner) = schedule.clock(u), schedule.clock(self.inverse(inner.flatten()))
        tau_inner = tau_inner.reshape(inner.shape)
        # The predictor's newest y stands at the start of its interval, 0, and the corrector's at the end, 1.
        for name, newest, highest in (("predict", 0, 3), ("correct", 1, 4)):
            rows = torch.zeros(m, 4, dtype=torch.float64)
            for order in range(1, highest + 1):
                oldest = newest + 1 - order
                value, slope = _lagrange(oldest, order)
                at_end = value(torch.ones(1, dtype=torch.float64)) * tau[1:, None]
                at_start = value(torch.zeros(1, dtype=torch.float64)) * tau[:-1, None]
                between = torch.einsum("mq,qj->mj", tau_inner * node_weights, slope(nodes))
                reached = max(0, -oldest)  # earlier intervals have no y so far back, and keep a lower order
                rows[reached:] = 0
                rows[reached:, 4 - order :] = (at_end - at_start - between)[reached:]
            set_(name, rows * scale[1:, None])
        set_("ratio", schedule.transition(u)[0])

    def s(self, u: Tensor) -> Tensor:
        """The grid variable at u, 0 to 1; differentiable."""
        ends = self._log_snr(torch.tensor([0.0, self.end], dtype=torch.float64, device=u.device))
        linear, log = u.double() / self.end, (self._log_snr(u) - ends[0]) / (ends[1] - ends[0])
        return (1 - self.share) * linear + self.share * log

    def inverse(self, s: Tensor) -> Tensor:
        """u at s."""
        u = inverse(self.s, s, 0.0, self.end)
        return u.masked_fill(s >= 1, self.end).masked_fill(s <= 0, 0.0)

    def _log_snr(self, u: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(u)
        return (alpha + SOFTENING).log() - (sigma + SOFTENING).log()

    def _slope(self, u: Tensor) -> Tensor:
        """dx/ds = first * x + second * y."""
        with torch.enable_grad():
            # The last point moves just inside, because the clamp has no slope at the end itself.
            u = u.clamp_max(self.end - 1e-9).requires_grad_()
            ds = torch.autograd.grad(self.s(u).sum(), u)[0]
            scale, tau = self.schedule.clock(u)
            dtau = torch.autograd.grad(tau.sum(), u, retain_graph=True)[0]
            # A flow's scale is one everywhere.
            dscale = torch.autograd.grad(scale.sum(), u)[0] if scale.requires_grad else torch.zeros_like(u)
        scale = scale.detach()
        return torch.stack([dscale / scale / ds, scale * dtau / ds], -1)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A dense trajectory: states and slopes dx/ds (B, M + 1, *S) on a grid, and last (B, *S), at u = 1.

    slack: (B,) how far apart predictor and corrector were, root mean squares summed over the steps: 0.01 to 0.1 of the
    samples' scale for 16 and 24 calls on the models shipped, above it where the field is too stiff for so few calls.

    States and slopes may lie on the CPU beside a last on a GPU: what is asked of them is picked there and sent over.
    """

    grid: DenseGrid
    states: Tensor
    slopes: Tensor
    last: Tensor
    slack: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Those of all samples, from those of some."""
        if len(parts) == 1:
            return parts[0]
        states, slopes, last = (torch.cat([getattr(p, name) for p in parts]) for name in ("states", "slopes", "last"))
        slack = [part.slack for part in parts if part.slack is not None]
        return cls(parts[0].grid, states, slopes, last, torch.cat(slack) if slack else None)

    def rows(self, part: slice) -> Trajectory:
        """Those of some samples."""
        slack = None if self.slack is None else self.slack[part]
        return replace(self, states=self.states[part], slopes=self.slopes[part], last=self.last[part], slack=slack)

    def ends(self) -> Trajectory:
        """The end points alone: nothing can be asked of it between them."""
        return replace(self, states=self.states[:, :1].clone(), slopes=self.slopes[:, :0].clone())

    @property
    def loose(self) -> float:
        """The slack over the scale of noise or samples, the larger one; NaN or Inf where the way diverges."""
        if self.slack is None or not len(self.last):
            return 0.0
        scale = max(float(x.double().square().mean().sqrt()) for x in (self.states[:, 0], self.last))
        return float(self.slack.double().mean()) / max(scale, 1e-300)

    def at(self, u: Tensor) -> Tensor:
        """The states at u (n,) -> (B, n, *S), cubic Hermite in s, differentiable in u once."""
        return self._hermite(u, _HERMITE)

    def velocity(self, u: Tensor) -> Tensor:
        """dx/du at u (n,) -> (B, n, *S): the derivative of :meth:`at`."""
        with torch.enable_grad():
            leaf = u.detach().double().clamp(0, self.grid.end - 1e-9).requires_grad_()
            ds = torch.autograd.grad(self.grid.s(leaf).sum(), leaf)[0]
        inside = (u.detach() < self.grid.end) | (self.grid.end == 1)
        slope = self._hermite(u.detach(), _HERMITE_SLOPE)
        slope = slope * _column(ds * self.grid.intervals, slope)
        if bool(inside.all()):
            return slope
        jump = (self.last - sent(self.states[:, -1], self.last.device))[:, None] / (1 - self.grid.end)
        return torch.where(_column(inside, slope) > 0, slope, jump)

    def _hermite(self, u: Tensor, basis: Tensor) -> Tensor:
        grid, real = self.grid, self.states.dtype
        if u.ndim != 1:
            raise ValueError(f"u has shape {tuple(u.shape)}; give (n,)")
        u = u.cpu().double()
        position = grid.s(u.clamp(0, grid.end)) * grid.intervals
        k = position.detach().floor().clamp(0, grid.intervals - 1).long()
        fraction = position - k
        powers = torch.stack([torch.ones_like(fraction), fraction, fraction**2, fraction**3], -1)
        w = powers @ basis  # (n, 4): x_k, dx_k, x_{k+1}, dx_{k+1}
        scaled = torch.cat([w[:, :1], w[:, 1:2] / grid.intervals, w[:, 2:3], w[:, 3:] / grid.intervals], 1)
        k = k.to(self.states.device)
        picked = (self.states[:, k], self.slopes[:, k], self.states[:, k + 1], self.slopes[:, k + 1])
        parts = [sent(part, self.last.device) for part in picked]
        x: Tensor = sum(_column(scaled[:, i], part) * part for i, part in enumerate(parts))  # type: ignore[assignment]
        if grid.end < 1 and basis is _HERMITE:
            beyond = ((u - grid.end) / (1 - grid.end)).clamp_min(0)
            x = x + _column(beyond, x) * (self.last - sent(self.states[:, -1], self.last.device))[:, None]
        return x.to(real)


def integrate(predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, grid: DenseGrid) -> Trajectory:
    """The dense trajectory from x (B, *S) at u = 0. predict(x, u) -> y. Calls: see :func:`evaluations`."""
    m = grid.intervals
    states = x.new_empty((len(x), m + 1, *x.shape[1:]))
    slopes = torch.empty_like(states)
    history: list[Any] = [predict(x, grid.points[0])]

    def slope(x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        return float(row[0]) * x + float(row[1]) * y

    slack = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    for n in range(m):
        states[:, n], slopes[:, n] = x, slope(x, history[n], grid.slope[n])
        base = float(grid.ratio[n]) * x
        x = base + _mixed(grid.predict[n], history[-4:])
        if n + 1 < m or grid.open:
            history.append(predict(x, grid.points[n + 1]))
            predicted, x = x, base + _mixed(grid.correct[n], history[-4:])
            slack += (x - predicted).flatten(1).to(slack.dtype).square().mean(1).sqrt()
            if len(history) > 4:
                history[-5] = None  # no formula reads it again
    if len(history) <= m:
        # A flow's network may be undefined at sigma = 0: its last y is extrapolated.
        history.append(_mixed(torch.tensor([-1.0, 4.0, -6.0, 4.0]), history[-4:]))
    elif grid.jump:
        # Here y is the sample itself, 7e-4 off at the predictor's state: the network is called again.
        history[m] = predict(x, grid.points[m])
    states[:, m], slopes[:, m] = x, slope(x, history[m], grid.slope[m])
    a, b = grid.schedule.transition(torch.tensor([grid.end, 1.0], dtype=torch.float64))
    last = float(a) * x + float(b) * history[m] if grid.jump else x
    return Trajectory(grid, states, slopes, last, slack)


def evaluations(grid: DenseGrid) -> int:
    """Model calls of :func:`integrate` per sample: one a step, one or two more at an open end."""
    return grid.intervals + grid.open + grid.jump


@lru_cache(maxsize=16)
def dense_grid(schedule: Schedule, budget: int = EVALUATIONS) -> DenseGrid:
    """The grid whose trajectory takes ``budget`` model calls, at least 16. Raises ValueError below."""
    if budget < 16:
        raise ValueError(f"teacher evaluations={budget!r}: need at least 16 (24 to 64 are usual)")
    return DenseGrid(schedule, budget - evaluations(DenseGrid(schedule, 4)) + 4)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A part of what is kept, on the device that needs it; to a GPU by pinned memory, so that the host goes on."""
    if tensor.device == device:
        return tensor
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def _last_u(schedule: Schedule) -> float:
    """Where the network's time reaches its last value, or the clock ``LATEST`` if that is before; 1 for a flow."""
    one, end = torch.ones(1, dtype=torch.float64), 1.0
    final = schedule.time(one)
    if bool(schedule.time(one - 1e-7) == final):
        end = float(inverse(lambda u: (schedule.time(u) == final).double(), one / 2))
    if bool(schedule.clock(one * end)[1] > LATEST):
        end = float(inverse(lambda u: schedule.clock(u)[1], one * LATEST, 0.0, end))
    return end


def _mixed(row: Tensor, history: list[Any]) -> Any:
    return sum(float(w) * y for w, y in zip(row[-len(history) :], history, strict=True))


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(n,) as (1, n, 1, ...) beside states (B, n, *S)."""
    return values.to(like.device, like.dtype).reshape(1, -1, *[1] * (like.ndim - 2))


# Coefficients of 1, f, f^2, f^3 for x_k, dx_k, x_{k+1}, dx_{k+1}; and of the derivative in f.
_HERMITE = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [-3, -2, 3, -1], [2, 1, -2, 1]], dtype=torch.float64)
_HERMITE_SLOPE = torch.tensor([[0, 1, 0, 0], [-6, -4, 6, -2], [6, 3, -6, 3], [0, 0, 0, 0]], dtype=torch.float64)


def _lagrange(first: int, count: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The Lagrange basis on ``count`` integers from ``first``: values and derivatives, (q,) -> (q, count)."""
    nodes = torch.arange(first, first + count, dtype=torch.float64)
    powers = range(count)
    inverse = torch.linalg.inv(torch.stack([nodes**k for k in powers], 1))  # row k: coefficients of s^k
    value = lambda s: torch.stack([s**k for k in powers], -1) @ inverse  # noqa: E731
    slope = lambda s: torch.stack([k * s ** max(k - 1, 0) for k in powers], -1) @ inverse  # noqa: E731
    return value, slope


def _gauss_legendre(num: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1] (Golub and Welsch)."""
    k = torch.arange(1, num, dtype=torch.float64)
    beta = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    assert math.isclose(float(vectors[0].square().sum()), 1)
    return (values + 1) / 2, vectors[0].square()
