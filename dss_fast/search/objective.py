"""What a search makes small: residuals of a table on a batch, and rows of their Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import Batch, Problem
from ..unroll import Rollout
from .space import Space


class Objective:
    """Residuals of a table on a batch, and rows of their Jacobian."""

    def __init__(self, problem: Problem, loss, trajectory_weight: float, robust: float, memory_budget, memory=1 << 29):
        self.problem, self.loss, self.robust = problem, loss, robust
        self.weight = trajectory_weight if loss == "trajectory" else 0.0
        self.memory_budget, self.memory = memory_budget, memory
        self._jacobian: tuple[Tensor, Tensor] | None = None

    def rollout(self, space: Space, theta: Tensor, batch: Batch, shared_by: int) -> Rollout:
        """A rollout to differentiate, one of ``shared_by`` alive at a time; 0: states only."""
        problem, budget = self.problem, self.memory_budget
        if isinstance(budget, int | float) and shared_by:
            budget = type(budget)(budget / shared_by)
        weights, times = problem.weights(batch, **space.table(theta))
        real = torch.promote_types(problem.dtype, torch.float32)
        return Rollout(
            problem.denoiser(batch),
            batch.noise,
            weights.to(problem.device, real),
            times.to(problem.device, real),
            guided=problem.guided_elements,
            memory_budget=budget if shared_by else None,
            wrt=("weights", "times") if shared_by else (),
        )

    def keeps(self, num_steps: int, samples: int) -> bool:
        """Whether the states and histories of so many samples may stay in memory together."""
        numbers = (2 * num_steps + 1) * math.prod(self.problem.shape) * samples / self.problem.world
        return numbers * self.problem.dtype.itemsize <= self.memory

    def residual(self, states: Tensor, trajectory, targets: Tensor) -> tuple[Tensor, Tensor, Callable | None]:
        """End-point error (B,) mean of squares, r (B, R), and a pullback of cotangents in feature space."""
        end = states[:, -1]
        error = (end - trajectory.last).flatten(1).double().square().mean(1)
        if callable(self.loss):
            with torch.enable_grad():
                leaf = end.detach().requires_grad_()
                features = self.loss(leaf).flatten(1)
            with torch.no_grad():
                wanted = self.loss(trajectory.last).flatten(1)

            def pull(cotangent: Tensor) -> Tensor:
                return torch.autograd.grad(features, leaf, cotangent.to(features), retain_graph=True)[0]

            return error, (features.detach() - wanted), pull
        if self.weight and states.shape[1] > 1:
            shape = [1, -1, *[1] * (states.ndim - 2)]
            scale = torch.tensor([self.weight**0.5] * (states.shape[1] - 1) + [1.0]).reshape(shape)
            wanted = torch.cat([trajectory.at(targets[:-1]), trajectory.last[:, None]], 1)
            return error, ((states - wanted) * scale.to(states)).flatten(1), None
        return error, (end - trajectory.last).flatten(1), None

    def rows(self, space: Space, theta: Tensor, rollout: Rollout, trajectory, cotangents: Tensor, pull) -> Tensor:
        """(C, B, P): J_b' c for each cotangent c (C, B, R), float64 on the CPU."""
        problem, targets = self.problem, space.targets(theta)
        if self._jacobian is None or not torch.equal(self._jacobian[0], theta):
            self._jacobian = theta.clone(), space.jacobian(theta, problem.schedule)
        jacobian = self._jacobian[1]
        count, rows = cotangents.shape[:2]
        shape = rollout.states.shape
        if pull is not None:
            at_end = torch.stack([pull(c) for c in cotangents])
            found = rollout.pull(at_end)
        elif self.weight and shape[1] > 1:
            along = cotangents.reshape(count, *shape).clone()
            along[:, :, :-1] *= self.weight**0.5
            found = rollout.pull(along)
        else:
            found = rollout.pull(cotangents.reshape(count, rows, *shape[2:]))
        flat = torch.cat([found.weights.flatten(2), found.times], 2).double().cpu()
        gradient = flat @ jacobian[: flat.shape[2]]
        if self.weight and shape[1] > 1 and pull is None:
            speed = trajectory.velocity(targets[:-1]).flatten(2)
            moved = -(along[:, :, :-1].flatten(3) * speed).sum(3).double().cpu()
            gradient = gradient + moved @ jacobian[flat.shape[2] : -1]
        return gradient
