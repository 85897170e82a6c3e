"""What a search tells: an Event after each unit of work, and in the end a SearchResult."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..plots import Curves, plot_overview
from ..solver import Solver

COUNTED = "evaluations"  # what ``done`` counts when an event does not say


@dataclass(frozen=True)
class Event:
    """What is told after a unit of work; the fields from ``num_steps`` on are a line of log.jsonl, where they say
    anything.

    stage: a word. done, total: units of work, for the progress bar; unit: their name in the plural. solvers: by N, the
    best found so far; starts: the tables they began from. state: all that a resumed search needs to go on bit for bit,
    nested dicts and lists of tensors, numbers, strings and solvers; None: not yet worth saving. complete: whether
    nothing is left to do, whatever the budget.

    num_steps: the N that was worked on. loss, held_out: by N, the RMSE on the samples of this round, and on those
    never trained on. accepted: whether the candidate is the new table. damping: of the next step; gain: the part of
    the loss it should take away. samples: of the training set; used: those of this round. start: name of the table to
    start from. evaluations: of the model so far. time: seconds since 1970.
    """

    stage: str
    done: int
    total: int | None
    solvers: Mapping[int, Solver]
    starts: Mapping[int, Solver] = field(default_factory=dict)
    state: dict[str, Any] | None = field(default=None, repr=False)
    complete: bool = False
    unit: str = COUNTED
    num_steps: int | None = None
    loss: Mapping[int, float] = field(default_factory=dict)
    held_out: Mapping[int, float] = field(default_factory=dict)
    accepted: bool | None = None
    damping: float | None = None
    gain: float | None = None
    samples: int | None = None
    used: int | None = None
    start: str | None = None
    choice: str | None = None
    evaluations: int = 0
    time: float = 0.0

    def told(self) -> Event:
        """Without what only the next events need: as a history keeps it."""
        return replace(self, solvers={}, starts={}, state=None, complete=False, unit=COUNTED)

    def to_dict(self) -> dict[str, Any]:
        """The line of the log, JSON data."""
        names = [f.name for f in fields(self)]
        logged = ("stage", "done", "total", *names[names.index("num_steps") :])
        values = {name: getattr(self, name) for name in logged}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Event:
        """What :meth:`to_dict` returned, after a way through JSON, which has strings for keys."""
        by_n = {key: {int(n): v for n, v in line.get(key, {}).items()} for key in ("loss", "held_out")}
        known = {f.name for f in fields(cls)}
        return cls(**{"total": None, "solvers": {}, **{k: v for k, v in line.items() if k in known}, **by_n})


@dataclass
class SearchResult:
    """What a search found.

    solvers: by number of steps; starts: the tables it began from. history: an Event per unit of work. evaluations: of
    the model: forward 1, backward 2, guidance counts once. interrupted: ended by Ctrl-C. out: the run folder.
    """

    solvers: dict[int, Solver]
    history: list[Event] = field(repr=False)
    evaluations: int = 0
    interrupted: bool = False
    out: Path | None = None
    starts: dict[int, Solver] = field(default_factory=dict, repr=False)

    @property
    def solver(self) -> Solver:
        """The solver, when one number of steps was searched."""
        if len(self.solvers) != 1:
            raise ValueError(f"{len(self.solvers)} solvers were searched; choose: solvers[{list(self.solvers)}]")
        return next(iter(self.solvers.values()))

    @property
    def seconds(self) -> float:
        """From the first event to the last, pauses of a resumed search included."""
        return self.history[-1].time - self.history[0].time if self.history else 0.0

    def __str__(self) -> str:
        lines = []
        for n, solver in self.solvers.items():
            _, errors = self.curve("held_out", n)
            gain = f": held-out RMSE {min(errors):.4g}, {errors[0]:.4g} at the start" if errors else ""
            lines.append(f"{solver.name}{gain}")
            lines += [f"  began at {e.start}, {e.choice}" for e in self.history if e.num_steps == n and e.choice]
        where = f", in {self.out}" if self.out else ""
        where += "; report.html there says what was gained" if self.out and (self.out / "report.html").exists() else ""
        return "\n".join([*lines, f"{self.evaluations:,} model evaluations{where}"])

    def curve(self, key: str, num_steps: int) -> tuple[list[int], list[float]]:
        """Evaluations and values of ``"loss"`` or ``"held_out"`` over the search, for one number of steps."""
        pairs = [(event.evaluations, getattr(event, key).get(num_steps, math.nan)) for event in self.history]
        found = [(at, value) for at, value in pairs if not math.isnan(value)]
        return [at for at, _ in found], [value for _, value in found]

    def curves(self) -> dict[str, Curves]:
        """Both curves of every N, by their keys."""
        return {key: {n: self.curve(key, n) for n in self.solvers} for key in ("loss", "held_out")}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws loss curve, coefficients and timesteps of every solver into a picture file."""
        plot_overview(self.solvers, **self.curves(), path=path)
