"""An adaptive Runge-Kutta solver, scipy's RK45, as a rival that is known by the calls it took.

It is Dormand and Prince's pair, what flow_matching and torchdiffeq call dopri5, on the sampling ODE in u,

    dx/du = alpha' x0 + sigma' eps

of a whole batch at once, by one error norm, as these libraries run it. A tolerance is chosen, and not a number of
calls: they are two and six for each step, accepted or not, eight at the least.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .methods import LAST_U
from .schedule import Schedule

NAME = "rk45"
# Relative and absolute, loose to tight: the next one takes about a half more calls where the fifth order shows.
TOLERANCES = tuple(math.pow(10, -k / 3) for k in range(25))
MOST_CALLS = 2_000  # a run that takes more does not arrive

Predict = Callable[[Tensor, Tensor], Tensor]


def missing() -> str:
    """What keeps RK45 from running, "" where nothing does."""
    if importlib.util.find_spec("scipy") is None:
        return "rk45 needs scipy, which is not installed: pip install scipy; its rows are left out"
    return ""


def solve(predict: Predict, x: Tensor, schedule: Schedule, end: float, tolerance: float) -> tuple[Tensor, int]:
    """The samples (B, *S) from noise x, and the calls it took.

    predict(x, u) -> y, as of :meth:`dss_fast.target.Samples.predictor`. end: the last u that the network is told. From
    there, or ``LAST_U`` before the end where a flow's network may have no value, DDIM's step with the last call's
    prediction ends the run. tolerance: relative and absolute, as ``rtol`` and ``atol``.

    Raises FloatingPointError where it does not arrive within ``MOST_CALLS``, or the model returns NaN or Inf.
    """
    from scipy.integrate import RK45

    last, start = min(end, 1 - LAST_U), 0.0

    def velocity(u: float, flat: Any) -> Any:
        state = torch.from_numpy(flat).reshape(x.shape).to(x)
        of_x, of_y = _slope(schedule, u)
        slope = of_x * state + of_y * predict(state, torch.tensor(u, dtype=torch.float64))
        return slope.double().flatten().cpu().numpy()

    run = RK45(velocity, start, x.double().flatten().cpu().numpy(), last, rtol=tolerance, atol=tolerance)
    while run.status == "running" and run.nfev <= MOST_CALLS:
        run.step()
    if run.status != "finished":
        raise FloatingPointError(f"{NAME} did not arrive within {MOST_CALLS:,} calls at tolerance {tolerance:.1g}")
    of_x, of_y = _slope(schedule, last)
    state, slope = (torch.from_numpy(part).reshape(x.shape) for part in (run.y, run.f))
    a, b = (float(part) for part in schedule.transition(torch.tensor([last, 1.0], dtype=torch.float64)))
    return (a * state + b * (slope - of_x * state) / of_y).to(x), int(run.nfev)


def nearest(calls: Callable[[float], int], wanted: int) -> float:
    """The tolerance, loosest first, whose calls come nearest to those wanted."""
    best, least = TOLERANCES[0], sys.maxsize
    for tolerance in TOLERANCES:
        taken = calls(tolerance)
        if abs(taken - wanted) < least:
            best, least = tolerance, abs(taken - wanted)
        if taken >= wanted:
            break
    return best


def _slope(schedule: Schedule, u: float) -> tuple[float, float]:
    """dx/du = first * x + second * y."""
    with torch.enable_grad():
        at = torch.tensor(u, dtype=torch.float64, requires_grad=True)
        alpha, sigma = schedule.alpha_sigma(at)
        (rise,) = torch.autograd.grad(alpha, at, retain_graph=True)
        (fall,) = torch.autograd.grad(sigma, at)
    alpha, sigma = alpha.detach(), sigma.detach()
    r, s = schedule.x0(at.detach())
    first, second = rise * r + fall * (1 - alpha * r) / sigma, rise * s - fall * alpha * s / sigma
    return float(first), float(second)
