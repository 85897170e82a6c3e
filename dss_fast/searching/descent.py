"""The default search: the best table there is already, then Gauss-Newton from it.

The first rounds follow the teacher's whole trajectory, the last ones little more than its end. The end point alone
leads Gauss-Newton to the nearest of many minima, and hides in a few samples what the states in the middle show in
all: after 40,000 evaluations on the mixture this leaves .56 and .78 of the best hand-made error at N = 8 and 10; rows
fitted in closed form over twelve spacings, and then the end point alone, left .83 and .96.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..distance import criterion
from ..solver import Solver
from .best import Best, better
from .budget import Ledger
from .calls import CHOICES, JUDGES, cost_of_choice, cost_of_worth, forecast, worth
from .forward import basis_of
from .gauss_newton import ROBUST, Charge, Quadratic, robust
from .job import Job
from .plan import GROWTH, RACE, TRIED, Sizes, least_of, racers_of, start_cost
from .prior import curvature
from .result import Event
from .rounds import ANNEAL, Candidate, Look, Rounds, Trial, enough, within
from .settings import GaussNewton
from .space import Space
from .starts import Start, candidates, of_different_spacings, ranked
from .teacher import Teacher

DAMPING = 0.1  # of Levenberg-Marquardt at the start, relative to J'J's diagonal
LEAST_DAMPING, MOST_DAMPING = 1e-7, 1e6
MOST_TRIES = 6  # in a row that do not improve
# Samples that what is known of other models counts as, where there are LEAST or fewer. At 1,000 evaluations and N = 10
# it takes the worst of six seeds from 3.9 to 1.2 times the start's error; at 20,000 it held the mixture at .29 for .12.
PRIOR = 1.0
TOLERANCE = 1e-3  # predicted relative gain below which a search is over
WORSE = 2.0  # times the start's mean square on fresh samples, from which on the start is returned
# Times the error of the best candidate's start, from which on a candidate with one branch at some steps is not searched
# at all. On the digit models its start errs less than the other at scale 1.5, and mostly more at 4 (docs/calls.md).
BEYOND = 1.2
WORTH = 0.4  # a round of fewer than this part of the samples seen before says too little


@dataclass(frozen=True, eq=False)
class Known:
    """What is known at the accepted table: the quadratic there, |r|^2 of its samples (n,) and their robust scale."""

    loss: Quadratic
    values: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Point:
    """Where the search for one N stands; everything a resumed one needs. A value: each step gives the next one."""

    # settled at the start; share: evaluations it may spend; prior: (P, P) how fast errors grow around where it starts
    start: Solver
    candidate: Candidate  # its table changes with each trial
    share: float
    prior: Tensor | None = None
    # changes with each trial. predicted: what the candidate should gain; tries: refused ones since the last accepted
    predicted: float = 0.0
    damping: float = DAMPING
    tries: int = 0
    spent: int = 0
    finished: bool = False
    # changes when a candidate is accepted. price: of a square of a weight on the noise; charged: what tables are
    # charged for; small: rounds in a row whose predicted gain was below TOLERANCE
    theta: Tensor | None = None
    known: Known | None = None
    price: float = 0.0
    charged: Charge | None = None
    round: int = 0
    small: int = 0
    # changes with a look at held-out samples
    best: Best | None = None
    held_out_scale: float = 0.0

    @property
    def raced(self) -> bool:
        """Whether it has run the rounds after which one of several goes on."""
        return self.finished or self.round >= RACE

    def solver(self) -> Solver | None:
        """The best table so far: the start itself, where it is the best."""
        if self.best is None:
            return None
        space, theta = self.candidate.space, self.best.theta
        return self.start if bool((theta == space.theta(self.start)).all()) else space.solver(theta)

    def charge(self, theta: Tensor) -> float:
        """What theta adds to its loss."""
        return 0.0 if self.charged is None else self.charged.of(theta)

    def improves(self, trial: Trial) -> bool:
        """Whether the candidate's loss is below the accepted table's, by the samples that both have seen."""
        if self.known is None:
            return True
        old, new = self._losses(self.known, trial)
        return new < old

    def accepted(self, trial: Trial, loss: Quadratic, settings: GaussNewton) -> Point:
        """The candidate is the accepted table, and the damped step from it the next candidate."""
        theta, damping, price = self.candidate.theta, self.damping, self.price
        if self.known is not None:
            old, new = self._losses(self.known, trial)
            if old - new > 0.5 * self.predicted:  # the candidate kept what the quadratic promised: a longer step
                damping = max(damping / 3, LEAST_DAMPING)
        now = robust(trial.values, trial.scale)
        if self.theta is None:
            price = settings.generality * now
        charged = self._charges(price, now)
        loss = loss if charged is None else loss.with_charge(charged, theta, self.candidate.basis)
        loss = loss.remembering(None if self.known is None else self.known.loss)
        point = replace(
            self, theta=theta, known=Known(loss, trial.values, trial.scale), price=price, charged=charged,
            damping=damping, tries=0, round=self.round + 1,
        )._stepped()  # fmt: skip
        small = self.small + 1 if point.gain < TOLERANCE else 0
        over = small > 1 and point.round >= len(GROWTH)
        return replace(point, small=small, round=settings.rounds if over else point.round)

    def rejected(self) -> Point:
        """The candidate was no better: a shorter step; after too many, the end.

        In the early rounds, which follow the trajectory, instead of the end the quadratic is made anew under the next
        round's loss.
        """
        if self.known is None or self.theta is None:  # a table accepted before diverges on more samples
            return self.ended()
        if self.tries < MOST_TRIES:
            return replace(self, damping=min(4 * self.damping, MOST_DAMPING), tries=self.tries + 1)._stepped()
        if self.round < len(ANNEAL):
            return replace(self, candidate=self.at, known=None, damping=DAMPING, tries=0)
        return self.ended()

    @property
    def at(self) -> Candidate:
        """The accepted table."""
        assert self.theta is not None
        return replace(self.candidate, theta=self.theta)

    def unchosen(self) -> Point:
        """Without held-out samples to choose by, the accepted table is the best."""
        return replace(self, best=Best(self.at.theta))

    def tells(self, trial: Trial) -> dict[str, Any]:
        """What to tell of a trial that was accepted."""
        loss = {self.candidate.space.num_steps: math.sqrt(float(trial.errors.mean()))}
        used = len(trial.values)
        return {"accepted": True, "loss": loss, "damping": self.damping, "gain": self.gain, "used": used}

    def ended(self) -> Point:
        """The search for this N is over; without a look at any table the accepted one is the best."""
        last = self.candidate.theta if self.theta is None else self.theta
        return replace(self, finished=True, best=self.best or Best(last.clone()))

    def looked(self, theta: Tensor, seen: Look, settings: GaussNewton) -> Point:
        """After a look at theta on held-out samples: the best if its loss is the smallest.

        Losses are kept without the charge, because the start is looked at before there is a price.
        """
        errors, select = seen.errors, settings.select
        scale, loss = self.held_out_scale or ROBUST * float(errors.median()), math.inf
        if bool(errors.isfinite().all()):
            loss = robust(errors, scale) if select == "robust" else criterion(select, errors, seen.features)
        charge = self.charge if select == "robust" and self.best is not None else lambda theta: 0.0
        return replace(self, held_out_scale=scale, best=better(self.best, theta, loss, charge))

    def compared(self, start: Candidate, found: Tensor, before: Tensor) -> Point:
        """After the last look, at errors (n,) of the table found and of the start: the start where it is far better.

        So few samples say little: on the mixture, N = 5 to 10 and budgets of 500 to 2,000, four of them that choose
        the smaller mean square leave 1 % more where the search gains and 3 % less where it loses.
        """
        worse = not float(found.mean()) <= WORSE * float(before.mean())
        return replace(self, best=Best(start.theta)) if worse else self

    @property
    def gain(self) -> float:
        """What the next step should gain, of the loss there is."""
        assert self.known is not None
        return self.predicted / max(robust(self.known.values, self.known.scale), 1e-300)

    def _charges(self, price: float, loss: float) -> Charge | None:
        """For weights on the noise, and for the way from the start by what the prior knows of it.

        The prior counts in units of the loss now: what a residual is worth as a measurement grows as it falls.
        """
        space, start = self.candidate.space, self.candidate.space.theta(self.start)
        if not price and self.prior is None:
            return None
        ridge = torch.zeros_like(start)
        space.noise(ridge).fill_(price)
        matrix = torch.diag(ridge)
        if self.prior is None:
            return Charge(matrix, torch.zeros_like(start))
        return Charge(matrix + loss / 2 * self.prior, loss / 2 * self.prior @ start)

    def _stepped(self) -> Point:
        """With the damped step from theta as the next candidate."""
        assert self.known is not None and self.theta is not None
        basis, step = self.candidate.basis, self.known.loss.step(self.damping)
        theta = self.candidate.space.move(self.theta, step if basis is None else basis @ step)
        moved = theta - self.theta  # the step, where it is trusted
        if basis is not None:
            moved = torch.linalg.lstsq(basis, moved[:, None]).solution[:, 0]
        predicted = self.known.loss.gain(moved)
        return replace(self, candidate=replace(self.candidate, theta=theta), predicted=predicted)

    def _losses(self, known: Known, trial: Trial) -> tuple[float, float]:
        """The loss of the accepted table and of the trial: robust on the samples they share, and the charge."""
        assert self.theta is not None
        common = min(len(known.values), len(trial.values))
        old, new = robust(known.values[:common], known.scale), robust(trial.before[:common], known.scale)
        return old + self.charge(self.theta), new + self.charge(self.candidate.theta)


@dataclass
class Descent:
    """The state of a search. starts: the table that each N began from. racers: the points of each N, one after the
    race; Ns that have none yet are still to come. chosen: the N that goes on, where Ns are candidates."""

    job: Job
    ledger: Ledger
    sizes: Sizes
    starts: dict[int, Solver] = field(default_factory=dict)
    racers: dict[int, list[Point]] = field(default_factory=dict)
    chosen: int | None = None

    def save(self) -> dict[str, Any]:
        """As nested data for a checkpoint."""
        racers = {n: [_saved(point) for point in points] for n, points in self.racers.items()}
        sizes, rows = list(astuple(self.sizes)), self.job.room.rows
        saved = {"sizes": sizes, "rows": rows, "starts": dict(self.starts), "racers": racers}
        return saved if self.chosen is None else {**saved, "chosen": self.chosen}

    @classmethod
    def load(cls, job: Job, ledger: Ledger, saved: dict[str, Any]) -> Descent:
        """What :meth:`save` returned."""
        spaces = {n: job.settings.space_of(job.draws.schedule, n) for n in saved["racers"]}
        racers = {n: [_loaded(point, spaces[n]) for point in points] for n, points in saved["racers"].items()}
        if rows := [rows for rows in (saved.get("rows"), job.room.rows) if rows is not None]:
            job.room.rows = min(rows)  # the parts that it ran in before, so that every sum is the same
        return cls(job, ledger, Sizes(*saved["sizes"]), dict(saved["starts"]), racers, saved.get("chosen"))

    def tables(self, n: int) -> tuple[list[Solver], float]:
        """What the search for N steps may start from, the table given or all there are, and the budget to choose."""
        assert self.ledger.budget is not None
        limit = min(start_cost(self.job, self.ledger.budget, self.sizes.rounds) * n / sum(self.job.steps), self._left())
        done = {k: racers[0].solver() or self.starts[k] for k, racers in self.racers.items()}
        given = self.starts.get(n)
        if given:
            return [given], self._left()
        space = self.job.settings.space_of(self.job.draws.schedule, n)
        return [table for table in candidates(self.job.draws.schedule, n, done) if space.holds(table)], limit

    def split(self, n: int, starts: Sequence[Start], train: Teacher) -> list[Start]:
        """The starts with both branches at as many steps as the calls allow, at the same ones on each spacing."""
        guided = self.job.guided
        if guided is None or n not in self.job.unsettled:
            return list(starts)
        first, *others = of_different_spacings(starts)
        draws, targets = self.job.draws, len(self.job.draws.targets)
        choices = worth(first, self.ledger, train, self._left(n)).best(guided[n], CHOICES)
        each = min(sum(train.sizes[t::targets]) for t in range(targets))  # batches that do not divide a set are uneven
        cost, best = cost_of_choice(n, each, targets), choices[0]
        limit = min(cost, self._left(n))
        if 0 < 2 * cost / CHOICES <= limit:  # two of them at least
            best = ranked(draws, self.ledger, train, choices, limit, JUDGES)[0].solver
        steps = best.guided_steps
        assert steps is not None
        found = [replace(first, solver=best)]
        for start in others if racers_of(self.sizes.samples) > 1 else ():
            rows = tuple(map(tuple, forecast(start.solver, steps).tolist()))
            found.append(replace(start, solver=replace(start.solver, guided_steps=steps, guidance_coeffs=rows)))
        return found

    def over(self, n: int) -> bool:
        """Whether nothing is left to do for N steps, or, for one of several candidates, nothing before the choice."""
        points = self.racers[n]
        waits = self.job.chooses and self.chosen is None and len(points) == 1
        return all(point.finished or (waits and point.round >= TRIED) for point in points)

    def share(self, n: int) -> None:
        """A candidate that begins its race may spend what those before it left."""
        if not any(point.spent for point in self.racers[n]):
            self.racers[n] = [replace(point, share=self._left()) for point in self.racers[n]]

    def dismiss(self, rounds: Rounds) -> None:
        """Before any round: candidates with one branch at some steps whose start errs far more than the best one's, on
        the training samples that these were chosen by, take no part. A race takes a quarter of the evaluations."""
        sizes, targets = rounds.train.sizes, len(self.job.draws.targets)
        if len(self.racers) == 1:  # of 2 calls
            return self._settle(self.job.steps[0], rounds)
        if any(point.spent for points in self.racers.values() for point in points):
            return  # a resumed search has raced some
        wanted = enough(sizes, 2 * JUDGES * targets)
        afforded = self._unspent() / sum(self.job.steps) - 2 * self.sizes.fresh
        if wanted % targets == 0 and sum(sizes[:wanted]) <= afforded:
            found = self._losses_of(rounds, {rounds.train: wanted})
            bound, guided = BEYOND**2 * min(found.values()), self.job.guided or {}
            left = [n for n, loss in found.items() if loss <= bound or guided.get(n, n) == n]
            if len(left) == 1:
                self._settle(left[0], rounds)

    def choose(self, rounds: Rounds) -> None:
        """Of the candidates the one that errs least goes on, the others end: on all samples, or as many as the budget
        pays for; on none the first one.

        Few of them have been fitted to yet; those held out are too few: eleven chose a table of 1.23 times the error.
        """
        afforded = self._unspent() / sum(self.job.steps) - 2 * self.sizes.fresh
        counts: dict[Teacher, int] = {}
        for teacher in (rounds.train, rounds.held_out):
            counts[teacher] = within(teacher.sizes, afforded, len(self.job.draws.targets))
            afforded -= sum(teacher.sizes[: counts[teacher]])
        found = self._losses_of(rounds, counts)
        self._settle(min(found, key=found.__getitem__), rounds)

    def _losses_of(self, rounds: Rounds, counts: Mapping[Teacher, int]) -> dict[int, float]:
        """N -> the candidate's robust mean square on so many batches of each set; 0 where there are none."""
        known: dict[int, Tensor] = {}
        for n, (point, *_) in self.racers.items():
            at = point.candidate if point.theta is None else point.at
            seen = [rounds.look(at, teacher, count).errors for teacher, count in counts.items() if count]
            known[n] = torch.cat(seen) if seen else torch.zeros(1)
        scale = ROBUST * min(float(errors.median()) for errors in known.values())
        if not 0 < scale < math.inf:  # none errs on most samples, or all diverge there
            return {n: float(errors.mean()) for n, errors in known.items()}
        return {n: robust(errors, scale) for n, errors in known.items()}

    def _settle(self, chosen: int, rounds: Rounds) -> None:
        """One of the candidates goes on, with what the others leave, of samples as of evaluations."""
        self.chosen, points = chosen, self.racers[chosen]
        self.sizes = self.sizes.grown(self.job, chosen, self._unspent(), len(points), points[0].round)
        rounds.train.grow(self.sizes.more)
        left = self._left() - self.sizes.more * self.sizes.calls
        for n, racers in self.racers.items():
            rest = [replace(point, share=point.spent + left) for point in racers]
            self.racers[n] = rest if n == chosen else [point.ended() for point in racers[:1]]

    def start(self, n: int, choice: Sequence[Start]) -> None:
        """The points that the search for N steps begins with, at the best tables on different spacings."""
        steps = self.job.steps
        starts = of_different_spacings(choice)[: racers_of(self.sizes.samples, self.job.chooses)]
        space = self.job.settings.space_of(self.job.draws.schedule, n)
        # A candidate leaves as much as its own steps with both branches cost, for the rounds of the one chosen.
        share = self._left() if self.job.chooses else self._left(n) * n / sum(steps[steps.index(n) :])
        self.racers[n] = [
            self._point(replace(space, guided_steps=start.solver.guided_steps), start, share) for start in starts
        ]
        self.starts[n] = starts[0].solver

    def _point(self, space: Space, start: Start, share: float) -> Point:
        """Where the search from a table begins."""
        known = curvature(space, start.solver) if self.sizes.samples <= least_of(self.job) else None
        prior = None if known is None else PRIOR / self.sizes.samples * known
        basis = basis_of(space, start.solver, self.sizes.directions) if self.job.by_differences else None
        return Point(start.solver, Candidate(space, space.theta(start.solver), start.units, basis), share, prior)

    def _left(self, begun: int | None = None) -> float:
        """Evaluations for the Ns to come, without those of their last looks, of the choice among candidates, of the
        units of several targets, and of finding where the Ns to come but for ``begun`` call both branches, which may
        take half."""
        left = self._unspent()
        to_come = [n for n in self.job.steps if n not in self.racers]
        if self.chosen is not None:
            return left - 2 * self.chosen * self.sizes.fresh
        samples = (self.sizes.samples + self.sizes.held_out) if self.job.chooses else 0
        left -= sum(self.job.steps if self.job.chooses else to_come) * (samples + 2 * self.sizes.fresh)
        if len(self.job.draws.targets) > 1:  # whose errors each N after the one at hand counts by a sample of each
            left -= len(self.job.draws.targets) * sum(to_come[1:])
        unknown = sum(n for n in to_come if n != begun and n in self.job.unsettled)
        return left - max(0.0, min(left / 2, cost_of_worth(unknown, self.sizes.samples, len(self.job.draws.targets))))

    def _unspent(self) -> float:
        assert self.ledger.budget is not None
        return self.ledger.budget - self.ledger.evaluations

    def event(self, stage: str, *, resumable: bool = True, **told: Any) -> Event:
        """What is told after a unit of work."""
        assert self.ledger.budget is not None
        points = [point for racers in self.racers.values() for point in racers]
        found = {n: racers[0].solver() for n, racers in self.racers.items()}
        if self.job.chooses:  # one of the candidates is the result
            shown = [n for n, solver in found.items() if solver is not None] if self.chosen is None else [self.chosen]
            found = {n: found[n] for n in shown[:1]}
        return Event(
            stage,
            done=self.ledger.evaluations,
            total=self.ledger.budget,
            solvers={n: solver for n, solver in found.items() if solver is not None},
            starts={n: start for n, start in self.starts.items() if n in found or not self.job.chooses},
            state=self.save() if resumable else None,
            complete=len(self.racers) == len(self.job.steps) and all(point.finished for point in points),
            samples=self.sizes.training,
            **told,
        )


