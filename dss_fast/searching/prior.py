"""Prior: where the tables of many models lie, around the one of the library and the size of a model's data.

A few samples say little about dozens of numbers. How fast errors grow around a table in each direction is much the same
on all models, in the coordinates of ``X0Form``, where the size of the data is one factor:

    charge(theta) = weight / 2 * (phi(theta) - phi_0)' C (phi(theta) - phi_0)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..solver import Solver
from ..x0form import X0Form
from .space import Space

LEAST = 1e-6  # u of the first call: at 0 its noise level is infinite and has no derivative
CURVATURES = Path(__file__).parents[1] / "solvers" / "general.safetensors"


def coordinates(form: X0Form) -> Tensor:
    """phi of a table, (2 N + N (N + 1) / 2,): all but its second part, the logarithms of N - 1 noise levels, are the
    same for data of any size."""
    told, rows = form.told, torch.tril_indices(len(form.told), len(form.told))
    last = torch.cat([told[1:], told[-1:]])
    return torch.cat([told[1:2] / told[:1], told[1:].log(), form.weights[rows[0], rows[1]], form.excess / last])


def directions(space: Space, theta: Tensor) -> Tensor:
    """d phi / d theta, (2 N + N (N + 1) / 2, P)."""

    def phi(theta: Tensor) -> Tensor:
        return coordinates(X0Form.of(space.schedule, space.numbers(theta)))

    raws, triangle, noise, shares, times = theta.split(space.sizes())
    beside = torch.cat([raws, triangle, noise, shares, times.clamp_min(LEAST)])
    found: Tensor = torch.autograd.functional.jacobian(phi, beside)
    return found


def sizeless(curvature: Tensor, num_steps: int) -> Tensor:
    """The curvature without that along the size of the data, which is chosen and not known beforehand."""
    size = curvature.new_zeros(len(curvature))
    size[1:num_steps] = 1
    along = curvature @ size
    return curvature - torch.outer(along, along) / (size @ along).clamp_min(1e-300)


@lru_cache(1)
def curvatures() -> Mapping[str, Tensor]:
    """By the number of steps: the mean over the library's models of J'J at its table, over the error there."""
    return load_file(CURVATURES) if CURVATURES.exists() else {}


def curvature(space: Space, start: Solver) -> Tensor | None:
    """(P, P) around the start of a search, relative to its error; None where nothing is known of where to stay: the
    start is no table of the library."""
    return curvature_at(space, start) if "moved" in start.provenance else None


def curvature_at(space: Space, start: Solver) -> Tensor | None:
    """(P, P) around any table; None for a number of steps of which the library has none."""
    known = curvatures().get(str(space.num_steps))
    if known is None:
        return None
    rows = directions(space, space.theta(start))
    return rows.mT @ sizeless(known.double(), space.num_steps) @ rows
