"""Plan: what a search will take, said before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..draws import Draws, targets_of
from ..target import Model, Target
from .lion import Lion
from .probe import Cost, probe
from .two_stage import GaussNewton

# RMSE over the best hand-made solver's, by evaluations for each N: the mean over N = 5, 8, 10 on the exact mixture and
# both MNIST models, for 10,000 and 40,000 over fewer of them (benchmarks/README.md).
EXPECTED = ((1_000, 0.94), (3_000, 0.79), (10_000, 0.65), (40_000, 0.55), (120_000, 0.49))
UNITS = {"s": 1, "sec": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Plan:
    """What a search will take, from one forward and one backward of the model.

    num_steps: the Ns. evaluations: model evaluations at most, None without a limit. samples: of the training set, None
    where the method has no plan. cost: of an evaluation, measured. batch_size: samples whose graphs are alive at once.
    """

    num_steps: tuple[int, ...]
    evaluations: int | None
    samples: int | None
    cost: Cost
    batch_size: int

    @property
    def minutes(self) -> float:
        """Expected, of the whole search on this machine."""
        return math.inf if self.evaluations is None else self.evaluations * self.cost.seconds / 60

    @property
    def memory(self) -> int:
        """Bytes of the largest backward, beside the model itself: the graph of one call for a batch."""
        return self.cost.saved * self.batch_size

    def __str__(self) -> str:
        lines = [
            f"N = {', '.join(map(str, self.num_steps))}: {1000 * self.cost.seconds:.3g} ms a model evaluation, "
            f"{gigabytes(self.memory)} for a backward of {self.batch_size} samples"
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
    num_steps: int | Sequence[int],
    *,
    method: GaussNewton | Lion | None = None,
    budget: int | None = None,
) -> Plan:
    """What ``search`` with the same arguments will take. Costs 8 model evaluations for
    each target."""
    steps = (num_steps,) if isinstance(num_steps, int) else tuple(num_steps)
    draws = Draws.of(targets_of(target))
    return planned(draws, GaussNewton() if method is None else method, steps, budget, probe(draws, True))


def planned(draws: Draws, settings: GaussNewton | Lion, steps: tuple[int, ...], budget: int | None, cost: Cost) -> Plan:
    """The plan of a search whose model was measured."""
    budget = settings.budget(steps) if budget is None else budget
    samples, size = settings.samples, settings.batch_size
    if isinstance(settings, GaussNewton) and budget is not None:
        samples, held_out, _ = settings.sizes(draws, budget, steps)
        size, _ = settings.batches(draws, samples, held_out)
    return Plan(steps, budget, samples, cost, size)


def evaluations_in(limit: str, cost: Cost) -> int:
    """How many evaluations fit a time like ``"20min"``. Raises ValueError for what is no time."""
    number = limit.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = limit[len(number) :].strip()
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"budget={limit!r}: give evaluations, or a time such as '20min' ({', '.join(UNITS)})")
    return max(1, int(seconds / cost.seconds))


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


def gigabytes(size: float) -> str:
    """A size in words, to three digits."""
    return f"{size / 2**30:.3g} GB" if size >= 2**28 else f"{size / 2**20:.3g} MB"
