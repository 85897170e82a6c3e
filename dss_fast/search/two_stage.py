"""The default search: a teacher, rows in closed form over a family of spacings, then Gauss-Newton on the end point.

A round of stage 2 is planned (how many samples the budget pays for), tried (the candidate's rollouts, which are also
its acceptance test), and accepted, with a backward and the next candidate, or rejected, with a shorter step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..names import find_solver
from ..schedule import Schedule
from ..solver import Solver
from ..table import StepTable
from ..target import Samples
from ..unroll import Rollout
from .closed_form import fit, starts
from .draws import Draws, mix
from .gauss_newton import Quadratic, Sums, robust, signs_beside
from .ledger import Ledger
from .objective import Loss, Residual, residual
from .point import Point
from .settings import check_counts, graph_memory
from .space import SPACES, Space
from .teacher import Teacher

GROWTH = (0.12, 0.12, 0.2, 0.3, 0.4, 0.5, 0.7)  # share of the samples in each round; then all of them
FULL_ROUNDS = 2
SKETCHED = 2  # every so many batches a sketch
PAPER_SHARE = 1 / 50  # default budget, of the paper's 50,000 samples x (100 + 3 N)


@dataclass(frozen=True)
class TwoStage:
    """Settings of  min over theta  mean_b rho(|r_b|^2),  rho(z) = c log(1 + z / c),  c = ``robust`` medians of z

    loss: what r is: ``"end"``: x_N - teacher(1). ``"trajectory"``: that, and sqrt(trajectory_weight) times the
        differences of x_1..x_{N-1} where the network sees them. A function: feature(x_N) - feature(teacher(1)).
    space: ``"plain"``, the paper's, or with free rows (``"rows"``), a weight on the initial noise (``"rows+noise"``),
        network times of their own (``"rows+times"``), or all (``"full"``); see ``Space``.
    samples: of the training set; by default what the budget allows. held_out_samples: a fifth of them.
    batch_size: samples run at a time.
    teacher_evaluations: model calls of each reference trajectory. trials: spacings tried in stage 1, on
        trial_samples of the samples. rounds: of Gauss-Newton. tolerance: stop a solver whose predicted
        relative gain is below.
    memory: bytes of trajectories kept, and of rollouts between a round's acceptance test and its backward
        (beyond that they run again, N evaluations more per sample). memory_budget: of the graphs of the
        rollouts kept, see ``unroll``; by default 512 MB, on a GPU half of its free memory.

    A round costs N evaluations per sample for the candidate, which is also its acceptance test, and, once
    accepted, 2 N per backward. All N share the teacher; stage 1 of one N starts from the spacing of the last.
    """

    space: str = "full"
    samples: int | None = None
    batch_size: int = 64
    held_out_samples: int | None = None
    teacher_evaluations: int = 24
    trials: int = 12
    trial_samples: int = 96
    rounds: int = len(GROWTH) + FULL_ROUNDS
    robust: float = 10.0  # medians of |r|^2 at which a sample counts half
    loss: Loss = "end"
    trajectory_weight: float = 0.1
    tolerance: float = 1e-3
    memory: int = 1 << 29
    memory_budget: int | float | None = None
    name: ClassVar = "two_stage"

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space={self.space!r}: choose {', '.join(SPACES)}")
        if isinstance(self.loss, str) and self.loss not in ("end", "trajectory"):
            raise ValueError(f"loss={self.loss!r}: 'end', 'trajectory' or a function of samples")
        check_counts(self, "samples", "batch_size", "held_out_samples", "trials", "trial_samples")
        check_counts(self, "rounds", "memory", least=0)
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
        schedule = draws.target.schedule
        assert schedule is not None and ledger.budget is not None
        start = {n: _initial(self.space, schedule, initial, n) for n in steps}
        state = (
            {"sizes": self._sizes(draws, ledger.budget, steps), "first": {}, "points": {}} if state is None else state
        )
        samples, held_out_samples = state["sizes"]
        points = {n: Point.load(saved, schedule) for n, saved in state["points"].items()}
        first: dict[int, Solver] = {n: start[n] for n in steps if initial is not None} | dict(state["first"])
        batch_size = min(self.batch_size, samples)
        train, held_out = (
            Teacher(
                draws, ledger, stream, count, size, budget=self.teacher_evaluations, cache=cache, memory=self.memory
            )
            for stream, count, size in (
                ("train", samples, batch_size),
                ("held_out", held_out_samples, min(batch_size, held_out_samples)),
            )
        )

        def event(stage: str, *, saved: bool = True, **values: Any) -> dict[str, Any]:
            found = {n: point.solver() for n, point in points.items()}
            kept = {"first": dict(first), "points": {n: point.save() for n, point in points.items()}}
            return {
                "stage": stage,
                "done": ledger.evaluations,
                "total": ledger.budget,
                "complete": len(points) == len(steps) and all(point.finished for point in points.values()),
                "solvers": {n: found.get(n) or first.get(n, start[n]) for n in steps},
                "state": {"sizes": [samples, held_out_samples], **kept} if saved else None,
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

        freedom: dict[str, Any] = {"free_rows": "rows" in SPACES[self.space], "noise": "noise" in SPACES[self.space]}
        few = enough(train.sizes, min(self.trial_samples, samples))
        count = sum(train.sizes[:few])
        data = [train[k] for k in range(few)] if any(n not in first for n in steps) else []
        for n in steps:
            if n in first:
                continue
            trials = max(1, min(self.trials, int((ledger.budget - ledger.evaluations) * 0.3 // (n * count))))
            spacings, scale = starts(schedule, n, first, trials), None
            for name, u in spacings:
                found, scale = fit(draws, data, u, scale=scale, name=name, **freedom)
                ledger.spend(n * count)
                spacings.tell(found)
                assert spacings.best is not None
                first[n] = spacings.best.solver
                yield event("closed form", saved=False, spacing=name, score=found.score)
            best = spacings.best
            assert best is not None
            more = enough(train.sizes, 4 * count)
            cost = n * sum(train.sizes[:more])
            if more > few and ledger.affords(2 * cost):
                u = torch.tensor(best.solver.timesteps, dtype=torch.float64)
                again, _ = fit(draws, (train[k] for k in range(more)), u, name=best.spacing, **freedom)
                ledger.spend(cost)
                first[n] = again.solver
            yield event("closed form", spacing=best.spacing)
        del data

        for n in steps:
            if n not in points:
                space = Space(self.space, schedule, first[n].timesteps)
                share = (ledger.budget - ledger.evaluations) * n / sum(steps[steps.index(n) :])
                points[n] = Point(space, candidate=space.theta(first[n]), share=share)
            stage = Stage(self, draws, ledger, train, held_out)
            while not points[n].finished:
                before, point = ledger.evaluations, points[n]
                values: dict[str, Any] = {}
                batches = stage.plan(point)
                trial = stage.attempt(point, batches) if batches else None
                look = None
                if not batches:
                    point = point.ended()
                    look = point.candidate if stage.affords_look(point) else None
                elif trial is None or not stage.improves(point, trial):
                    point = point.rejected()
                    values = {"accepted": False, "damping": point.damping}
                else:
                    point, values = stage.accept(point, trial, stage.differentiate(point, trial))
                    look = point.theta if point.round in (1, *range(4, self.rounds + 1)) else None
                if look is not None:
                    point, rmse = stage.check(point, look)
                    values = {**values, "held_out": {n: rmse}}
                points[n] = replace(point, spent=point.spent + ledger.evaluations - before)
                yield event("gauss-newton", num_steps=n, **values)

    def _sizes(self, draws: Draws, budget: int, steps: tuple[int, ...]) -> list[int]:
        """Training and held-out samples that the budget pays for when all goes well: no rejected round."""
        per_round = sum(GROWTH[: self.rounds]) + max(0, self.rounds - len(GROWTH))
        longest = max(steps)
        stage_one = self.trial_samples * (self.trials * longest + 6 * (sum(steps) - longest))
        each = self.teacher_evaluations + sum(n * (4 * per_round + 0.5) for n in steps)
        looks = self.teacher_evaluations + sum(steps) * (self.rounds - 1)
        samples, held_out = self.samples, self.held_out_samples
        if samples is None:
            samples = int((budget - stage_one) / (each + (looks / 5 if held_out is None else 0)))
            samples = max(16, samples // 16 * 16, draws.world)
        if held_out is None:
            held_out = max(16, min(256, samples // 5 // 16 * 16), draws.world)
        return [samples, held_out]


@dataclass(frozen=True, eq=False)
class Run:
    """One batch of a trial. rollout: None where it did not fit beside the others and must run again."""

    batch: Samples
    rollout: Rollout | None
    residual: Residual


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate's runs; values |r|^2 and errors, (n,) float64 means of squares, of all samples of all processes."""

    runs: list[Run]
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
        growing = GROWTH[point.round] if settings.rounds > len(GROWTH) > point.round else 1.0
        batches = enough(sizes, math.ceil(growing * sum(sizes)))
        size, n = sum(sizes[:batches]), point.space.num_steps
        looks = 2 * n * sum(self.held_out.sizes)
        cost = n * (4 if self._keeps(n, size) else 5)
        while batches > 1 and not self._affords(point, cost * size + looks):
            batches -= 1
            size -= sizes[batches]
        known = 0 if point.values is None else len(point.values)
        over = point.round >= settings.rounds or not self._affords(point, cost * size + looks) or size < 0.4 * known
        return 0 if over else batches

    def attempt(self, point: Point, batches: int) -> Trial | None:
        """The candidate's rollouts; None when they leave the numbers, a step too far.

        Raises FloatingPointError when the table to start from does: then the model is broken.
        """
        n, theta, runs = point.space.num_steps, point.candidate, []
        size = sum(self.train.sizes[:batches])
        try:
            for k in range(batches):
                batch, trajectory = self.train[k]
                kept = self._keeps(n, batches * batch.size)
                rollout = Rollout(
                    batch.denoiser(None), batch.noise, *self._table(point.space, theta, batch),
                    memory_budget=self._graphs(batches if kept else 0), wrt=("weights", "times") if kept else (),
                )  # fmt: skip
                found = self._residual(rollout.states, trajectory, point.space.targets(theta))
                runs.append(Run(batch, rollout if kept else None, found))
            values, errors = self._gathered(runs, size)
        except FloatingPointError:
            if point.theta is None:
                raise
            self.ledger.spend(n * size)
            return None
        self.ledger.spend(n * size)
        return Trial(runs, values, errors)

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
        if point.small > 1 and point.round >= min(len(GROWTH), settings.rounds):
            point = replace(point, round=settings.rounds)
        values = {"loss": {n: math.sqrt(float(trial.errors.mean()))}, "accepted": True, "damping": point.damping}
        return point, {**values, "gain": gain, "used": len(trial.values)}

    @torch.no_grad()
    def check(self, point: Point, theta: Tensor) -> tuple[Point, float]:
        """The point after a look at theta's held-out loss, by which the best is chosen; and the end point's RMSE."""
        space, n, runs, total = point.space, point.space.num_steps, [], sum(self.held_out.sizes)
        try:
            for batch, trajectory in self.held_out:
                rollout = Rollout(batch.denoiser(None), batch.noise, *self._table(space, theta, batch), wrt=())
                runs.append(Run(batch, None, self._residual(rollout.states, trajectory, space.targets(theta))))
            values, errors = self._gathered(runs, total)
        except FloatingPointError:
            values = errors = torch.full((total,), math.inf, dtype=torch.float64)
        self.ledger.spend(n * total)
        scale = point.held_out_scale or self.settings.robust * float(values.median())
        return point.checked(theta, robust(values, scale), scale), math.sqrt(float(errors.mean()))

    def differentiate(self, point: Point, trial: Trial) -> Quadratic:
        """Gradient and J'J at the candidate. Lets each rollout go as soon as it was pulled back."""
        space, theta, limit = point.space, point.candidate, self._scale(trial)
        n, start, sums, jacobian = space.num_steps, 0, Sums(len(theta)), space.jacobian(theta)
        runs, trial_count = trial.runs, len(trial.runs)
        for k in range(trial_count):
            batch, rollout, found = runs[k].batch, runs[k].rollout, runs[k].residual
            values = trial.values[self.draws.mine(start, batch.size), None]
            cotangents = [found.values]
            if (k + point.round) % SKETCHED == 0 or trial_count < SKETCHED:
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
        """Whether the budget allows one more look at the held-out samples."""
        return self._affords(point, point.space.num_steps * sum(self.held_out.sizes))

    def _scale(self, trial: Trial) -> float:
        """The square at which a sample counts half: ``robust`` medians."""
        return float(self.settings.robust * trial.values.median())

    def _table(self, space: Space, theta: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        """weights and times of a table for a batch."""
        table: StepTable = space.table(theta, batch.guidance).to(batch.noise.device, batch.noise.dtype)
        return table.weights, table.times

    def _residual(self, states: Tensor, trajectory: Any, targets: Tensor) -> Residual:
        return residual(self.settings.loss, self.settings.trajectory_weight, states, trajectory, targets)

    def _signs(self, values: Tensor, n: int, number: int, k: int, size: int) -> Tensor:
        """(B, R) random signs beside the residual; the same for any number of processes."""
        generator = torch.Generator().manual_seed(mix(self.draws.seed, "sketch", n, number, k))
        signs = torch.randint(0, 2, (size, values.shape[1]), generator=generator, dtype=torch.int8)
        return signs_beside(values, signs[self.draws.rank :: self.draws.world].to(values) * 2 - 1)

    def _gathered(self, runs: list[Run], size: int) -> tuple[Tensor, Tensor]:
        """|r|^2 and end-point error of all samples, over all processes, (size,) float64 means of squares each.

        Raises FloatingPointError when one is none: a GPU is asked here, once a round, and not at every call.
        """
        both, start = torch.zeros(2, size, dtype=torch.float64), 0
        for run in runs:
            here = self.draws.mine(start, run.batch.size)
            both[0, here] = run.residual.values.double().square().mean(1).cpu()
            both[1, here] = run.residual.error.cpu()
            start += run.batch.size
        self.draws.all_reduce(both)
        if not bool(both.isfinite().all()):
            raise FloatingPointError("the model returned NaN or Inf along a rollout")
        return both[0], both[1]

    def _losses(self, point: Point, trial: Trial) -> tuple[float, float]:
        """The robust loss of the accepted table and of the trial, on the samples they share."""
        assert point.values is not None
        common = min(len(point.values), len(trial.values))
        return robust(point.values[:common], point.scale), robust(trial.values[:common], point.scale)

    def _affords(self, point: Point, cost: int) -> bool:
        return self.ledger.affords(cost) and point.spent + cost <= point.share

    def _keeps(self, num_steps: int, samples: int) -> bool:
        """Whether the states and histories of so many samples may stay in memory together."""
        target = self.draws.target
        assert target.shape is not None
        numbers = (2 * num_steps + 1) * math.prod(target.shape) * samples / self.draws.world
        return numbers * target.dtype.itemsize <= self.settings.memory

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


def _initial(space: str, schedule: Schedule, initial: str | Solver | None, n: int) -> Solver:
    """The table to start from. Raises ValueError naming one that the search for N steps in this space cannot hold."""
    solver = find_solver(initial or "euler", schedule, n)
    if solver.num_steps != n:
        raise ValueError(f"initial: {solver.label} has {solver.num_steps} steps; the search is for {n}")
    solver.on(schedule)
    Space(space, schedule, solver.timesteps).theta(solver)
    return solver
