"""The default search: the best table there is already, then Gauss-Newton from it.

The first rounds follow the teacher's whole trajectory, the last ones little more than its end. The end point alone
leads Gauss-Newton to the nearest of many minima, and hides in a few samples what the states in the middle show in
all: after 40,000 evaluations on the mixture this leaves .56 and .78 of the best hand-made error at N = 8 and 10; rows
fitted in closed form over twelve spacings, and then the end point alone, left .83 and .96.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..distance import CRITERIA
from ..draws import Draws
from ..names import find_solver
from ..solver import Solver
from .ledger import Ledger
from .objective import Loss
from .point import RACE, Point
from .settings import check_counts
from .space import SPACES, Space
from .stage import ANNEAL, GROWTH, LEAST, Stage
from .starts import candidates, of_different_spacings, ranked
from .teacher import Teacher

BATCHES = 8  # of each target's samples at least, of LEAST or more: a round of few samples must be one of few calls
FEW = 40  # samples of which none are held out: eight of them choose worse than the loss does
SLACK = 1.25  # of the rounds' cost, for those that are rejected
START_SHARE = 0.1  # of the budget, to find where to start
LOOKS = 4  # at the held-out samples, that the plan counts on
RACERS = 3  # tables of different spacings at most to start from; after RACE rounds the best goes on (``Point.raced``)
PAPER_SHARE = 1 / 50  # default budget, of the paper's 50,000 samples x (100 + 3 N)


@dataclass(frozen=True)
class GaussNewton:
    """Settings of  min over theta  mean_b rho(|r_b|^2),  rho(z) = c log(1 + z / c),  c = ``robust`` medians of z

    space: ``"plain"``, the paper's; ``"noise"``, with weights on the initial noise; ``"noise+start"``, with the time of
        the first call too; ``"noise+times"``, with that of each call, which errs less on this model and more on
        another; see ``Space``.
    loss: what r is: ``"trajectory"``: x_N - teacher(1), and sqrt(w) times the differences of x_1..x_{N-1} where the
        network sees them, w from 30 to 1 times trajectory_weight in the first six rounds. ``"end"``: w = 0. A
        function: feature(x_N) - feature(teacher(1)).
    generality: adds generality * L * sum_i d_i^2 to the loss, d the weights on the noise and L the loss at the start.
        They alone make a table inexact where trajectories are straight, and break it on other models: 0.1 takes the
        error there from 1.05 to .89 of the best hand-made at N = 8, for about the same on its own
        (docs/transfer.md). From about 10 on the search is in the paper's space.
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
    generality: float = 0.0
    select: str = "robust"
    tolerance: float = 1e-3
    memory: int = 1 << 29
    memory_budget: int | float | None = None
    name: ClassVar = "gauss_newton"

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
        for name in ("robust", "trajectory_weight", "tolerance", "generality"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < math.inf) or (name == "robust" and value == 0):
                raise ValueError(f"{name}={value!r}: give a number {'above' if name == 'robust' else 'from'} 0")
        if self.generality and self.space == "plain":
            raise ValueError(f"generality={self.generality!r}: space 'plain' has no weights on the noise to charge for")

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
        batch, held_out_batch = self.batches(draws, samples, held_out_samples)
        points = {n: [Point.load(saved, schedule) for saved in racers] for n, racers in state["points"].items()}
        first: dict[int, Solver] = {n: start[n] for n in steps if initial is not None} | dict(state["first"])
        train, held_out = (
            Teacher(draws, ledger, stream, count, size, budget=calls, cache=cache, memory=self.memory)
            for stream, count, size in (
                ("train", samples, batch),
                ("held_out", held_out_samples, held_out_batch),
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

        least = max(2, draws.world) * len(draws.targets)
        samples = self.samples
        if samples is None:
            samples = max(least, bisect_right(range(1, 1 << 20), budget, key=cost))
        return [samples, held_out(samples), calls(samples)]

    def batches(self, draws: Draws, samples: int, held_out_samples: int) -> tuple[int, int]:
        """The sizes of a batch of training samples and of held-out ones; the batches of several targets take turns."""
        each = -(-samples // len(draws.targets))
        size = max(-(-each // BATCHES), min(LEAST, -(-each // 2)))
        held_out = -(-held_out_samples // len(draws.targets))
        return max(draws.world, min(self.batch_size, size)), max(1, min(self.batch_size, held_out))


def racers_of(samples: int) -> int:
    """From how many tables at most a search with so many samples starts."""
    return RACERS if samples >= FEW else 1


def _initial(space: Space, initial: str | Solver | None) -> Solver:
    """The table to start from. Raises ValueError naming one that the search for N steps in this space cannot hold."""
    n = space.num_steps
    solver = find_solver(initial or "euler", space.schedule, n)
    if solver.num_steps != n:
        raise ValueError(f"initial: {solver.label} has {solver.num_steps} steps; the search is for {n}")
    solver.on(space.schedule)
    space.theta(solver)
    return solver
