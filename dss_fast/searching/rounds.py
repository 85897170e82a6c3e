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
from ..trajectory import Trajectory
from ..unroll import Rollout
from ..unroll.kept import budget_bytes
from .budget import Ledger
from .forward import DIFFERENCE
from .gauss_newton import ROBUST, Quadratic, Sums, signs_beside
from .job import Job
from .residual import Residual, residual
from .settings import GaussNewton
from .space import Space
from .teacher import Teacher

TRAJECTORY_WEIGHT = 0.1  # of the inner states' squares, from the sixth round on
ANNEAL = (30, 10, 5, 3, 2, 1)  # times that weight, round by round
SKETCHED = 2  # every so many batches a sketch


@dataclass(frozen=True, eq=False)
class Candidate:
    """A table to try. units: what each target's squares are counted in, 1 for a single target; batches take turns.
    basis: (P, q), along whose columns alone it moves, by differences; None: along all numbers, by the gradient."""

    space: Space
    theta: Tensor
    units: tuple[float, ...]
    basis: Tensor | None = None

    def unit(self, batch: int) -> float:
        """What the squares of a batch are counted in: its target's."""
        return self.units[batch % len(self.units)]

    def table(self, batch: Samples) -> StepTable:
        """The table for a batch."""
        return self.space.table(self.theta, batch.guidance).to(batch.noise.device, batch.noise.dtype)


@dataclass(frozen=True, eq=False)
class Tried:
    """Some samples of a batch of a trial. rollout, and residual under the weight of the round to come: None where they
    did not fit beside the others and must be made again."""

    rows: slice
    rollout: Rollout | None
    residual: Residual | None


