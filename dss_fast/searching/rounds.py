"""Rounds: the numbers of a search. A table's rollouts on training and held-out samples, and back from them.

Nothing is decided here: ``descent`` says what is tried and what becomes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distance import squares
from ..draws import mix
from ..table import StepTable
from ..target import Samples
from ..unroll import Rollout
from ..unroll.kept import budget_bytes
from .budget import Ledger
from .gauss_newton import ROBUST, Quadratic, Sums, signs_beside
from .job import Job
from .plan import MEMORY
from .residual import Residual, residual
from .settings import GaussNewton
from .space import Space
from .teacher import Teacher

TRAJECTORY_WEIGHT = 0.1  # of the inner states' squares, from the sixth round on
ANNEAL = (30, 10, 5, 3, 2, 1)  # times that weight, round by round
SKETCHED = 2  # every so many batches a sketch


@dataclass(frozen=True, eq=False)
class Candidate:
    """A table to try. units: what each target's squares are counted in, 1 for a single target; batches take turns."""

    space: Space
    theta: Tensor
    units: tuple[float, ...]

    def unit(self, batch: int) -> float:
        """What the squares of a batch are counted in: its target's."""
        return self.units[batch % len(self.units)]

    def table(self, batch: Samples) -> StepTable:
        """The table for a batch."""
        return self.space.table(self.theta, batch.guidance).to(batch.noise.device, batch.noise.dtype)


@dataclass(frozen=True, eq=False)
class Tried:
    """One batch of a trial. rollout: None where it did not fit beside the others and must run again. residual: under
    the weight of the round to come."""

    batch: Samples
    rollout: Rollout | None
    residual: Residual


@dataclass(frozen=True, eq=False)
class Trial:
    """What a candidate was worth, of all samples of all processes, (n,) float64 means of squares: |r|^2 under the
    weights of the round before and of this one, and the end point's errors. number: of the round."""

    candidate: Candidate
    number: int
    parts: list[Tried]
    before: Tensor
    values: Tensor
    errors: Tensor

    @property
    def scale(self) -> float:
        """The square at which a sample counts half."""
        return float(ROBUST * self.values.median())


@dataclass(frozen=True, eq=False)
class Look:
    """Squares of the end points' errors on samples not fitted to, (n,) float64, infinite where one diverges; and of the
    errors of their features, where those choose."""

    errors: Tensor
    features: Tensor | None = None

    @property
    def rmse(self) -> float:
        """Of the end points."""
        return math.sqrt(float(self.errors.mean()))


