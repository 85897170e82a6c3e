"""Best: the table of least held-out loss so far, whatever moves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Best:
    """theta (P,), and its held-out loss; infinite where no look was ever taken."""

    theta: Tensor
    loss: float = math.inf


def better(
    best: Best | None, theta: Tensor, loss: float, charge: Callable[[Tensor], float] = lambda theta: 0.0
) -> Best | None:
    """Theta where its loss and charge are below those of the best, which stays otherwise."""
    known = math.inf if best is None else best.loss + charge(best.theta)
    return Best(theta.clone(), loss) if loss + charge(theta) < known else best