def descend(job: Job, ledger: Ledger, saved: dict[str, Any] | None = None) -> Iterator[Event]:
    """The events of a search by Gauss-Newton. saved: the state of one to go on with."""
    descent, rounds = begun(job, ledger, saved)
    if saved is None:
        yield descent.event("teacher", resumable=False)
    for teacher in (rounds.held_out, rounds.fresh, rounds.train):
        yield from _taught(descent, teacher)
    for n in job.steps:
        if n not in descent.racers:
            tables, limit = descent.tables(n)
            starts = ranked(job.draws, ledger, rounds.train, tables, limit)
            descent.start(n, descent.split(n, starts, rounds.train))
            if job.initial is None:
                choice = None if starts[0].choice is None else str(starts[0].choice)
                yield descent.event("start", num_steps=n, start=descent.starts[n].name, choice=choice)
        if not job.chooses:
            yield from _searched(descent, rounds, n)
    if job.chooses:
        if descent.chosen is None:
            descent.dismiss(rounds)
            for n in job.steps if descent.chosen is None else ():
                descent.share(n)
                yield from _searched(descent, rounds, n)
            if descent.chosen is None:
                descent.choose(rounds)
            yield descent.event("choice", num_steps=descent.chosen)
        yield from _taught(descent, rounds.train)
        assert descent.chosen is not None
        yield from _searched(descent, rounds, descent.chosen)


