"""Where a search starts: the best table there is already, found by successive halving on a few samples.

A table of the library, or a published one, is tried at several sizes of the data: what it does on one model it does on
another whose data are k times as large, once it is moved by k (``Solver.moved``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..distance import ratio_of, squares
from ..draws import Draws
from ..methods import handmade
from ..names import families, find_solver, library, published_steps
from ..rivals import STARTS, handmade_tables
from ..schedule import Schedule
from ..solver import Solver
from ..table import StepTable
from ..target import Samples
from ..unroll import Rollout
from .budget import Ledger
from .room import Room
from .teacher import Teacher

LOST = 1e30  # the error of a table that diverges to NaN or Inf
# Of the data beside those of the models that tables were searched on. The best of one table is within a step of 2^.5 on
# its neighbours; over the models of the library they go from .25 to 3.
SIZES = tuple(2.0 ** (power / 2) for power in (0, -2, 2, -1, 1, -3, 3, -4))
# With one of networks after each of general, a choice of 500 evaluations loses the sizes that a small mixture needs;
# with all of general first, networks gain half as much (docs/transfer.md, "Members and the choice").
LEADING = 2
HANDMADE = "hand-made"  # the source of such tables
# This share of the tables is kept in each round, and runs on half as many samples again. A third on three times the
# samples, of a budget of 500, ended after three samples of eight, with rollouts left.
KEPT, GROWN = 0.7, 1.5


def candidates(schedule: Schedule, num_steps: int, done: dict[int, Solver]) -> list[Solver]:
    """Every table that may be the best there is, likely ones first, none twice.

    Hand-made rows on the timesteps that were found for the nearest N of ``done``; those of the library at each k and
    hand-made ones, in turn; published tables at each k; hand-made methods on all spacings.
    """
    hand = list(handmade_tables(schedule, num_steps, STARTS))
    papers = moved_tables(schedule, num_steps, tuple(name for name in families() if name not in library()))
    head: list[Solver] = []
    for k, moved in enumerate(library_tables(schedule, num_steps) or papers):
        head += [moved, *hand[k // 2 : k // 2 + (k % 2)]]  # a hand-made one after every second
    found: list[Solver] = []
    if done:
        near = min(done, key=lambda n: abs(n - num_steps))
        u = respaced(torch.tensor(done[near].timesteps, dtype=torch.float64), num_steps)
        methods = ("ab2", "ab3") if schedule.family == "flow" else ("dpmpp_2m", "ab2")
        like = [handmade(method, schedule=schedule, timesteps=u) for method in methods]
        found += [replace(solver, name=f"{solver.name} on the spacing found for N = {near}") for solver in like]
    return list(dict.fromkeys([*found, *head, *papers, *hand]))


def library_tables(schedule: Schedule, num_steps: int) -> list[Solver]:
    """The library at each size of the data: after every ``LEADING`` tables of its first member one of the others."""
    first, *others = library() or [""]
    lead, rest = (moved_tables(schedule, num_steps, tuple(filter(None, names))) for names in ((first,), others))
    turns = range(max(-(-len(lead) // LEADING), len(rest)))
    return [table for k in turns for table in (*lead[LEADING * k : LEADING * (k + 1)], *rest[k : k + 1])]


@lru_cache(32)
def moved_tables(schedule: Schedule, num_steps: int, names: tuple[str, ...]) -> tuple[Solver, ...]:
    """The tables of these names and N steps for data of each size in ``SIZES``, likely sizes first; beside a flow's own
    shift, which a table follows. Those whose noise levels the path does not reach are left out."""
    shift = getattr(schedule, "shift", 1.0)
    tables = [find_solver(f"{name}/{num_steps}") for name in names if num_steps in published_steps(name)]
    found = []
    for k in SIZES:
        for table in tables:
            try:
                moved = table.moved(k * shift / getattr(table.schedule, "shift", 1.0), schedule)
            except ValueError:
                continue
            found.append(replace(moved, provenance={"moved": 1.0, **moved.provenance}))
    return tuple(found)


@dataclass(frozen=True)
class Choice:
    """What a table was chosen by: its RMSE over that of the best hand-made table tried, ``rival``, and the 95 %
    interval, on the same samples; and how many these were, and how many tables."""

    rival: str
    ratio: float
    low: float
    high: float
    samples: int
    tables: int

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f}) of the error of {self.rival}, the best hand-made "
            f"one tried, on the {self.samples} samples that chose it among {self.tables} tables"
        )


@dataclass(frozen=True)
class Start:
    """A table to start from. units: what each target's squares are counted in, the median of the table's there; 1 for
    a single target. choice: how it stands to the best hand-made one; None of several targets, or of a table given."""

    solver: Solver
    units: tuple[float, ...]
    choice: Choice | None = None


@torch.no_grad()
def ranked(
    draws: Draws, ledger: Ledger, teacher: Teacher, tables: Sequence[Solver], limit: float, first: int = 1
) -> list[Start]:
    """The best of the tables, best first; at most ``limit`` evaluations, 0 for a single table and target.

    Each is run on one sample, or on ``first`` of them, the better ones on one more, and so on (:func:`rounds_of`), as
    far as the samples of each target reach; on none, where these are fewer. With too small a limit for all, the first
    ones take part.
    Score: the mean of |x_N - teacher(1)|^2, of several targets the geometric mean of theirs; robust means and medians
    choose worse where few samples carry the error.
    """
    count = 0
    out: list[Solver] = []
    errors: dict[Solver, Tensor] = {}  # (targets, samples so far)
    n, targets = tables[0].num_steps, len(draws.targets)
    sizes = [teacher.sizes[t : t + 1] if len(tables) == 1 else teacher.sizes[t::targets] for t in range(targets)]
    rounds = rounds_of(len(tables), max(0, int(limit // (n * targets))), min(map(sum, sizes)), first)
    left = list(tables[: rounds[0][1]] if rounds else tables)
    if len(left) == 1 and targets == 1:  # nothing to choose from, and no unit to measure
        rounds = []
    for wanted, kept in rounds:
        left, gone = _cut(left, kept)
        out = gone + out
        found = torch.zeros(len(left), targets, wanted - count, dtype=torch.float64)
        for t in range(targets):
            for number, rows, places in parts_of(sizes[t], slice(count, wanted), draws):
                batch, trajectory = teacher[t + targets * number]
                for k, solver in enumerate(left):
                    found[k, t, places] = _errors(solver, batch.rows(rows), trajectory.last[rows], teacher.room)
        draws.all_reduce(found)
        ledger.spend(found.numel() * n)
        for solver, values in zip(left, found, strict=True):
            errors[solver] = torch.cat([errors[solver], values], 1) if solver in errors else values
        scores = {solver: float(errors[solver].mean(1).clamp_min(1e-300).log().sum()) for solver in left}
        left.sort(key=scores.__getitem__)
        count = wanted
    if targets == 1:
        choices = [_choice(solver, left, errors, len(errors)) for solver in left]
        starts = [Start(solver, (1.0,), choice) for solver, choice in zip(left, choices, strict=True)]
        return starts + [Start(solver, (1.0,)) for solver in out]
    return [Start(solver, tuple(errors[solver].median(1).values.clamp_min(1e-300).tolist())) for solver in left + out]


def rounds_of(tables: int, rollouts: int, most: int, first: int = 1) -> list[tuple[int, int]]:
    """(samples so far, tables) of each round, beside which the best hand-made table runs in all but the first.

    As many tables begin as so many rollouts of one sample bring down to two, or to the last sample; what is left then
    goes into more samples. A single one, where they pay for no second, takes all, at least one.
    """
    if most < first:
        return []
    counts = [first]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, int(GROWN * counts[-1]))))
    for begun in range(tables, 1, -1):
        found: list[tuple[int, int]] = []
        before, left = 0, rollouts
        for k, wanted in enumerate(counts):
            kept = max(2, math.ceil(begun * KEPT**k))
            run = min(begun, kept + (k > 0))
            more = min(wanted - before, left // run)
            if not more:
                break
            before, left = before + more, left - more * run
            found.append((before, kept))
        if before == most or (found and found[-1][1] == 2):
            return found
    return [(max(1, min(most, rollouts)), 1)]


def _errors(solver: Solver, samples: Samples, wanted: Tensor, room: Room) -> Tensor:
    """(B,) float64 mean squares of the samples' end points; ``LOST`` where they diverge."""
    found: list[Tensor] = []
    for part in room.over(slice(0, len(samples))):
        with part as rows:
            some = samples.rows(rows)
            noise = some.noise
            table = StepTable.of(solver, guidance=some.guidance, dtype=noise.dtype, device=noise.device)
            try:
                run = Rollout(some.denoiser(), noise, table.weights, table.times, both=table.both, wrt=())
                error = squares(run.states[:, -1], wanted[rows])
            except FloatingPointError:
                error = torch.full((len(some),), LOST, dtype=torch.float64)
            found.append(error.nan_to_num(nan=LOST, posinf=LOST).clamp_max(LOST))
    return torch.cat(found)


