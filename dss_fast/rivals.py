"""Rivals: what a table has to beat. Every hand-made table there is, the best of them found in two rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from .methods import METHODS, calls_within, grid
from .names import Name, families, find_solver, library, published_steps
from .schedule import Schedule
from .solver import Solver

SPACINGS = ("uniform", "shift2", "shift3", "shift1.5", "lambda", "shift0.5", "karras")
# Where not all can be tried these come first. Flows: first or second of all on the shipped models, N = 3 to 10. VP: so
# that the best of the first few is near the best of all on models of the zoo in VP coordinates, N = 5, 8, 10.
LIKELY = {
    "flow": ("ab3", "ab2", "ab3_uniform@shift2", "ab2@shift2", "ab2@shift3", "ab3@shift1.5", "ab2@shift1.5"),
    "vp": (
        "ab2_uniform@shift0.5",
        "ab3_uniform@shift0.5",
        "ab3_uniform@lambda",
        "ab4_uniform@shift0.5",
        "dpmpp_2m@shift0.5",
        "unip3@shift0.5",
        "ab3_uniform",
    ),
}
# A quarter of the samples, and at least so many, ranks all names; the last so many run on all. Errors have heavy tails:
# where two to sixteen samples ranked them, the best so found erred up to 76 % more than the best of all.
FIRST, FINALISTS = 24, 12
# A search begins from tables of these; the others, rivals alone, came after the figures of the searches.
STARTS = tuple(method for method in METHODS if method not in ("unipc", "unipc3", "heun"))
FEWEST = 4  # are tried, whatever the limit

Errors = Callable[[Solver, int, int], Tensor]  # (table, start, stop) -> (stop - start,) float64, inf where it diverges


@lru_cache(32)  # half a second for N = 10: 112 tables are more than ``find_solver`` keeps
def handmade_tables(
    schedule: Schedule, num_steps: int, methods: tuple[str, ...] = tuple(METHODS)
) -> Mapping[Solver, int]:
    """Every hand-made table of N calls, likely ones first, and by how many of the names method@spacing it goes.

    methods: those of all names. Heun's, whose calls are odd, is of one call less where N is even.
    """
    names = [name if "@" in name else f"{name}@uniform" for name in LIKELY[schedule.family]]
    for spacing in SPACINGS:
        if bool((grid(num_steps, schedule, spacing).diff() > 0).all()):
            names += [f"{method}@{spacing}" for method in methods]
    found: dict[Solver, int] = {}
    for name in dict.fromkeys(names):
        table = find_solver(name, schedule, calls_within(name.partition("@")[0], num_steps))
        found[table] = found.get(table, 0) + 1
    return MappingProxyType(found)


def published_tables(schedule: Schedule, num_steps: int) -> list[Solver]:
    """The published tables of N steps that run on the schedule, moved along with a flow's shift."""
    found = []
    for name in _papers():
        if num_steps in published_steps(name):
            table = find_solver(f"{name}/{num_steps}")
            try:
                found.append(table.following(schedule))
            except ValueError:  # another family or another path
                continue
    return found


def _papers() -> list[str]:
    """The published tables' names; those of the library are what a search may return, and no rivals of it."""
    return [name for name in families() if name not in library()]


def is_rival(solver: Solver) -> bool:
    """Whether a solver is hand-made or a published table, by what it says of its source and not by its name."""
    return solver.source == "hand-made" or any(solver.source == p.source and solver == p for p in _published(solver))


def _published(solver: Solver) -> Iterator[Solver]:
    """The published tables of a solver's family and N, moved as it says it was."""
    k = solver.provenance.get("moved", 1.0)
    for name in _papers():
        if solver.num_steps in published_steps(name):
            table = find_solver(f"{name}/{solver.num_steps}")
            if table.family == solver.family and isinstance(k, float):
                yield table if k == 1 else table.moved(k, solver.schedule)


@dataclass(frozen=True, eq=False)
class Contest:
    """The best hand-made tables of one N on all samples: table -> (S,) mean squares, best first; and how many names
    were tried of how many there are."""

    best: dict[Solver, Tensor]
    tried: int
    known: int


def contest(errors: Errors, schedule: Schedule, num_steps: int, samples: int, limit: float = math.inf) -> Contest:
    """The last ``FINALISTS`` of all hand-made tables, or of the first ones, as many as ``limit`` evaluations allow."""
    tables = handmade_tables(schedule, num_steps)
    count = len(tables)
    while count > FEWEST and num_steps * contest_cost(count, samples) > limit:
        count -= 1
    chosen = list(tables)[:count]
    return Contest(halved(errors, chosen, samples), sum(tables[t] for t in chosen), sum(tables.values()))


def halved(errors: Errors, tables: Sequence[Solver], samples: int) -> dict[Solver, Tensor]:
    """The best of some tables on all samples, least mean square first."""
    known = {table: torch.empty(0, dtype=torch.float64) for table in tables}
    before = 0
    for count, wanted in _rounds(len(tables), samples):
        ranking = sorted(known, key=lambda table: float(known[table].sum()))[:count]
        known = {table: torch.cat([known[table], errors(table, before, wanted)]) for table in ranking}
        before = wanted
    return {table: known[table] for table in sorted(known, key=lambda table: float(known[table].sum()))}


def contest_cost(tables: int, samples: int) -> int:
    """Runs of one sample that :func:`halved` takes."""
    cost, before = 0, 0
    for count, wanted in _rounds(tables, samples):
        cost, before = cost + count * (wanted - before), wanted
    return cost


def ranked_on(samples: int) -> int:
    """On how many of the samples all names are ranked."""
    return min(samples, max(FIRST, samples // 4))


def _rounds(tables: int, samples: int) -> list[tuple[int, int]]:
    """How many tables run in each round, and up to which sample."""
    first = ranked_on(samples)
    if tables <= FINALISTS or samples <= first:
        return [(tables, samples)]
    return [(tables, first), (FINALISTS, samples)]


def calls_like(
    errors: Errors, schedule: Schedule, best: Mapping[Solver, Tensor], mine: Tensor, limit: float = math.inf
) -> tuple[int, str | None]:
    """How many calls the hand-made methods that are best at N need to err no more than a table of N does.

    best: their tables of N, and errors; mine: those of the table, (S,). Each number of calls from N + 1 to 2 N + 2 is
    tried with the same names on all samples, as far as ``limit`` evaluations go. Returns the first at which one errs no
    more, and its name; or the most calls that were tried, at which all still err more, and None.
    """
    names = list(dict.fromkeys(replace(Name.parse(table.name), num_steps=None) for table in best))
    n = max(table.num_steps for table in best)
    for calls in range(n + 1, 2 * n + 3):
        limit -= calls * len(names) * len(mine)
        if limit < 0:
            return calls - 1, None
        tables = [
            find_solver(f"{name.name}@{name.spacing or 'uniform'}", schedule, calls_within(name.name, calls))
            for name in names
        ]
        least, name = min((float(errors(table, 0, len(mine)).mean()), table.name) for table in tables)
        if least <= float(mine.mean()):
            return calls, name
    return 2 * n + 2, None
