"""Stage: the rounds of Gauss-Newton at one number of steps.

A round is planned (how many samples the budget pays for), tried (the candidate's rollouts, which are also its
acceptance test), and accepted, with a backward and the next candidate, or rejected, with a shorter step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distance import criterion, squares
from ..draws import Draws, mix
from ..table import StepTable
from ..target import Samples
from ..unroll import Rollout
from .gauss_newton import Quadratic, Sums, robust, signs_beside
from .ledger import Ledger
from .objective import Residual, residual
from .point import Point
from .settings import graph_memory
from .space import Space
from .teacher import Teacher

if TYPE_CHECKING:
    from .two_stage import GaussNewton

ANNEAL = (30, 10, 5, 3, 2, 1)  # times trajectory_weight, round by round
GROWTH = (0.12, 0.12, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.0)  # share of the samples in each round; then all of them
LEAST = 12  # samples of a round, of a set that has so many
SKETCHED = 2  # every so many batches a sketch


@dataclass(frozen=True, eq=False)
class Run:
    """One batch of a trial. rollout: None where it did not fit beside the others and must run again. residual: under
    the weight of the round to come."""

    batch: Samples
    rollout: Rollout | None
    residual: Residual


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate's runs, and of all samples of all processes, (n,) float64 means of squares: |r|^2 before and
    after the round, whose weights differ, and the end point's errors."""

    runs: list[Run]
    before: Tensor
    values: Tensor
    errors: Tensor