@dataclass(frozen=True, eq=False)
class Trial:
    """What a candidate was worth, of all samples of all processes, (n,) float64 means of squares: |r|^2 under the
    weights of the round before and of this one, and the end point's errors. number: of the round. parts: of each batch,
    on this process."""

    candidate: Candidate
    number: int
    parts: list[list[Tried]]
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
        again = 2 * self.train.again(slice(0, batches))
        sizes, n = self.train.sizes[:batches], candidate.space.num_steps
        if candidate.basis is not None:
            kept = self._keeps(n, sum(sizes))
            return n * sum(sizes) * (candidate.basis.shape[1] + (1 if kept else 2)) + again
        sketched = sum(size for k, size in enumerate(sizes) if _sketches(k, candidate, number, batches))
        return n * (sum(sizes) * (3 if self._keeps(n, sum(sizes)) else 4) + 2 * sketched) + again

    def attempt(self, candidate: Candidate, number: int, batches: int) -> Trial | None:
        """The rollouts of round ``number``; None when one diverges to NaN or Inf."""
        n, sizes = candidate.space.num_steps, self.train.sizes[:batches]
        old, new = _weight(number - 1), _weight(number)
        targets, kept, room = candidate.space.targets(candidate.theta), self._keeps(n, sum(sizes)), self.job.room
        parts: list[list[Tried]] = []
        numbers: list[list[Tensor]] = [[], [], []]  # of each batch: squares before and now, errors at the end point
        goes_back = kept and candidate.basis is None
        alive = sum(-(-size // (room.rows or size)) for size in sizes) if goes_back else 0
        self.ledger.spend(self.train.again(slice(0, batches)))
        try:
            for k in range(batches):
                tried: list[Tried] = []
                columns: list[list[Tensor]] = [[], [], []]
                for part in room.over(slice(0, len(self.train[k][0]))):
                    with part as rows:
                        batch, trajectory = self.train.part(k, rows)
                        rollout = Rollout(**self._arguments(candidate, batch, alive))
                        found = self._residual(candidate, k, new, rollout, trajectory, targets)
                        past = found if old == new else self._residual(candidate, k, old, rollout, trajectory, targets)
                        squared = past.squares(), found.squares(), found.error
                        for column, of_part in zip(columns, squared, strict=True):
                            column.append(of_part)
                        tried.append(Tried(rows, rollout, found) if kept else Tried(rows, None, None))
                        del batch, trajectory, rollout, found, past
                parts.append(tried)
                for whole, column in zip(numbers, columns, strict=True):
                    whole.append(torch.cat(column))
            gathered = self.job.draws.gathered(sizes, *numbers)
        except FloatingPointError:
            return None
        finally:
            self.ledger.spend(n * sum(sizes))
        return Trial(candidate, number, parts, *gathered)

    def differentiate(self, trial: Trial) -> Quadratic:
        """Gradient and J'J at the candidate. Lets each rollout go as soon as it was pulled back."""
        candidate, draws, new = trial.candidate, self.job.draws, _weight(trial.number)
        if candidate.basis is not None:
            return self._by_differences(trial, candidate.basis)
        space, theta, n = candidate.space, candidate.theta, candidate.space.num_steps
        start, sums, back, targets = 0, Sums(len(theta)), space.back(theta), space.targets(theta)
        self.ledger.spend(self.train.again(slice(0, len(trial.parts))))
        for k, parts in enumerate(trial.parts):
            size, signs, scale = self.train.sizes[k], None, 0.0
            pulled: list[Tensor] = []
            if parts[0].rollout is None:  # all of them together did not fit
                self.ledger.spend(n * size)
            while parts:
                tried = parts.pop(0)
                for part in self.job.room.over(tried.rows):
                    with part as rows:
                        batch, trajectory = self.train.part(k, rows)
                        rollout, found = tried.rollout, tried.residual
                        if rollout is None or found is None or rows != tried.rows:
                            rollout = Rollout(**self._arguments(candidate, batch, 1))
                            found = self._residual(candidate, k, new, rollout, trajectory, targets)
                        cotangents = [found.values]
                        if _sketches(k, candidate, trial.number, len(trial.parts)):
                            signs = self._signs(n, trial.number, k, found.values.shape[1]) if signs is None else signs
                            drawn = signs[rows].to(found.values) * 2 - 1
                            cotangents.append(signs_beside(found.values, drawn))
                        scale = found.values.shape[1] ** -0.5  # |r|^2 is averaged over its elements
                        scaled = torch.stack(cotangents) * scale
                        gradients = rollout.pull(found.back(scaled))
                        assert gradients.weights is not None and gradients.times is not None
                        flat = torch.cat([gradients.weights.flatten(2), gradients.times], 2).double().cpu()
                        moves = None if found.moves is None else found.moves(scaled, trajectory)
                        pulled.append(back(flat, moves))
                        del batch, trajectory, rollout, found, cotangents, scaled, gradients
                del tried
            through, values = torch.cat(pulled, 1), trial.values[draws.mine(start, size), None]
            sums.add(through, values, trial.scale / (trial.scale + values), scale, size)
            self.ledger.spend(2 * n * size * len(through))
            start += size
        return sums.quadratic(draws.all_reduce)

    @torch.no_grad()
    def _by_differences(self, trial: Trial, basis: Tensor) -> Quadratic:
        """Gradient and J'J along the basis, by a rollout a little along each of its columns."""
        candidate, draws, new = trial.candidate, self.job.draws, _weight(trial.number)
        beside = [replace(candidate, theta=candidate.theta + DIFFERENCE * column) for column in basis.mT]
        tables = [(one, one.space.targets(one.theta)) for one in (candidate, *beside)]
        start, sums, n = 0, Sums(len(beside)), candidate.space.num_steps

        def values(k: int, number: int, batch: Samples, trajectory: Trajectory) -> Tensor:
            table, targets = tables[number]
            rollout = Rollout(**self._arguments(table, batch, 0))
            return self._residual(table, k, new, rollout, trajectory, targets).values

        self.ledger.spend(self.train.again(slice(0, len(trial.parts))))
        for k, parts in enumerate(trial.parts):
            size = self.train.sizes[k]
            pulled: list[Tensor] = []
            squared: list[Tensor] = []
            self.ledger.spend(n * size * (len(beside) + (parts[0].residual is None)))
            while parts:
                tried = parts.pop(0)
                for part in self.job.room.over(tried.rows):
                    with part as rows:
                        batch, trajectory = self.train.part(k, rows)
                        known = tried.residual if rows == tried.rows else None
                        here = values(k, 0, batch, trajectory) if known is None else known.values
                        here = here.to(torch.promote_types(here.dtype, torch.float32))
                        (count, width), q = here.shape, len(beside)
                        jacobian = here.new_empty(count, q, width)
                        for number in range(q):
                            ahead = values(k, number + 1, batch, trajectory)
                            torch.sub(ahead, here, out=jacobian[:, number]).div_(DIFFERENCE)
                        # |r|^2 is averaged over its elements.
                        pulled.append((jacobian @ here[..., None])[..., 0].double().cpu() / width)
                        squared.append((jacobian @ jacobian.mT).double().cpu() / width)
                        del batch, trajectory, known, here, jacobian
                del tried
            worth = trial.values[draws.mine(start, size), None]
            sums.add_whole(torch.cat(pulled), torch.cat(squared), trial.scale / (trial.scale + worth), size)
            start += size
        return sums.quadratic(draws.all_reduce)

    @torch.no_grad()
    def look(self, candidate: Candidate, at: Teacher, batches: int | None = None) -> Look:
        """The candidate on samples that it was not fitted to: all of them, or the first ``batches``."""
        sizes, ends, seen = at.sizes[:batches], [], []
        total = sum(sizes)
        by_features = self._settings.select == "features"
        self.ledger.spend(candidate.space.num_steps * total)
        try:
            for k in range(len(sizes)):
                found: list[Tensor] = []
                of_features: list[Tensor] = []
                batch, trajectory = at[k]
                for part in self.job.room.over(slice(0, len(batch))):
                    with part as rows:
                        last, features = trajectory.last[rows], batch.target.features
                        end = Rollout(**self._arguments(candidate, batch.rows(rows), 0)).states[:, -1]
                        errors = squares(end, last) / candidate.unit(k)
                        if by_features and features is not None:
                            mine, wanted = (features(x.clone()).clone() for x in (end, last))
                            if bool(end.isfinite().all()) and not bool((mine.isfinite() & wanted.isfinite()).all()):
                                raise ValueError(
                                    "the target's features are NaN or Inf for finite samples: none can choose by them"
                                )
                            of_features.append(squares(mine, wanted))
                        found.append(errors)
                ends.append(torch.cat(found))
                seen += [torch.cat(of_features)] if of_features else []
            all_errors, *all_features = self.job.draws.gathered(sizes, ends, *([seen] if seen else []))
        except FloatingPointError:
            return Look(torch.full((total,), math.inf, dtype=torch.float64))
        return Look(all_errors, *all_features)

    def _residual(
        self, candidate: Candidate, k: int, weight: float, rollout: Rollout, trajectory: Trajectory, targets: Tensor
    ) -> Residual:
        """Of some samples of batch k, in its target's unit."""
        return residual(self._settings.loss, weight, rollout.states, trajectory, targets).over(candidate.unit(k))

    @property
    def _settings(self) -> GaussNewton:
        assert isinstance(self.job.settings, GaussNewton)
        return self.job.settings

    def _arguments(self, candidate: Candidate, batch: Samples, alive: int) -> dict[str, Any]:
        """Of a rollout that is one of ``alive`` whose graphs share the memory for them; 0: it is not differentiated.

        Of several processes none may leave alone, so that what diverges is noticed when their numbers are gathered.
        """
        table, room = candidate.table(batch), self.job.room
        graphs = budget_bytes(room.graphs, batch.noise.device)
        return {
            "model": batch.denoiser(None if self.job.draws.world == 1 else False),
            "x": batch.noise,
            "weights": table.weights,
            "times": table.times,
            "both": table.both,
            "memory_budget": graphs // alive if graphs is not None and alive else None,
            "wrt": ("weights", "times") if alive else (),
        }

    def _signs(self, n: int, number: int, k: int, width: int) -> Tensor:
        """(B, R) random bits for the samples of batch k; the same for any number of processes."""
        draws = self.job.draws
        generator = torch.Generator().manual_seed(mix(draws.seed, "sketch", n, number, k))
        signs = torch.randint(0, 2, (self.train.sizes[k], width), generator=generator, dtype=torch.int8)
        return signs[draws.rank :: draws.world]

    def _keeps(self, num_steps: int, samples: int) -> bool:
        """Whether the states and histories of so many samples may stay in memory together."""
        draws = self.job.draws
        largest = max(math.prod(target.shape or ()) for target in draws.targets)
        numbers = (2 * num_steps + 1) * largest * samples / draws.world
        return numbers * draws.target.dtype.itemsize <= self.job.room.kept


def enough(sizes: Sequence[int], wanted: int) -> int:
    """How many batches hold that many samples."""
    total, k = 0, 0
    while total < wanted and k < len(sizes):
        total, k = total + sizes[k], k + 1
    return k


def within(sizes: Sequence[int], most: float, targets: int) -> int:
    """How many batches hold at most so many samples: all, or as many of each target."""
    counts: list[int] = [*range(0, len(sizes), targets), len(sizes)]
    return [k for k in counts if not k or sum(sizes[:k]) <= most][-1]


def _sketches(k: int, candidate: Candidate, number: int, batches: int) -> bool:
    """Whether a batch of a round takes part in the sketch."""
    targets = len(candidate.units)
    return (k // targets + number) % SKETCHED == 0 or batches < SKETCHED * targets


def _weight(number: int) -> float:
    """Of the inner states' squares in a round."""
    return TRAJECTORY_WEIGHT * ANNEAL[max(0, min(number, len(ANNEAL) - 1))]