def _taught(descent: Descent, teacher: Teacher) -> Iterator[Event]:
    """The events of the trajectories that are not there yet."""
    for k in range(len(teacher)):
        before = descent.ledger.evaluations
        _ = teacher[k]
        if descent.ledger.evaluations > before:  # a resumed search has counted it before
            yield descent.event("teacher", resumable=bool(descent.racers))


def _searched(descent: Descent, rounds: Rounds, n: int) -> Iterator[Event]:
    """The events of the search for N steps, to its end or to the choice among candidates."""
    ledger, settings = descent.ledger, descent.job.settings
    assert isinstance(settings, GaussNewton)
    told: dict[str, Any]
    while not descent.over(n):
        points = descent.racers[n]
        racing, before = len(points) > 1, ledger.evaluations
        k = next(k for k, point in enumerate(points) if not (point.raced if racing else point.finished))
        point, told, look = points[k], {}, False
        if point.theta is None and point.best is None and _affords_look(point, rounds):
            seen = rounds.look(point.candidate, rounds.held_out)
            point, told["held_out"] = point.looked(point.candidate.theta, seen, settings), {n: seen.rmse}
        batches = _planned(point, rounds, descent.sizes.rounds)
        trial = rounds.attempt(point.candidate, point.round, batches) if batches else None
        if not batches:
            point, look = point.ended(), point.theta is not None
        elif trial is not None and point.improves(trial):
            point = point.accepted(trial, rounds.differentiate(trial), settings)
            point = point if sum(rounds.held_out.sizes) else point.unchosen()
            told |= point.tells(trial)
            look = point.round > len(ANNEAL)
        elif trial is None and point.theta is None:
            raise FloatingPointError(f"the model returned NaN or Inf along a rollout of {descent.starts[n].label}")
        else:
            point = point.rejected()
            told |= {"accepted": False, "damping": point.damping}
        if look and _affords_look(point, rounds):
            seen = rounds.look(point.at, rounds.held_out)
            point, told["held_out"] = point.looked(point.at.theta, seen, settings), {n: seen.rmse}
        if point.finished and len(rounds.fresh):
            start = replace(point.candidate, theta=point.candidate.space.theta(point.start))
            found = replace(point.candidate, theta=point.best.theta) if point.best else start
            seen, before_it = rounds.look(found, rounds.fresh), rounds.look(start, rounds.fresh)
            point = point.compared(start, seen.errors, before_it.errors)
        points[k] = replace(point, spent=point.spent + ledger.evaluations - before)
        if racing and all(point.raced for point in points):
            descent.racers[n] = [_winner(points)]
        yield descent.event("gauss-newton", num_steps=n, **told)