@dataclass(frozen=True)
class Stage:
    """What a round needs."""

    settings: GaussNewton
    draws: Draws
    ledger: Ledger
    train: Teacher
    held_out: Teacher

    def plan(self, point: Point) -> int:
        """How many batches the next round takes; 0: none, the search for this N is over."""
        settings, sizes = self.settings, self.train.sizes
        growing = GROWTH[point.round] if point.round < len(GROWTH) else 1.0
        targets = len(point.units)  # which take turns: each has its part in every round
        batches = enough(sizes, max(LEAST * targets, math.ceil(growing * sum(sizes))))
        batches = min(-(-batches // targets) * targets, len(sizes))
        n = point.space.num_steps
        looks = n * sum(self.held_out.sizes)

        def cost(batches: int) -> int:
            """Of the candidate, and of its differentiation once accepted."""
            size = sum(sizes[:batches])
            sketched = sum(sizes[k] for k in range(batches) if self._sketches(k, point, batches))
            return n * (size * (3 if self._keeps(n, size) else 4) + 2 * sketched)

        while batches > targets and not self._affords(point, cost(batches) + looks):
            batches -= targets
        size, known = sum(sizes[:batches]), 0 if point.values is None else len(point.values)
        over = point.round >= settings.rounds or size < 0.4 * known
        return 0 if over or not self._affords(point, cost(batches) + looks) else batches

    def winner(self, racers: list[Point]) -> Point:
        """The racer of least loss on the samples that all have seen, which goes on with what all have spent."""
        known = [(p, p.values, p.charge(p.theta)) for p in racers if p.values is not None and p.theta is not None]
        common = min((len(values) for _, values, _ in known), default=0)
        scale = min((p.scale for p, _, _ in known), default=1.0)
        losses = [(robust(values[:common], scale) + charge, k) for k, (_, values, charge) in enumerate(known)]
        best = known[min(losses)[1]][0] if known else racers[0]
        return replace(best, spent=sum(point.spent for point in racers))

    def attempt(self, point: Point, batches: int) -> Trial | None:
        """The candidate's rollouts; None when they leave the numbers, a step too far.

        Raises FloatingPointError when the table to start from does: then the model is broken.
        """
        n, theta, runs, before = point.space.num_steps, point.candidate, [], []
        size = sum(self.train.sizes[:batches])
        old, new = self._weight(point.round - 1), self._weight(point.round)
        try:
            for k in range(batches):
                batch, trajectory = self.train[k]
                kept = self._keeps(n, batches * batch.size)
                rollout = Rollout(
                    batch.denoiser(None), batch.noise, *self._table(point.space, theta, batch),
                    memory_budget=self._graphs(batches if kept else 0), wrt=("weights", "times") if kept else (),
                )  # fmt: skip
                targets = point.space.targets(theta)
                unit = point.unit(k)
                found = residual(self.settings.loss, new, rollout.states, trajectory, targets).over(unit)
                runs.append(Run(batch, rollout if kept else None, found))
                past = found
                if old != new:
                    past = residual(self.settings.loss, old, rollout.states, trajectory, targets).over(unit)
                before.append(past.values.double().square().mean(1).cpu())
            values = [run.residual.values.double().square().mean(1).cpu() for run in runs]
            errors = [run.residual.error.cpu() for run in runs]
            whole = self._gathered([run.batch for run in runs], size, before, values, errors)
        except FloatingPointError:
            if point.theta is None:
                raise
            self.ledger.spend(n * size)
            return None
        self.ledger.spend(n * size)
        return Trial(runs, *whole)

    def improves(self, point: Point, trial: Trial) -> bool:
        """Whether the candidate's loss is below the accepted table's on the samples they share."""
        if point.values is None:
            return True
        old, new = self._losses(point, trial)
        return new < old

    def accept(self, point: Point, trial: Trial, loss: Quadratic) -> tuple[Point, dict[str, Any]]:
        """The candidate as the accepted table, the quadratic around it and the next candidate; and what to log."""
        settings, n = self.settings, point.space.num_steps
        if point.values is not None:
            old, new = self._losses(point, trial)
            point = point.damped_less() if old - new > 0.5 * point.predicted else point
        scale = self._scale(trial)
        if point.theta is None:
            point = replace(point, price=settings.generality * robust(trial.values, scale))
        loss = point.charged(loss).remembering(point.loss)
        point = replace(point, tries=0, theta=point.candidate, values=trial.values, scale=scale, loss=loss)
        point = replace(point, round=point.round + 1).stepped()
        gain = point.predicted / max(robust(trial.values, scale), 1e-300)
        point = replace(point, small=point.small + 1 if gain < settings.tolerance else 0)
        if point.small > 1 and point.round >= len(GROWTH):
            point = replace(point, round=settings.rounds)
        values = {"loss": {n: math.sqrt(float(trial.errors.mean()))}, "accepted": True, "damping": point.damping}
        if not sum(self.held_out.sizes):
            point = replace(point, best=point.theta)
        return point, {**values, "gain": gain, "used": len(trial.values)}

    @torch.no_grad()
    def check(self, point: Point, theta: Tensor) -> tuple[Point, float]:
        """The point after a look at theta on held-out samples, which choose the best; and the end point's RMSE."""
        space, n, total, select = point.space, point.space.num_steps, sum(self.held_out.sizes), self.settings.select
        runs, ends, seen = [], [], []
        try:
            for k, (batch, trajectory) in enumerate(self.held_out):
                rollout = Rollout(batch.denoiser(None), batch.noise, *self._table(space, theta, batch), wrt=())
                runs.append(batch)
                ends.append(squares(rollout.states[:, -1], trajectory.last) / point.unit(k))
                features = batch.target.features if select == "features" else None
                if features is not None:
                    seen.append(squares(features(rollout.states[:, -1]), features(trajectory.last)))
            errors, *more = self._gathered(runs, total, ends, *([seen] if seen else []))
        except FloatingPointError:
            errors, more = torch.full((total,), math.inf, dtype=torch.float64), []
        self.ledger.spend(n * total)
        scale = point.held_out_scale or self.settings.robust * float(errors.median())
        loss = math.inf
        if bool(errors.isfinite().all()):
            loss = robust(errors, scale) if select == "robust" else criterion(select, errors, *more)
        return point.checked(theta, loss, scale, charged=select == "robust"), math.sqrt(float(errors.mean()))

    def differentiate(self, point: Point, trial: Trial) -> Quadratic:
        """Gradient and J'J at the candidate. Lets each rollout go as soon as it was pulled back."""
        space, theta, limit = point.space, point.candidate, self._scale(trial)
        n, start, sums, jacobian = space.num_steps, 0, Sums(len(theta)), space.jacobian(theta)
        runs, trial_count = trial.runs, len(trial.runs)
        for k in range(trial_count):
            batch, rollout, found = runs[k].batch, runs[k].rollout, runs[k].residual
            values = trial.values[self.draws.mine(start, batch.size), None]
            cotangents = [found.values]
            if self._sketches(k, point, trial_count):
                cotangents.append(self._signs(found.values, n, point.round, k, batch.size))
            scale = found.values.shape[1] ** -0.5  # |r|^2 is averaged over its elements
            if rollout is None:  # all of them together did not fit
                rollout = Rollout(
                    batch.denoiser(None), batch.noise, *self._table(space, theta, batch),
                    memory_budget=self._graphs(1), wrt=("weights", "times"),
                )  # fmt: skip
                self.ledger.spend(n * batch.size)
            scaled = torch.stack(cotangents) * scale
            pulled = rollout.pull(found.back(scaled))
            assert pulled.weights is not None and pulled.times is not None
            flat = torch.cat([pulled.weights.flatten(2), pulled.times], 2).double().cpu()
            rows = flat @ jacobian[: flat.shape[2]]
            if found.moves is not None:
                rows = rows + found.moves(scaled, self.train[k][1]) @ jacobian[flat.shape[2] : -1]
            runs[k] = replace(runs[k], rollout=None)
            del rollout, pulled, flat
            sums.add(rows, values, limit / (limit + values), scale, batch.size)
            self.ledger.spend(2 * n * batch.size * len(cotangents))
            start += batch.size
        return sums.quadratic(self.draws.all_reduce)

    def affords_look(self, point: Point) -> bool:
        """Whether there are held-out samples and the budget allows one more look at them."""
        total = sum(self.held_out.sizes)
        return total > 0 and self._affords(point, point.space.num_steps * total)

    def _scale(self, trial: Trial) -> float:
        """The square at which a sample counts half: ``robust`` medians."""
        return float(self.settings.robust * trial.values.median())

    def _table(self, space: Space, theta: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        """weights and times of a table for a batch."""
        table: StepTable = space.table(theta, batch.guidance).to(batch.noise.device, batch.noise.dtype)
        return table.weights, table.times

    def _sketches(self, k: int, point: Point, batches: int) -> bool:
        """Whether a batch of a round takes part in the sketch."""
        targets = len(point.units)
        return (k // targets + point.round) % SKETCHED == 0 or batches < SKETCHED * targets

    def _weight(self, number: int) -> float:
        """Of the inner states' squares in a round."""
        return self.settings.trajectory_weight * ANNEAL[max(0, min(number, len(ANNEAL) - 1))]

    def _signs(self, values: Tensor, n: int, number: int, k: int, size: int) -> Tensor:
        """(B, R) random signs beside the residual; the same for any number of processes."""
        generator = torch.Generator().manual_seed(mix(self.draws.seed, "sketch", n, number, k))
        signs = torch.randint(0, 2, (size, values.shape[1]), generator=generator, dtype=torch.int8)
        return signs_beside(values, signs[self.draws.rank :: self.draws.world].to(values) * 2 - 1)

    def _gathered(self, batches: Sequence[Samples], size: int, *parts: list[Tensor]) -> list[Tensor]:
        """Each list of numbers per sample, batch by batch, as one (size,) float64 over all processes.

        Raises FloatingPointError when one is none: a GPU is asked here, once a round, and not at every call.
        """
        whole, start = torch.zeros(len(parts), size, dtype=torch.float64), 0
        for k, batch in enumerate(batches):
            here = self.draws.mine(start, batch.size)
            for row, part in zip(whole, parts, strict=True):
                row[here] = part[k]
            start += batch.size
        self.draws.all_reduce(whole)
        if not bool(whole.isfinite().all()):
            raise FloatingPointError("the model returned NaN or Inf along a rollout")
        return list(whole)

    def _losses(self, point: Point, trial: Trial) -> tuple[float, float]:
        """The loss of the accepted table and of the trial: robust on the samples they share, and the charge."""
        assert point.values is not None and point.theta is not None
        common = min(len(point.values), len(trial.values))
        old, new = robust(point.values[:common], point.scale), robust(trial.before[:common], point.scale)
        return old + point.charge(point.theta), new + point.charge(point.candidate)

    def _affords(self, point: Point, cost: int) -> bool:
        return self.ledger.affords(cost) and point.spent + cost <= point.share

    def _keeps(self, num_steps: int, samples: int) -> bool:
        """Whether the states and histories of so many samples may stay in memory together."""
        largest = max(math.prod(target.shape or ()) for target in self.draws.targets)
        numbers = (2 * num_steps + 1) * largest * samples / self.draws.world
        return numbers * self.draws.target.dtype.itemsize <= self.settings.memory

    def _graphs(self, shared_by: int) -> int | float | None:
        """The memory for graphs of one rollout of ``shared_by`` alive at a time; 0: none is differentiated."""
        budget = graph_memory(self.settings.memory_budget, self.draws.device)
        return type(budget)(budget / shared_by) if shared_by else None


def enough(sizes: list[int], wanted: int) -> int:
    """How many batches hold that many samples."""
    total, k = 0, 0
    while total < wanted and k < len(sizes):
        total, k = total + sizes[k], k + 1
    return k