@dataclass(frozen=True)
class Rounds:
    """train, held_out, fresh: the samples and their teacher."""

    job: Job
    ledger: Ledger
    train: Teacher
    held_out: Teacher
    fresh: Teacher

    def cost(self, candidate: Candidate, number: int, batches: int) -> int:
        """Evaluations of a trial of so many batches and, once accepted, of its differentiation."""
        sizes, n = self.train.sizes[:batches], candidate.space.num_steps
        sketched = sum(size for k, size in enumerate(sizes) if _sketches(k, candidate, number, batches))
        return n * (sum(sizes) * (3 if self._keeps(n, sum(sizes)) else 4) + 2 * sketched)

    def attempt(self, candidate: Candidate, number: int, batches: int) -> Trial | None:
        """The rollouts of round ``number``; None when one diverges to NaN or Inf."""
        n, sizes = candidate.space.num_steps, self.train.sizes[:batches]
        old, new = _weight(number - 1), _weight(number)
        loss, targets = self._settings.loss, candidate.space.targets(candidate.theta)
        parts, before = [], []
        try:
            for k in range(batches):
                batch, trajectory = self.train[k]
                kept = self._keeps(n, batches * batch.size)
                rollout = Rollout(**self._arguments(candidate, batch, batches if kept else 0))
                found = residual(loss, new, rollout.states, trajectory, targets).over(candidate.unit(k))
                past = found
                if old != new:
                    past = residual(loss, old, rollout.states, trajectory, targets).over(candidate.unit(k))
                parts.append(Tried(batch, rollout if kept else None, found))
                before.append(past.squares())
            values, errors = [part.residual.squares() for part in parts], [part.residual.error for part in parts]
            gathered = self.job.draws.gathered(sizes, before, values, errors)
        except FloatingPointError:
            return None
        finally:
            self.ledger.spend(n * sum(sizes))
        return Trial(candidate, number, parts, *gathered)

    def differentiate(self, trial: Trial) -> Quadratic:
        """Gradient and J'J at the candidate. Lets each rollout go as soon as it was pulled back."""
        candidate, draws = trial.candidate, self.job.draws
        space, theta, n = candidate.space, candidate.theta, candidate.space.num_steps
        start, sums, jacobian = 0, Sums(len(theta)), space.jacobian(theta)
        for k, part in enumerate(trial.parts):
            batch, rollout, found = part.batch, part.rollout, part.residual
            values = trial.values[draws.mine(start, batch.size), None]
            cotangents = [found.values]
            if _sketches(k, candidate, trial.number, len(trial.parts)):
                cotangents.append(self._signs(found.values, n, trial.number, k, batch.size))
            scale = found.values.shape[1] ** -0.5  # |r|^2 is averaged over its elements
            if rollout is None:  # all of them together did not fit
                rollout = Rollout(**self._arguments(candidate, batch, 1))
                self.ledger.spend(n * batch.size)
            scaled = torch.stack(cotangents) * scale
            pulled = rollout.pull(found.back(scaled))
            assert pulled.weights is not None and pulled.times is not None
            flat = torch.cat([pulled.weights.flatten(2), pulled.times], 2).double().cpu()
            rows = flat @ jacobian[: flat.shape[2]]
            if found.moves is not None:
                rows = rows + found.moves(scaled, self.train[k][1]) @ jacobian[flat.shape[2] : -1]
            trial.parts[k] = replace(part, rollout=None)
            del part, rollout, pulled, flat
            sums.add(rows, values, trial.scale / (trial.scale + values), scale, batch.size)
            self.ledger.spend(2 * n * batch.size * len(cotangents))
            start += batch.size
        return sums.quadratic(draws.all_reduce)

    @torch.no_grad()
    def look(self, candidate: Candidate, at: Teacher) -> Look:
        """The candidate on samples that it was not fitted to."""
        total, ends, seen = sum(at.sizes), [], []
        by_features = self._settings.select == "features"
        self.ledger.spend(candidate.space.num_steps * total)
        try:
            for k, (batch, trajectory) in enumerate(at):
                end = Rollout(**self._arguments(candidate, batch, 0)).states[:, -1]
                ends.append(squares(end, trajectory.last) / candidate.unit(k))
                if by_features and batch.target.features is not None:
                    mine, wanted = (batch.target.features(x.clone()).clone() for x in (end, trajectory.last))
                    if bool(end.isfinite().all()) and not bool((mine.isfinite() & wanted.isfinite()).all()):
                        raise ValueError(
                            "the target's features are NaN or Inf for finite samples: none can choose by them"
                        )
                    seen.append(squares(mine, wanted))
            errors, *features = self.job.draws.gathered(at.sizes, ends, *([seen] if seen else []))
        except FloatingPointError:
            return Look(torch.full((total,), math.inf, dtype=torch.float64))
        return Look(errors, *features)

    @property
    def _settings(self) -> GaussNewton:
        assert isinstance(self.job.settings, GaussNewton)
        return self.job.settings

    def _arguments(self, candidate: Candidate, batch: Samples, alive: int) -> dict[str, Any]:
        """Of a rollout that is one of ``alive`` whose graphs share the memory for them; 0: it is not differentiated.

        Of several processes none may leave alone, so that what diverges is noticed when their numbers are gathered.
        """
        table, auto = candidate.table(batch), budget_bytes("auto", batch.noise.device)
        return {
            "model": batch.denoiser(None if self.job.draws.world == 1 else False),
            "x": batch.noise,
            "weights": table.weights,
            "times": table.times,
            "both": table.both,
            "memory_budget": auto // alive if auto is not None and alive else None,
            "wrt": ("weights", "times") if alive else (),
        }

    def _signs(self, values: Tensor, n: int, number: int, k: int, size: int) -> Tensor:
        """(B, R) random signs beside the residual; the same for any number of processes."""
        draws = self.job.draws
        generator = torch.Generator().manual_seed(mix(draws.seed, "sketch", n, number, k))
        signs = torch.randint(0, 2, (size, values.shape[1]), generator=generator, dtype=torch.int8)
        return signs_beside(values, signs[draws.rank :: draws.world].to(values) * 2 - 1)

    def _keeps(self, num_steps: int, samples: int) -> bool:
        """Whether the states and histories of so many samples may stay in memory together."""
        draws = self.job.draws
        largest = max(math.prod(target.shape or ()) for target in draws.targets)
        numbers = (2 * num_steps + 1) * largest * samples / draws.world
        return numbers * draws.target.dtype.itemsize <= MEMORY


def enough(sizes: Sequence[int], wanted: int) -> int:
    """How many batches hold that many samples."""
    total, k = 0, 0
    while total < wanted and k < len(sizes):
        total, k = total + sizes[k], k + 1
    return k


def _sketches(k: int, candidate: Candidate, number: int, batches: int) -> bool:
    """Whether a batch of a round takes part in the sketch."""
    targets = len(candidate.units)
    return (k // targets + number) % SKETCHED == 0 or batches < SKETCHED * targets


def _weight(number: int) -> float:
    """Of the inner states' squares in a round."""
    return TRAJECTORY_WEIGHT * ANNEAL[max(0, min(number, len(ANNEAL) - 1))]
