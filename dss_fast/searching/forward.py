"""Forward: a search that only calls the model, along the few directions in which a table's numbers matter most.

Without a backward J'J and the gradient are exact in the coordinates z of a basis, theta + basis z, by differences:

    J_k = (r(theta + h d_k) - r(theta)) / h          d_k the basis' columns

How fast errors grow around a table is much the same on all models (``prior``), so that the library knows the basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solver import Solver
from .prior import curvature_at, curvatures
from .space import Space

# Samples of a round: more rounds of fewer serve better. Of the gradient's error at 3,000 evaluations, the mean over
# four models and N = 5 and 8: 6 directions and twelve samples leave 1.25, 12 directions 1.19, with six samples 1.12, 16
# and four samples 1.06, 3 N and four samples 1.02.
LEAST = 4
# Directions are 3 N: at N = 8 on the mixture of width .5 24 leave .63 of the best hand-made error, 16 leave .75. They
# are fewer where a round of LEAST samples would take more than this part of the budget: at 1,000 evaluations 3 N leave
# .58 in the mean, which is a choice without rounds, and so many .53. FEWEST is the least.
PER_STEP, SHARE, FEWEST = 3, 1 / 4, 4
FLAT = 1e-6  # of the largest curvature: what is less is no direction
DIFFERENCE = 0.1  # of z; 1 adds once the error of the start


def afforded(budget: int, steps: Sequence[int]) -> int:
    """How many directions a budget for these numbers of steps pays for."""
    return max(FEWEST, int(SHARE * budget / (LEAST * sum(steps))) - 1)


def directions_of(num_steps: int, most: int | None = None) -> int:
    """How many directions at most, and so how many rollouts of N steps beside the one at the table; ``most`` that the
    budget pays for."""
    return PER_STEP * num_steps if most is None else min(PER_STEP * num_steps, most)


def check_known(steps: Sequence[int], calls: int | None = None) -> None:
    """Raises ValueError for numbers of steps of which the library has no table, and for calls that are to be placed."""
    if calls is not None:
        raise ValueError(
            f"calls={calls}: which steps call both branches is found by a gradient, and none is taken; give num_steps"
        )
    known = sorted(map(int, curvatures()))
    if missing := [n for n in steps if n not in known]:
        raise ValueError(
            f"num_steps={missing[0]}: without a gradient a search moves along directions that the library knows for N "
            f"in {known}; choose one of these, or choose among the tables there are: "
            "method=GaussNewton(rounds=0), which fit(...) is"
        )


def basis_of(space: Space, start: Solver, most: int | None = None) -> Tensor:
    """(P, q) float64, q at most ``most``: the eigenvectors of largest curvature C around a table, d'Cd = 1 of each."""
    known = curvature_at(space, start)
    if known is None:
        raise ValueError(f"num_steps={space.num_steps}: the library knows no directions for it")
    values, vectors = torch.linalg.eigh(known)
    count = min(directions_of(space.num_steps, most), int((values > FLAT * values[-1]).sum()))
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    scaled: Tensor = (vectors / values.sqrt()).contiguous()  # as a checkpoint keeps it: sums round by layout
    return scaled