def _cut(ranking: list[Solver], count: int) -> tuple[list[Solver], list[Solver]]:
    """The first ones, with the first hand-made one, which tells what they are worth; and the others."""
    kept, gone = ranking[:count], ranking[count:]
    if not any(table.source == HANDMADE for table in kept):
        best = next((table for table in gone if table.source == HANDMADE), None)
        if best is not None:
            kept, gone = [*kept, best], [table for table in gone if table is not best]
    return kept, gone


def _choice(solver: Solver, left: Sequence[Solver], errors: Mapping[Solver, Tensor], tables: int) -> Choice | None:
    """How a table of a single target stands to the best hand-made one among those left."""
    rivals = [table for table in left if table.source == HANDMADE and table in errors]
    if not rivals:
        return None
    theirs = torch.cat([errors[table] for table in rivals])
    best = rivals[int(theirs.mean(1).argmin())]
    return Choice(best.name, *ratio_of(errors[solver][0], theirs), len(errors[solver][0]), tables)


def parts_of(sizes: Sequence[int], samples: slice, draws: Draws) -> Iterator[tuple[int, slice, slice]]:
    """The batches in which some samples stand: their number, the rows of them that this process has, and the places of
    these among those asked for."""
    first, rank, world = 0, draws.rank, draws.world
    for number, size in enumerate(sizes):
        low, high = max(samples.start - first, 0), min(samples.stop - first, size)
        rows = slice(-((rank - low) // world), -((rank - high) // world))  # of those whose number is rank, modulo world
        if rows.start < rows.stop:
            place = first + rows.start * world + rank - samples.start
            yield number, rows, slice(place, place + (rows.stop - rows.start - 1) * world + 1, world)
        first += size


def of_different_spacings(starts: Sequence[Start]) -> list[Start]:
    """The first start on each spacing, and with each choice of the steps that call both branches; a table moved to
    other sizes is one."""
    known: dict[object, Start] = {}
    for start in starts:
        name = start.solver.name.partition("@")[0]
        spacing = name if "moved" in start.solver.provenance else start.solver.timesteps
        known.setdefault((spacing, start.solver.guided_steps), start)
    return list(known.values())


def respaced(timesteps: Tensor, num_steps: int) -> Tensor:
    """The spacing of one table carried over to another number of steps: linear in the step's fraction. float64."""
    old = torch.linspace(0, 1, len(timesteps), dtype=torch.float64)
    new = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    k = torch.searchsorted(old, new, right=True).sub(1).clamp(0, len(old) - 2)
    fraction = (new - old[k]) / (old[k + 1] - old[k])
    u = timesteps[k] + fraction * (timesteps[k + 1] - timesteps[k])
    u[0], u[-1] = 0, 1
    return u