def begun(job: Job, ledger: Ledger, saved: dict[str, Any] | None = None) -> tuple[Descent, Rounds]:
    """The state to go on from, and the samples. Raises ValueError for a budget that the teacher alone exceeds, or the
    teacher with a sample's look at each of several targets."""
    assert ledger.budget is not None
    if saved is None:
        descent = Descent(job, ledger, Sizes.of(job, ledger.budget), dict(job.initial or {}))
    else:
        descent = Descent.load(job, ledger, saved)
    sizes, (batch, held_out_batch) = descent.sizes, descent.sizes.batches(job)
    if saved is not None and (sizes.samples + sizes.held_out - 2 * job.draws.world) * sizes.calls > ledger.evaluations:
        raise ValueError(
            f"the checkpoint asks for {sizes.samples:,} samples and {sizes.held_out:,} held-out ones, whose teacher of "
            f"{sizes.calls} calls takes more than the {ledger.evaluations:,} evaluations spent: it is damaged; begin "
            "in another folder"
        )
    calls, fresh_batch = sizes.calls, max(1, sizes.fresh // len(job.draws.targets))
    train = Teacher(job.draws, ledger, "train", sizes.samples, batch, calls, job.room, job.follows and sizes.rounds > 0)
    train.grow(sizes.more)
    held_out = Teacher(job.draws, ledger, "held_out", sizes.held_out, held_out_batch, calls, job.room, inner=False)
    fresh = Teacher(job.draws, ledger, "fresh", sizes.fresh, fresh_batch, calls, job.room, inner=False)
    cost, targets = train.cost() + held_out.cost() + fresh.cost(), len(job.draws.targets)
    units = targets * sum(job.steps) if targets > 1 else 0  # of a sample each: what a target's errors are counted in
    if saved is None and ledger.evaluations + cost + units > ledger.budget:
        raise ValueError(
            f"budget={ledger.budget!r}: the teacher's {sizes.samples + sizes.held_out + sizes.fresh} trajectories "
            f"alone take {cost}"
            + f", and a sample of each target {units}" * bool(units)
            + "; give a larger budget or fewer samples"
        )
    return descent, Rounds(job, ledger, train, held_out, fresh)


def _planned(point: Point, rounds: Rounds, most: int) -> int:
    """How many batches the next round takes, of ``most``; 0: none, the search for this N is over."""
    sizes, candidate = rounds.train.sizes, point.candidate
    growing = GROWTH[point.round] if point.round < len(GROWTH) else 1.0
    targets = len(candidate.units)  # which take turns: each has its part in every round
    batches = enough(sizes, max(least_of(rounds.job) * targets, math.ceil(growing * sum(sizes))))
    batches = min(-(-batches // targets) * targets, len(sizes))
    looks = candidate.space.num_steps * sum(rounds.held_out.sizes)

    def affords(batches: int) -> bool:
        return _affords(point, rounds, rounds.cost(candidate, point.round, batches) + looks)

    while batches > targets and not affords(batches):
        batches -= targets
    known = 0 if point.known is None else len(point.known.values)
    over = point.round >= most or sum(sizes[:batches]) < WORTH * known
    return 0 if over or not affords(batches) else batches


def _affords_look(point: Point, rounds: Rounds) -> bool:
    """Whether there are held-out samples and the budget allows one more look at them."""
    total = sum(rounds.held_out.sizes)
    return total > 0 and _affords(point, rounds, point.candidate.space.num_steps * total)


def _affords(point: Point, rounds: Rounds, cost: int) -> bool:
    return rounds.ledger.affords(cost) and point.spent + cost <= point.share


def _winner(racers: Sequence[Point]) -> Point:
    """The racer of least loss on the samples that all have seen, which goes on with what all have spent."""
    known = [(p, p.known, p.charge(p.theta)) for p in racers if p.known is not None and p.theta is not None]
    common = min((len(found.values) for _, found, _ in known), default=0)
    scale = min((found.scale for _, found, _ in known), default=1.0)
    losses = [(robust(found.values[:common], scale) + charge, k) for k, (_, found, charge) in enumerate(known)]
    best = known[min(losses)[1]][0] if known else racers[0]
    return replace(best, spent=sum(point.spent for point in racers))


def _saved(point: Point) -> dict[str, Any]:
    """A point as nested data."""
    known, best, parts = point.known, point.best, ("start", "candidate", "known", "best", "charged")
    return {
        **{f.name: getattr(point, f.name) for f in fields(point) if f.name not in parts},
        "candidate": point.candidate.theta,
        "basis": point.candidate.basis,
        "guided_steps": point.candidate.space.guided_steps,
        "units": list(point.candidate.units),
        "known": None if known is None else {**vars(known.loss), "values": known.values, "scale": known.scale},
        "best": None if best is None else vars(best),
        "start": point.start,
        "charged": None if point.charged is None else vars(point.charged),
    }


def _loaded(saved: dict[str, Any], space: Space) -> Point:
    """What :func:`_saved` returned."""
    plain = dict(saved)
    steps = plain.pop("guided_steps", None)
    space = replace(space, guided_steps=None if steps is None else tuple(steps))
    candidate = Candidate(space, plain.pop("candidate"), tuple(plain.pop("units")), plain.pop("basis", None))
    known, best, charged = (plain.pop(key) for key in ("known", "best", "charged"))
    if known is not None:
        known = Known(Quadratic(known["gradient"], known["matrix"], known["mass"]), known["values"], known["scale"])
    return Point(
        plain.pop("start"),
        candidate,
        known=known,
        best=None if best is None else Best(**best),
        charged=None if charged is None else Charge(**charged),
        **plain,
    )
