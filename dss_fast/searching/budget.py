"""What a search may spend, what it has spent, and what a model evaluation costs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .processes import from_first
from .result import Event
from .settings import GaussNewton, Method

UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
LEARNT = 0.1  # of a time, after which the speed of the search itself counts
PAPER_SHARE = 1 / 50  # default budget, of the paper's 50,000 samples x (100 + 3 N)


@dataclass
class Ledger:
    """What a search has spent, over all processes: forward 1, backward 2, per sample.

    The unconditional branch of guidance is not counted (arXiv 2505.21114 counts so).

    budget: the most evaluations to spend. None: no limit. counted: names of the work that is counted once.
    """

    budget: int | None = None
    evaluations: int = 0
    counted: set[str] = field(default_factory=set, repr=False)

    def spend(self, evaluations: int) -> None:
        """Counts model evaluations."""
        self.evaluations += int(evaluations)

    def spend_once(self, what: str, evaluations: int) -> None:
        """Counts work that a resumed search does again; ``what`` names it."""
        if what not in self.counted:
            self.counted.add(what)
            self.spend(evaluations)

    def affords(self, evaluations: float) -> bool:
        """Whether the budget allows that many more."""
        return self.budget is None or self.evaluations + evaluations <= self.budget

    def restore(self, evaluations: int, counted: Iterable[str]) -> None:
        """Goes on from what an interrupted search had spent."""
        self.evaluations, self.counted = evaluations, set(counted)


@dataclass(frozen=True)
class Cost:
    """What one model evaluation of one sample takes.

    seconds; saved: bytes that its graph keeps for a backward; recomputed: with the network's gradient checkpointing on.
    calls: evaluations spent to learn it.
    """

    seconds: float
    saved: int
    recomputed: bool = False
    calls: int = 0


def gigabytes(size: float) -> str:
    """A size in words, to three digits."""
    return f"{size / 2**30:.3g} GB" if size >= 2**28 else f"{size / 2**20:.3g} MB"


def default_budget(settings: Method, steps: tuple[int, ...]) -> int | None:
    """The evaluations spent when the user sets no limit: a fiftieth of the paper's, 1000 (100 + 3 N) for each N; None
    for the paper's recipe, whose samples settle them."""
    if not isinstance(settings, GaussNewton):
        return None
    return int(sum(50_000 * (100 + 3 * n) for n in steps) * PAPER_SHARE)


def seconds_in(limit: str) -> float:
    """The seconds of a time like ``"20min"``. Raises ValueError for what is not a duration."""
    number = limit.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = limit[len(number) :].strip()
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"budget={limit!r}: give evaluations, or a time such as '20min' ({', '.join(UNITS)})")
    return seconds


def evaluations_in(limit: str, cost: Cost) -> int:
    """How many evaluations fit a time like ``"20min"``. Raises ValueError for what is not a duration."""
    return max(1, int(seconds_in(limit) / cost.seconds))


def clocked(events: Iterable[Event], ledger: Ledger, limit: str, began: float) -> Iterator[Event]:
    """The same events, between which what is left of a time becomes evaluations again, at the speed seen so far.

    The first ``LEARNT`` of the time says too little: the first calls of a network are slow, and the teacher's, without
    a way back, are fast. began: time.monotonic() when the search did.
    """
    seconds, before, start = seconds_in(limit), ledger.evaluations, time.monotonic()
    for event in events:
        yield event
        now, done = time.monotonic(), ledger.evaluations - before
        if done and now - began > LEARNT * seconds:
            rest = max(0.0, seconds - (now - began)) * done / (now - start)
            ledger.budget = from_first(lambda rest=rest: ledger.evaluations + int(rest))  # type: ignore[misc]
