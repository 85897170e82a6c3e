"""Ledger: model evaluations spent, and the budget they must stay within."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


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
        """Counts work that a resumed search repeats or finds in a cache; ``what`` names it."""
        if what not in self.counted:
            self.counted.add(what)
            self.spend(evaluations)

    def affords(self, evaluations: float) -> bool:
        """Whether the budget allows that many more."""
        return self.budget is None or self.evaluations + evaluations <= self.budget

    def restore(self, evaluations: int, counted: Iterable[str]) -> None:
        """Goes on from what an interrupted search had spent."""
        self.evaluations, self.counted = evaluations, set(counted)
