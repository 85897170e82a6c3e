"""The default search: the best table there is already, then Gauss-Newton from it.

A round of stage 2 is planned (how many samples the budget pays for), tried (the candidate's rollouts, which are also
its acceptance test), and accepted, with a backward and the next candidate, or rejected, with a shorter step.

The first rounds follow the teacher's whole trajectory, the last ones little more than its end. The end point alone
leads Gauss-Newton to the nearest of many minima, and hides in a few samples what the states in the middle show in
all: after 40,000 evaluations on the mixture this leaves .56 and .78 of the best hand-made error at N = 8 and 10; rows
fitted in closed form over twelve spacings, and then the end point alone, left .83 and .96.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..distance import CRITERIA, criterion, squares
from ..names import find_solver
from ..solver import Solver
from ..table import StepTable
from ..target import Samples
from ..unroll import Rollout
from .draws import Draws, mix
from .gauss_newton import Quadratic, Sums, robust, signs_beside
from .ledger import Ledger
from .objective import Loss, Residual, residual
from .point import RACE, Point
from .settings import check_counts, graph_memory
from .space import SPACES, Space
from .starts import Start, candidates, ranked
from .teacher import Teacher

ANNEAL = (30, 10, 5, 3, 2, 1)  # times trajectory_weight, round by round
GROWTH = (0.12, 0.12, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.0)  # share of the samples in each round; then all of them
BATCHES = 8  # of each target's samples at least, of LEAST or more: a round of few samples must be one of few calls
LEAST = 12  # samples of a round, of a set that has so many
FEW = 40  # samples of which none are held out: eight of them choose worse than the loss does
SLACK = 1.25  # of the rounds' cost, for those that are rejected
START_SHARE = 0.1  # of the budget, to find where to start
LOOKS = 4  # at the held-out samples, that the plan counts on
RACERS = 3  # tables of different spacings at most to start from; after RACE rounds the best goes on (``Point.raced``)
SKETCHED = 2  # every so many batches a sketch
PAPER_SHARE = 1 / 50  # default budget, of the paper's 50,000 samples x (100 + 3 N)


@dataclass(frozen=True)
class TwoStage:
    """Settings of  min over theta  mean_b rho(|r_b|^2),  rho(z) = c log(1 + z / c),  c = ``robust`` medians of z

    space: ``"plain"``, the paper's; ``"noise"``, with weights on the initial noise; ``"noise+start"``, with the time of
        the first call too; ``"noise+times"``, with that of each call, which errs less on this model and more on
        another; see ``Space``.
    loss: what r is: ``"trajectory"``: x_N - teacher(1), and sqrt(w) times the differences of x_1..x_{N-1} where the
        network sees them, w from 30 to 1 times trajectory_weight in the first six rounds. ``"end"``: w = 0. A
        function: feature(x_N) - feature(teacher(1)).
    select: what the choice among accepted tables makes small on held-out samples: ``"robust"``, rho of the end
        point's squares, or a criterion of ``distance``: ``"rmse"``, ``"median"``, ``"features"``.
    samples: of the training set; by default what the budget allows. held_out_samples: a fifth of them, none below 40.
    batch_size: samples run at a time, at most; an eighth of the set, so that early rounds can be small.
    teacher_evaluations: model calls of each reference trajectory; by default 16 for fewer than 64 samples, or 24, and
        at least 2 N. rounds: of Gauss-Newton at most. tolerance: stop a solver whose predicted relative gain is below.
    memory: bytes of trajectories kept, and of rollouts between a round's acceptance test and its backward
        (beyond that they run again, N evaluations more per sample). memory_budget: of the graphs of the
        rollouts kept, see ``unroll``; by default 512 MB, on a GPU half of its free memory.

    A round costs N evaluations per sample for the candidate, which is also its acceptance test, and, once
    accepted, 2 N per backward. All N share the teacher; each starts from the best of the hand-made and published
    tables, those on the spacing found for the N before among them; from 40 samples on from up to three on different
    spacings, of which the best goes on after three rounds (below 40 the race costs more than it brings).
    """

    space: str = "noise+start"
    samples: int | None = None
    batch_size: int = 64
    held_out_samples: int | None = None
    teacher_evaluations: int | None = None
    rounds: int = 12
    robust: float = 10.0  # medians of |r|^2 at which a sample counts half
    loss: Loss = "trajectory"
    trajectory_weight: float = 0.1
    select: str = "robust"
    tolerance: float = 1e-3
    memory: int = 1 << 29
    memory_budget: int | float | None = None
    name: ClassVar = "two_stage"

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space={self.space!r}: choose {', '.join(SPACES)}")
        if isinstance(self.loss, str) and self.loss not in ("end", "trajectory"):
            raise ValueError(f"loss={self.loss!r}: 'end', 'trajectory' or a function of samples")
        if self.select not in ("robust", *CRITERIA):
            raise ValueError(f"select={self.select!r}: choose 'robust', {', '.join(map(repr, CRITERIA))}")
        check_counts(self, "samples", "batch_size")
        check_counts(self, "rounds", "memory", "held_out_samples", least=0)
        check_counts(self, "teacher_evaluations", least=16)
        for name in ("robust", "trajectory_weight", "tolerance"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value >= 0) or (name == "robust" and value == 0):
                raise ValueError(f"{name}={value!r}: give a number above 0")

    def budget(self, steps: tuple[int, ...]) -> int:
        """The evaluations spent when the user sets no limit: a fiftieth of the paper's, 1000 (100 + 3 N) for each N."""
        return int(sum(50_000 * (100 + 3 * n) for n in steps) * PAPER_SHARE)

    def run(
        self,
        draws: Draws,
        ledger: Ledger,
        steps: tuple[int, ...],
        *,
        initial: str | Solver | None = None,
        cache: Path | None = None,
        state: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The events of a search, see ``runs``."""
        schedule = draws.schedule
        assert ledger.budget is not None
        start = {n: _initial(Space(self.space, schedule, n), initial) for n in steps}
        state = (
            {"sizes": self.sizes(draws, ledger.budget, steps), "first": {}, "points": {}} if state is None else state
        )
        samples, held_out_samples, calls = state["sizes"]
        targets = len(draws.each)
        points = {n: [Point.load(saved, schedule) for saved in racers] for n, racers in state["points"].items()}
        first: dict[int, Solver] = {n: start[n] for n in steps if initial is not None} | dict(state["first"])
        each = -(-samples // targets)
        batch = max(-(-each // BATCHES), min(LEAST, -(-each // 2)))
        train, held_out = (
            Teacher(draws, ledger, stream, count, size, budget=calls, cache=cache, memory=self.memory)
            for stream, count, size in (
                ("train", samples, max(draws.world, min(self.batch_size, batch))),
                ("held_out", held_out_samples, max(1, min(self.batch_size, -(-held_out_samples // targets)))),
            )
        )

        stage = Stage(self, draws, ledger, train, held_out)

        def event(stage: str, *, saved: bool = True, **values: Any) -> dict[str, Any]:
            found = {n: racers[0].solver() for n, racers in points.items()}
            kept = {"first": dict(first), "points": {n: [point.save() for point in points[n]] for n in points}}
            return {
                "stage": stage,
                "done": ledger.evaluations,
                "total": ledger.budget,
                "complete": len(points) == len(steps)
                and all(point.finished for racers in points.values() for point in racers),
                "solvers": {n: found.get(n) or first.get(n, start[n]) for n in steps},
                "state": {"sizes": state["sizes"], **kept} if saved else None,
                "samples": samples,
                **values,
            }

        if not (state["first"] or points):
            cost = train.cost() + held_out.cost()
            if ledger.evaluations + cost > ledger.budget:
                raise ValueError(
                    f"budget={ledger.budget!r}: the teacher's {samples + held_out_samples} trajectories alone take "
                    f"{cost}; give a larger budget or fewer samples"
                )
            yield event("teacher", saved=False)
        for teacher in (held_out, train):
            for k in range(len(teacher)):
                before = ledger.evaluations
                _ = teacher[k]
                if ledger.evaluations > before:  # a resumed search only reads it again
                    yield event("teacher", saved=False)

        for n in steps:
            if n not in points:
                limit = min(ledger.budget * START_SHARE * n / sum(steps), ledger.budget - ledger.evaluations)
                done = {k: points[k][0].solver() or first[k] for k in points}
                tables = [first[n]] if n in first else candidates(schedule, n, done)
                starts = ranked(draws, ledger, train, tables, int(limit))
                starts = of_different_spacings(starts)[: racers_of(samples)]
                units, space = starts[0].units, Space(self.space, schedule, n)
                share = (ledger.budget - ledger.evaluations) * n / sum(steps[steps.index(n) :])
                points[n] = [Point(space, space.theta(s.solver), share=share, units=units) for s in starts]
                if n not in first:
                    first[n] = starts[0].solver
                    yield event("start", num_steps=n, start=first[n].name, starts=[s.solver.name for s in starts])
            while not all(point.finished for point in points[n]):
                racing = len(points[n]) > 1
                k = next(k for k, point in enumerate(points[n]) if not (point.raced if racing else point.finished))
                before, point = ledger.evaluations, points[n][k]
                values: dict[str, Any] = {}
                if point.theta is None and point.best is None and stage.affords_look(point):
                    point, rmse = stage.check(point, point.candidate)
                    values = {"held_out": {n: rmse}}
                batches = stage.plan(point)
                trial = stage.attempt(point, batches) if batches else None
                look = False
                if not batches:
                    point, look = point.ended(), True
                elif trial is None or not stage.improves(point, trial):
                    point = point.rejected()
                    point = point.renewed() if point.finished and point.round < len(ANNEAL) else point
                    values = {"accepted": False, "damping": point.damping}
                else:
                    point, told = stage.accept(point, trial, stage.differentiate(point, trial))
                    values, look = {**values, **told}, len(ANNEAL) < point.round
                if look and point.theta is not None and stage.affords_look(point):
                    point, rmse = stage.check(point, point.theta)
                    values = {**values, "held_out": {n: rmse}}
                points[n][k] = replace(point, spent=point.spent + ledger.evaluations - before)
                if racing and all(point.raced for point in points[n]):
                    points[n] = [stage.winner(points[n])]
                yield event("gauss-newton", num_steps=n, **values)

    def sizes(self, draws: Draws, budget: int, steps: tuple[int, ...]) -> list[int]:
        """Training and held-out samples and the teacher's calls that the budget pays for when no round is rejected."""

        def held_out(samples: int) -> int:
            if self.held_out_samples is not None:
                return self.held_out_samples
            return 0 if samples < FEW else max(draws.world, min(256, samples // 5))

        def calls(samples: int) -> int:
            return self.teacher_evaluations or max(16 if samples < 64 else 24, 2 * max(steps))

        def cost(samples: int) -> int:
            planned = min(len(GROWTH), self.rounds, 6 + samples // 8)
            shares = GROWTH[:planned] + (racers_of(samples) - 1) * GROWTH[:RACE]
            rounds = SLACK * sum(max(share, min(1.0, LEAST / samples)) for share in shares)
            each = calls(samples) + sum(steps) * (1 + 4 * rounds)
            looks = held_out(samples) * (calls(samples) + sum(steps) * LOOKS)
            return math.ceil(samples * each + looks + START_SHARE * budget)

        least = max(2, draws.world) * len(draws.each)
        samples = self.samples
        if samples is None:
            samples = max(least, bisect_right(range(1, 1 << 20), budget, key=cost))
        return [samples, held_out(samples), calls(samples)]


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
    """Stage 2 of one number of steps: what a round needs."""

    settings: TwoStage
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
        known = [(point.values, point) for point in racers if point.values is not None]
        common = min((len(values) for values, _ in known), default=0)
        scale = min((point.scale for _, point in known), default=1.0)
        losses = [(robust(values[:common], scale), k) for k, (values, _) in enumerate(known)]
        best = known[min(losses)[1]][1] if known else racers[0]
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
                unit = point.units[k % len(point.units)]
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
        scale, loss = self._scale(trial), loss.remembering(point.loss)
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
                unit = point.units[k % len(point.units)]
                rollout = Rollout(batch.denoiser(None), batch.noise, *self._table(space, theta, batch), wrt=())
                runs.append(batch)
                ends.append(squares(rollout.states[:, -1], trajectory.last) / unit)
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
        return point.checked(theta, loss, scale), math.sqrt(float(errors.mean()))

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
        """The robust loss of the accepted table and of the trial, on the samples they share."""
        assert point.values is not None
        common = min(len(point.values), len(trial.values))
        return robust(point.values[:common], point.scale), robust(trial.before[:common], point.scale)

    def _affords(self, point: Point, cost: int) -> bool:
        return self.ledger.affords(cost) and point.spent + cost <= point.share

    def _keeps(self, num_steps: int, samples: int) -> bool:
        """Whether the states and histories of so many samples may stay in memory together."""
        largest = max(math.prod(one.target.shape or ()) for one in self.draws.each)
        numbers = (2 * num_steps + 1) * largest * samples / self.draws.world
        return numbers * self.draws.target.dtype.itemsize <= self.settings.memory

    def _graphs(self, shared_by: int) -> int | float | None:
        """The memory for graphs of one rollout of ``shared_by`` alive at a time; 0: none is differentiated."""
        budget = graph_memory(self.settings.memory_budget, self.draws.device)
        return type(budget)(budget / shared_by) if shared_by else None


def racers_of(samples: int) -> int:
    """From how many tables at most a search with so many samples starts."""
    return RACERS if samples >= FEW else 1


def of_different_spacings(starts: Sequence[Start]) -> list[Start]:
    """The first start on each spacing."""
    known: dict[tuple[float, ...], Start] = {}
    for start in starts:
        known.setdefault(start.solver.timesteps, start)
    return list(known.values())


def enough(sizes: list[int], wanted: int) -> int:
    """How many batches hold that many samples."""
    total, k = 0, 0
    while total < wanted and k < len(sizes):
        total, k = total + sizes[k], k + 1
    return k


def _initial(space: Space, initial: str | Solver | None) -> Solver:
    """The table to start from. Raises ValueError naming one that the search for N steps in this space cannot hold."""
    n = space.num_steps
    solver = find_solver(initial or "euler", space.schedule, n)
    if solver.num_steps != n:
        raise ValueError(f"initial: {solver.label} has {solver.num_steps} steps; the search is for {n}")
    solver.on(space.schedule)
    space.theta(solver)
    return solver
