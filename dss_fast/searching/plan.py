"""Plan: what a search will take, said before it starts, and how many samples its budget pays for."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..denoiser import frozen, modules_of
from ..modes import on_host
from ..target import Model, Target
from ..unroll.kept import budget_bytes, free_bytes
from .budget import Cost, default_budget, gigabytes
from .calls import cost_of_worth
from .forward import LEAST as FORWARD_LEAST
from .forward import afforded, directions_of
from .job import Job, prepare
from .probe import NoGraph, probe
from .room import MEMORY, PART, REMEDIES, WHOLE, Room, usable
from .settings import GaussNewton, Method
from .space import DENSE

# RMSE over the best hand-made solver's, by evaluations for each N: the mean over N = 5, 8, 10 on twelve models of kinds
# that the library has not seen (docs/transfer.md), and for 120,000 on the exact mixture and both MNIST models.
EXPECTED = ((500, 0.67), (1_000, 0.63), (3_000, 0.53), (120_000, 0.49))
GROWTH = (0.12, 0.12, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.0)  # share of the samples in each round; then all of them
LEAST = 12  # samples of a round, of a set that has so many
BATCHES = 8  # of each target's samples at least, of LEAST or more: a round of few samples must be one of few calls
FEW = 40  # samples of which none are held out: eight of them choose worse than the loss does
RACE = 3  # rounds after which the best of several starts goes on
TRIED = 4  # rounds after which the best of several Ns goes on, where the calls are given and not the steps
RACERS = 3  # tables of different spacings at most to start from, of FEW samples or more
SLACK = 1.25  # of the rounds' cost, for those that are rejected
START_SHARE = 0.1  # of the budget, to find where to start; of a small one so many rollouts, half at most
START_ROLLOUTS = 30  # of N calls each, choose a table of the library and its k where rounds follow
CHOICE_SHARE, CHOICE = 0.7, 64  # of the budget, where nothing follows the choice; samples for it at most
ROUNDS, MORE = 1, 4  # a plan counts on one round and one more for every four samples
WORTHWHILE = 4  # samples: with fewer, rounds cost more than they bring, and the budget goes into the choice alone
FRESH, FRESH_SHARE = 4, 0.04  # samples for the last look at most, and of the budget, where none are held out
LOOKS = 4  # at the held-out samples, that the plan counts on


@dataclass(frozen=True)
class Sizes:
    """What a budget pays for when no round is rejected: training and held-out samples and the teacher's calls.

    fresh: where none are held out, samples at the end on which the table found must not err much more than its start.
    rounds: of Gauss-Newton at most; 0 where the budget is for a choice among the tables there are. directions: at most,
    where no gradient is taken. more: training samples beside those, once one of several Ns is chosen.
    """

    samples: int
    held_out: int
    calls: int
    fresh: int
    rounds: int
    directions: int = 0
    more: int = 0

    @property
    def training(self) -> int:
        """Training samples, in the end."""
        return self.samples + self.more

    @classmethod
    def of(cls, job: Job, budget: int) -> Sizes:
        """The largest sets whose teacher, rounds and looks fit the budget; what the settings name is as they say."""
        settings, steps, world = job.settings, job.goals, job.draws.world
        assert isinstance(settings, GaussNewton)
        directions = afforded(budget, steps) if job.by_differences else 0

        def held_out(samples: int) -> int:
            if settings.held_out_samples is not None:
                return settings.held_out_samples
            return 0 if samples < FEW else max(world, min(256, samples // 5))

        def calls(samples: int) -> int:
            return settings.teacher_evaluations or max(24, 2 * max(steps))

        def fresh(samples: int) -> int:
            if held_out(samples):
                return 0
            afforded = int(FRESH_SHARE * budget / (calls(samples) + 2 * sum(steps)))
            return max(world, min(FRESH, afforded)) * len(job.draws.targets)

        def cost(samples: int) -> int:
            racers = racers_of(samples, job.chooses)
            rounds = _rounds(job, samples, (racers - 1) * GROWTH[:RACE])
            each = calls(samples) + sum(steps) + _work(job, steps, directions) * rounds
            if job.chooses:  # the Ns that are not chosen take part in the first rounds
                others = GROWTH[:TRIED] + (racers - 1) * GROWTH[:RACE]
                rest = _work(job, job.steps, directions) - _work(job, steps, directions)
                each += rest * SLACK * sum(others) + sum(job.steps)
            if job.unsettled:  # counted for every N: what those leave that need none goes into rounds
                each += cost_of_worth(sum(job.steps), samples, len(job.draws.targets)) / samples
            if job.follows:  # inner states that are not kept are made again, for the trial and for the way back
                kept = world * job.room.host / (2 * calls(samples) * state_bytes(job) * samples)
                each += calls(samples) * max(0.0, 1 - kept) * 2 * rounds * len(steps)
            looks = held_out(samples) * (calls(samples) + sum(steps) * LOOKS)
            looks += fresh(samples) * (calls(samples) + 2 * sum(steps))
            return math.ceil(samples * each + looks + start_cost(job, budget, settings.rounds))

        samples, rounds = settings.samples, settings.rounds
        least = max(2, world) * len(job.draws.targets)
        if samples is None:
            samples = max(least, bisect_right(range(1, 1 << 20), budget, key=cost))
            if job.initial is None and samples < WORTHWHILE * len(job.draws.targets):
                rounds = 0
        if not rounds and settings.samples is None:
            samples = max(least, min(CHOICE, int((1 - CHOICE_SHARE) * budget / calls(least))))
        return cls(samples, held_out(samples), calls(samples), fresh(samples) if rounds else 0, rounds, directions)

    def grown(self, job: Job, num_steps: int, left: float, racers: int, done: int) -> Sizes:
        """With as many whole batches of training samples more as ``left`` evaluations pay for once one of several Ns
        is chosen: their teacher, the rounds but for those ``done``, from so many tables, and looks. A set of so few
        that other models say more, of a size that was asked for, or that no round follows, stays as it is."""
        settings, targets, size = job.settings, len(job.draws.targets), self.batches(job)[0]
        assert isinstance(settings, GaussNewton)
        if settings.samples is not None or self.samples <= least_of(job) or done >= self.rounds:
            return self

        def cost(more: int) -> float:
            samples = self.samples + more
            rounds = _rounds(job, samples, (racers - 1) * GROWTH[:RACE], done)
            looks = num_steps * (self.held_out * LOOKS + 2 * self.fresh)
            return more * self.calls + samples * _work(job, (num_steps,), self.directions) * rounds + looks

        counts = range(size * targets, 1 << 20, size * targets)
        return replace(self, more=size * targets * bisect_right(counts, left, key=cost))

    def batches(self, job: Job) -> tuple[int, int]:
        """The sizes of a batch of training samples and of held-out ones; the batches of several targets take turns."""
        targets, world, most = len(job.draws.targets), job.draws.world, job.settings.batch_size
        each, held_out = -(-self.samples // targets), -(-self.held_out // targets)
        size = max(-(-each // BATCHES), min(least_of(job), -(-each // 2)))
        return max(world, min(most, size)), max(1, min(most, held_out))


def _work(job: Job, steps: Sequence[int], directions: int) -> int:
    """Evaluations of a sample in a round of each N."""
    return sum(n * (1 + directions_of(n, directions) if job.by_differences else 4) for n in steps)


def _rounds(job: Job, samples: int, others: Sequence[float], done: int = 0) -> float:
    """How often a plan counts on every sample taking part: in the rounds that follow those done, and in others of these
    shares."""
    assert isinstance(job.settings, GaussNewton)
    planned = min(len(GROWTH), job.settings.rounds, ROUNDS + samples // MORE)
    shares = [*GROWTH[done:planned], *others]
    return SLACK * sum(max(share, min(1.0, least_of(job) / samples)) for share in shares)


def start_cost(job: Job, budget: int, rounds: int) -> int:
    """Evaluations that the tables to start from may take, of all Ns: none where one is given, what the teacher leaves
    where no rounds follow."""
    if job.initial is not None:
        return 0
    if not rounds:
        return int(CHOICE_SHARE * budget)
    rollouts = START_ROLLOUTS * sum(job.steps) * len(job.draws.targets)
    return int(max(START_SHARE * budget, min(rollouts, budget / 2)))


def least_of(job: Job) -> int:
    """Samples of a round, of a set that has so many."""
    return FORWARD_LEAST if job.by_differences else LEAST


def racers_of(samples: int, chooses: bool = False) -> int:
    """From how many tables at most a search with so many samples starts; each N where it chooses among several."""
    return (RACERS - chooses) if samples >= FEW else 1


@dataclass(frozen=True)
class Memory:
    """Bytes that a search needs.

    weights: of the model, there already. graphs: of one call for as many samples as run at a time, for its backward.
    teacher: on the host, end points and, as far as there is room, states and slopes. states: those of a round's
    rollouts, with history and residuals, and what a part of them takes on the way there and back. algebra: the table's
    derivative and the matrices of Gauss-Newton. With factors fitted to what processes took: within .7 to 1.5 of it for
    1 to 4 million elements and N up to 100 (tests/searching/test_memory.py).
    """

    weights: int
    graphs: int
    teacher: int = 0
    states: int = 0
    algebra: int = 0

    @property
    def total(self) -> int:
        """All of it but the weights."""
        return self.graphs + self.teacher + self.states + self.algebra

    def __str__(self) -> str:
        parts = ("weights", "graphs", "teacher", "states", "algebra")
        return ", ".join(f"{name} {gigabytes(getattr(self, name))}" for name in parts)


def state_bytes(job: Job) -> int:
    """Of one sample's state, the largest target's."""
    return max(math.prod(target.shape or ()) for target in job.draws.targets) * job.draws.target.dtype.itemsize


def way_bytes(job: Job, calls: int) -> int:
    """Of the tensors beside the graph while one sample goes there and back, or along its teacher's trajectory: the
    states, histories, cotangents and adjoints of N steps, or differences along each direction."""
    n = max(job.steps)
    columns = directions_of(n) * (n if job.follows else 1) if job.by_differences else 0
    return state_bytes(job) * max(12 * n + 40 + columns, 2 * calls + 8)


def batch_of(job: Job, budget: int | None) -> tuple[int, int]:
    """How many samples of a batch one process has, at most, and the teacher's calls; before the model is measured."""
    settings, world = job.settings, job.draws.world
    if not isinstance(settings, GaussNewton):
        return -(-settings.batch_size // world), settings.teacher_steps // 2
    budget = default_budget(settings, job.goals) if budget is None else budget
    assert budget is not None
    sizes = Sizes.of(job, budget)
    return -(-max(sizes.batches(job)) // world), sizes.calls


def limits(job: Job, budget: int | None) -> tuple[int, int, int]:
    """What :func:`probe` is told: bytes that the graphs of a batch may take before a network that can computes its
    activations again, bytes that the graph of one sample may, and the samples of a batch. Raises ValueError, naming
    what to change, where there is no room for any graph."""
    batch, calls = batch_of(job, budget)
    may, most = usable(job.draws.device, job.memory)
    way = way_bytes(job, calls)
    if way >= most:
        raise ValueError(
            f"one sample takes {gigabytes(way)} on its way there and back, without the graph of any call, and "
            f"{gigabytes(most)} may be used: {REMEDIES}, or fewer steps than {max(job.steps)}"
        )
    return max(1, min(may - min(MEMORY, may // 4) - way * batch, WHOLE)), max(1, most - way), batch


def looked(job: Job, budget: int | None) -> tuple[Job, Cost]:
    """What :func:`probe` says of the job's models. Where they give no graph and nobody asked for one, with a warning,
    the job that takes none. Raises ValueError as it does."""
    try:
        return job, probe(job.draws, job.differentiated, *limits(job, budget))
    except NoGraph as error:
        if not isinstance(job.settings, GaussNewton) or job.settings.gradients:
            raise
        try:
            job = job.without_gradient()
        except ValueError as unknown:
            raise ValueError(f"{error}. {unknown}") from error
    warnings.warn(
        "the model returns an output without a graph: the search only calls it, and moves along "
        "a few directions by differences; GaussNewton(gradients=False) asks for it, gradients=True refuses",
        stacklevel=4,
    )
    return job, probe(job.draws, False, *limits(job, budget))


def with_room(job: Job, budget: int | None, cost: Cost) -> Job:
    """The job with room for its batches: whole where what they take may be used, else in parts of as few samples as it
    takes. Raises ValueError, naming what to change, where one sample does not fit."""
    batch, calls = batch_of(job, budget)
    may, most = usable(job.draws.device, job.memory)
    each = max(cost.saved + way_bytes(job, calls), 1)
    if each > most:
        raise ValueError(
            f"one sample takes {gigabytes(each)} on its way there and back, {gigabytes(cost.saved)} of them the graph "
            f"of a call, and {gigabytes(most)} may be used: {REMEDIES}, or fewer steps than {max(job.steps)}"
        )
    kept = min(MEMORY, may // 4)
    if each * batch + kept <= may and not cost.recomputed:
        auto = budget_bytes("auto", job.draws.device) or 0
        return replace(job, room=Room(None, job.room.host, kept, min(auto, may - each * batch - kept)))
    return replace(job, room=Room(max(1, min(may - kept, PART) // each), job.room.host, kept, None))


def memory_of(job: Job, sizes: Sizes | None, batch: int, calls: int, cost: Cost) -> Memory:
    """For the largest N of a search. batch: samples that run at a time."""
    draws, n, state = job.draws, max(job.steps), state_bytes(job)
    modules = [module for target in draws.targets for module in modules_of(target.model)]
    held = {t.untyped_storage()._cdata: t.nbytes for m in modules for t in (*m.parameters(), *m.buffers())}
    way = way_bytes(job, calls) * batch
    graphs = cost.saved * batch
    if sizes is None:
        return Memory(sum(held.values()), graphs, 0, way)
    samples = sizes.training // draws.world
    others = (sizes.held_out + sizes.fresh) // draws.world
    inner = 2 * sizes.calls * samples * state if job.follows else 0
    room, shared = job.room, (2 * n + 1) * state
    rollouts = min(samples * shared, room.kept) * (3 * n + 1) // (2 * n + 1)
    parameters = sum(job.settings.space_of(draws.schedule, n).sizes())
    numbers = (3 * (n * (n + 6) + n) if n <= DENSE else batch) * parameters + 5 * parameters**2
    teacher = min(inner, room.host) + 2 * state * (samples + others)
    if isinstance(room.graphs, int):  # of calls that need not run again
        graphs += min(room.graphs, cost.saved * n * samples)
    return Memory(sum(held.values()), graphs, teacher, rollouts + way, 8 * numbers)


@dataclass(frozen=True)
class Plan:
    """What a search will take, from one forward and one backward of the model.

    num_steps: the Ns. evaluations: model evaluations at most, None without a limit. samples: of the training set, None
    where the method has no plan. cost: of an evaluation, measured. batch_size: samples whose graphs are alive at once.
    calls: of the model a sample may take, with guidance, where they were given.
    """

    num_steps: tuple[int, ...]
    evaluations: int | None
    samples: int | None
    cost: Cost
    batch_size: int
    memory: Memory
    calls: int | None = None

    @property
    def minutes(self) -> float:
        """Expected, of the whole search on this machine."""
        return math.inf if self.evaluations is None else self.evaluations * self.cost.seconds / 60

    def __str__(self) -> str:
        lines = [
            f"N = {', '.join(map(str, self.num_steps))}"
            + (f" in {self.calls} calls a sample" if self.calls is not None else "")
            + f": {1000 * self.cost.seconds:.3g} ms a model evaluation, "
            f"{gigabytes(self.cost.saved * self.batch_size)} for a backward of {self.batch_size} samples"
            + (" that computes its activations again, " if self.cost.recomputed else ", ")
            + f"{gigabytes(self.memory.total)} in all beside the model ({self.memory})"
        ]
        if self.evaluations is None:
            return lines[0]
        for factor, word in ((0.25, "a quarter"), (1, "this budget"), (4, "four times")):
            spent = factor * self.evaluations
            share = expected(spent / len(self.num_steps))
            lines.append(
                f"{word:>11}: {spent:9,.0f} evaluations, {_time(60 * factor * self.minutes):>8}, "
                + ("less than any search was measured with" if share is None else f"about {share:.2f} of the best")
                + ("" if share is None else " hand-made error")
            )
        return "\n".join(lines)


def plan(
    target: Target | Model | Sequence[Target],
    num_steps: int | Sequence[int] | None = None,
    *,
    calls: int | None = None,
    method: str | Method = "gauss_newton",
    budget: int | None = None,
) -> Plan:
    """What ``search`` with the same arguments will take. Costs 8 model evaluations for each target, more where one
    whose graph is too large is looked at with its activations computed again."""
    with on_host():
        job = prepare(target, num_steps, calls=calls, method=method, budget=budget)
        with frozen([one.model for one in job.draws.targets]):
            job, cost = looked(job, budget)
        return planned(with_room(job, budget, cost), budget, cost)


def planned(job: Job, budget: int | None, cost: Cost) -> Plan:
    """The plan of a search whose model was measured, and that has its room."""
    budget = default_budget(job.settings, job.goals) if budget is None else budget
    sizes = Sizes.of(job, budget) if isinstance(job.settings, GaussNewton) and budget is not None else None
    samples, size = job.settings.samples, job.settings.batch_size
    if sizes is not None:
        samples, size = sizes.samples, sizes.batches(job)[0]
    size = min(size, job.room.rows or size)
    if sizes is not None and budget is not None and job.chooses:  # as many as any of them has, chosen before any round
        left = budget - sizes.calls * (sizes.samples + sizes.held_out + sizes.fresh)
        sizes = max((sizes.grown(job, n, left, 1, 0) for n in job.steps), key=lambda grown: grown.more)
    memory, free = memory_of(job, sizes, size, batch_of(job, budget)[1], cost), free_bytes(torch.device("cpu"))
    host = memory.teacher + memory.algebra + (job.draws.device.type == "cpu") * (memory.graphs + memory.states)
    if host > free:
        raise ValueError(
            f"the search takes {gigabytes(host)} of the host, where {gigabytes(free)} are free ({memory}): give fewer "
            "samples or a smaller budget where the teacher is the most, fewer steps where the algebra is"
        )
    return Plan(job.steps, budget, samples, cost, size, memory, job.calls)


def expected(evaluations: float) -> float | None:
    """The error to expect after so many evaluations for one N, over the best hand-made one; None below the table."""
    if evaluations < EXPECTED[0][0]:
        return None
    at = [math.log(e) for e, _ in EXPECTED]
    x = min(math.log(evaluations), at[-1])
    k = max(k for k in range(len(at) - 1) if at[k] <= x)
    fraction = (x - at[k]) / (at[k + 1] - at[k])
    return EXPECTED[k][1] + fraction * (EXPECTED[k + 1][1] - EXPECTED[k][1])


def _time(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, hours above."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 120 * size or unit == "h":
            break
    return f"{seconds / size:.3g} {unit}"
