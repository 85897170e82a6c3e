"""Residual: what a search makes small, and how a cotangent of it becomes one of the rollout's states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..trajectory import Trajectory
from .settings import Loss

Moves = Callable[[Tensor, Trajectory], Tensor]


@dataclass(frozen=True, eq=False)
class Residual:
    """The residuals r of a batch.

    error: (B,) float64, the mean square at the end point. values: (B, R), r itself.
    back: cotangents of r (C, B, R) -> cotangents of the states, (C, B, *S) at the end point or (C, B, N, *S) at all.
    moves: (cotangents of r, trajectory) -> (C, B, N - 1) float64, the gradients in the u at which the inner states
        should meet the teacher; None where r does not depend on them.
    """

    error: Tensor
    values: Tensor
    back: Callable[[Tensor], Tensor]
    moves: Moves | None = None

    def squares(self) -> Tensor:
        """(B,) float64 on the CPU: |r|^2 in the mean over its elements."""
        return self.values.double().square().mean(1).cpu()

    def over(self, unit: float) -> Residual:
        """With squares counted in ``unit``."""
        if unit == 1:
            return self
        back, moves, scale = self.back, self.moves, unit**-0.5
        return Residual(
            self.error / unit,
            self.values * scale,
            lambda c: back(c * scale),
            None if moves is None else lambda c, trajectory: moves(c * scale, trajectory),
        )


def residual(loss: Loss, weight: float, states: Tensor, trajectory: Trajectory, targets: Tensor) -> Residual:
    """The residuals of states (B, N, *S) under a loss: ``"end"``, ``"trajectory"`` or a function of samples.

    weight: of the inner states' squares in ``"trajectory"``. targets: (N,) u where x_i should meet the teacher.
    """
    end = states[:, -1]
    difference = end - trajectory.last
    error = difference.flatten(1).double().square().mean(1)
    if callable(loss):
        return _of_features(loss, error, end, trajectory.last)
    if loss == "trajectory" and weight and states.shape[1] > 1:
        return _along(weight, error, states, trajectory, targets)
    return Residual(error, difference.flatten(1), lambda c: c.reshape(len(c), *end.shape))


def _of_features(function: Callable[[Tensor], Tensor], error: Tensor, end: Tensor, wanted: Tensor) -> Residual:
    """feature(x_N) - feature(teacher(1))."""
    with torch.enable_grad():
        leaf = end.detach().requires_grad_()
        features = function(leaf.clone()).flatten(1).clone()
    with torch.no_grad():
        values = features.detach() - function(wanted.clone()).flatten(1)
    for name, part, given in (("the samples", features.detach(), end), ("the teacher's samples", values, wanted)):
        if bool(part.isnan().any()) and bool(given.isfinite().all()):
            raise ValueError(f"the function loss returned NaN for {name}, which are finite")

    def back(cotangents: Tensor) -> Tensor:
        pulled = [torch.autograd.grad(features, leaf, c.to(features), retain_graph=True)[0] for c in cotangents]
        return torch.stack(pulled)

    return Residual(error, values, back)


def _along(weight: float, error: Tensor, states: Tensor, trajectory: Trajectory, targets: Tensor) -> Residual:
    """x_N - teacher(1), and sqrt(weight) (x_i - teacher(u_i)) for the inner states; the u_i move with the table."""
    shape = [1, -1, *[1] * (states.ndim - 2)]
    scale = torch.tensor([weight**0.5] * (states.shape[1] - 1) + [1.0]).reshape(shape).to(states)
    wanted = torch.cat([trajectory.at(targets[:-1]), trajectory.last[:, None]], 1)
    inner = targets[:-1].detach()

    def back(cotangents: Tensor) -> Tensor:
        return cotangents.reshape(len(cotangents), *states.shape) * scale

    def moves(cotangents: Tensor, trajectory: Trajectory) -> Tensor:
        speed = trajectory.velocity(inner).flatten(2)
        return -(back(cotangents)[:, :, :-1].flatten(3) * speed).sum(3).double().cpu()

    return Residual(error, ((states - wanted) * scale).flatten(1), back, moves)
