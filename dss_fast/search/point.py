"""Where stage 2 of the search stands for one N: the accepted table, what is known there, the next one to try."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..solver import Solver
from .space import Space

DAMPING = 1e-2  # of Levenberg-Marquardt at the start, relative to J'J's diagonal


@dataclass
class Point:
    """Where the search for one N stands; everything a resumed one needs.

    theta: accepted; candidate: to be tried next. matrix, gradient, values, scale: J'J, gradient, |r|^2 of the
    samples and robust scale there. best: theta with the smallest held-out loss.
    """

    space: Space
    candidate: Tensor
    share: float
    theta: Tensor | None = None
    matrix: Tensor | None = None
    gradient: Tensor | None = None
    values: Tensor | None = None
    mass: float = 0.0
    scale: float = 0.0
    damping: float = DAMPING
    predicted: float = 0.0
    round: int = 0
    tries: int = 0
    best: Tensor | None = None
    best_loss: float = math.inf
    best_error: float = math.inf
    held_out_scale: float = 0.0
    small: int = 0
    spent: int = 0
    finished: bool = False
    _solver: Solver | None = field(default=None, repr=False)

    def solver(self) -> Solver:
        if self._solver is None:
            self._solver = self.space.solver(self.best)
        return self._solver

    def save(self) -> dict:
        saved = {k: v for k, v in vars(self).items() if k not in ("space", "_solver")}
        saved = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in saved.items()}
        return {**saved, "space": [self.space.kind, self.space.family, list(self.space.timesteps)]}

    @classmethod
    def load(cls, saved: dict) -> Point:
        kind, family, timesteps = saved["space"]
        values = {k: math.inf if v is None and k.startswith("best_") else v for k, v in saved.items()}
        return cls(**{**values, "space": Space(kind, family, tuple(timesteps))})

    def keep(self, theta: Tensor, loss: float, error: float) -> None:
        """Makes theta the best if its held-out loss is the smallest."""
        if loss < self.best_loss:
            self.best, self.best_loss, self.best_error, self._solver = theta.clone(), loss, error, None

    def step(self) -> None:
        """The Levenberg-Marquardt step from theta, damping scaled by J'J's diagonal."""
        scale = self.matrix.diagonal().clamp_min(1e-12 * float(self.matrix.diagonal().max())).sqrt()
        system = self.matrix / scale[:, None] / scale
        system = system + self.damping * torch.eye(len(scale), dtype=torch.float64)
        step = -torch.linalg.solve(system, self.gradient / scale) / scale
        self.candidate = self.space.move(self.theta, step)
        moved = self.candidate - self.theta
        self.predicted = -float(self.gradient @ moved + 0.5 * moved @ self.matrix @ moved)
