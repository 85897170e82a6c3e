"""Where stage 2 of the search stands for one N: the accepted table, what is known there, the next one to try."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..schedule import Schedule
from ..solver import Solver
from .gauss_newton import Quadratic
from .space import Space

DAMPING = 0.1  # of Levenberg-Marquardt at the start, relative to J'J's diagonal
LEAST_DAMPING, MOST_DAMPING = 1e-7, 1e6
RACE = 3  # rounds after which the best of several points goes on
MOST_TRIES = 6  # in a row that do not improve


@dataclass(frozen=True, eq=False)
class Point:
    """Where the search for one N stands; everything a resumed one needs. A value: each method gives the next one.

    theta: accepted; candidate: to be tried next. loss: the quadratic there. values, scale: |r|^2 of its samples and
    the robust scale. predicted: what the candidate should gain. round, tries: accepted ones, and refused ones since.
    small: rounds in a row whose gain was below the tolerance. best: theta with the smallest held-out loss.
    share: evaluations it may spend. spent: those it has. units: what each target's squares are counted in. price: what
    the loss is charged for a square of a weight on the noise.
    """

    space: Space
    candidate: Tensor
    share: float
    units: tuple[float, ...] = (1.0,)
    price: float = 0.0
    theta: Tensor | None = None
    loss: Quadratic | None = None
    values: Tensor | None = None
    scale: float = 0.0
    damping: float = DAMPING
    predicted: float = 0.0
    round: int = 0
    tries: int = 0
    best: Tensor | None = None
    best_loss: float = math.inf
    held_out_scale: float = 0.0
    small: int = 0
    spent: int = 0
    finished: bool = False

    def solver(self) -> Solver | None:
        """The best table so far."""
        return None if self.best is None else self.space.solver(self.best)

    @property
    def raced(self) -> bool:
        """Whether it has run the rounds after which one of several goes on."""
        return self.finished or self.round >= RACE

    def unit(self, batch: int) -> float:
        """What the squares of a batch are counted in: its target's."""
        return self.units[batch % len(self.units)]

    def charge(self, theta: Tensor) -> float:
        """What theta's weights on the noise add to its loss."""
        return self.price * float(self.space.noise(theta).square().sum())

    def charged(self, loss: Quadratic) -> Quadratic:
        """A quadratic around the candidate, with the charge."""
        ridge = torch.zeros_like(self.candidate)
        self.space.noise(ridge).fill_(self.price)
        return loss.with_ridge(ridge, self.candidate)

    def stepped(self) -> Point:
        """With the damped step from theta as the next candidate."""
        assert self.loss is not None and self.theta is not None
        candidate = self.space.move(self.theta, self.loss.step(self.damping))
        return replace(self, candidate=candidate, predicted=self.loss.gain(candidate - self.theta))

    def rejected(self) -> Point:
        """The candidate was no better: a shorter step, or the end."""
        shorter = replace(self, damping=min(4 * self.damping, MOST_DAMPING), tries=self.tries + 1)
        return replace(shorter, finished=shorter.tries > MOST_TRIES).stepped()

    def renewed(self) -> Point:
        """No step from theta helped: the quadratic is made anew there, under the next round's loss."""
        assert self.theta is not None
        return replace(self, candidate=self.theta, values=None, loss=None, damping=DAMPING, tries=0, finished=False)

    def damped_less(self) -> Point:
        """The candidate kept what the quadratic promised: a longer step next."""
        return replace(self, damping=max(self.damping / 3, LEAST_DAMPING))

    def ended(self) -> Point:
        """The search for this N is over; without a look at any table the accepted one is the best."""
        last = self.candidate if self.theta is None else self.theta
        return replace(self, finished=True, best=last.clone() if self.best is None else self.best)

    def checked(self, theta: Tensor, loss: float, scale: float, charged: bool) -> Point:
        """After a look at the held-out loss of theta: the best if it is the smallest, ``charged`` or as it is.

        Losses are kept as they are, because the start is looked at before there is a price.
        """
        found, known, new = replace(self, held_out_scale=scale), self.best_loss, loss
        if charged and self.best is not None:
            known, new = known + self.charge(self.best), new + self.charge(theta)
        return replace(found, best=theta.clone(), best_loss=loss) if new < known else found

    def save(self) -> dict[str, Any]:
        """As nested data for a checkpoint; infinities as None."""
        saved = {f.name: getattr(self, f.name) for f in fields(self)}
        saved = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in saved.items()}
        # Tensors of their own: a file of tensors refuses two names of one, as when the best table is the present one.
        saved = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
        loss = None if self.loss is None else asdict(self.loss)
        return {**saved, "loss": loss, "space": [self.space.kind, self.space.num_steps]}

    @classmethod
    def load(cls, saved: dict[str, Any], schedule: Schedule) -> Point:
        """What :meth:`save` wrote."""
        loss = None if saved["loss"] is None else Quadratic(**saved["loss"])
        best_loss = math.inf if saved["best_loss"] is None else saved["best_loss"]
        kind, num_steps = saved["space"]
        space = Space(kind, schedule, num_steps)
        return cls(**{**saved, "loss": loss, "best_loss": best_loss, "space": space, "units": tuple(saved["units"])})
