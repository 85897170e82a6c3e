"""Grid: a noise schedule known only at the points a host program visits, as a list of sigmas gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """alpha, sigma and the network's time at N + 1 points; point i stands at u = i / N.

    Hand-made solvers need no more than this, so that one can be built on any grid of any host. Between the
    points alpha, sigma and time are interpolated linearly.

    alphas, sigmas: (N + 1,) with x = alpha * x0 + sigma * epsilon; sigma / alpha falls strictly.
    times: (N,) or (N + 1,), what the network is called with.
    family, prediction_type, convention: as in :mod:`dss_fast.schedule`.

    Raises ValueError when the grid does not fall or the lengths do not fit.
    """

    alphas: tuple[float, ...] = field(repr=False)
    sigmas: tuple[float, ...]
    times: tuple[float, ...] = field(repr=False)
    family: str = "vp"
    prediction_type: str = "epsilon"
    convention: str = "paper"

    def __post_init__(self):
        for key in ("alphas", "sigmas", "times"):
            object.__setattr__(self, key, tuple(float(v) for v in getattr(self, key)))
        n = len(self.sigmas) - 1
        if n < 1 or len(self.alphas) != n + 1 or len(self.times) not in (n, n + 1):
            raise ValueError(
                f"a grid of {len(self.sigmas)} sigmas (at least 2) needs as many alphas and a time per step, got "
                f"{len(self.alphas)} and {len(self.times)}"
            )
        for i, ((a, s), (a_next, s_next)) in enumerate(pairwise(zip(self.alphas, self.sigmas, strict=True))):
            # sigma / alpha, multiplied out because alpha is 0 where a flow starts
            if not s * a_next > s_next * a or s_next < 0:
                raise ValueError(
                    f"the noise must fall at every step; at step {i} sigma goes from {s:.6g} to {s_next:.6g}"
                )

    @classmethod
    def flow(cls, sigmas: Sequence[float], times: Sequence[float], **options) -> Grid:
        """alpha = 1 - sigma; a network that speaks diffusers' convention unless told otherwise."""
        options = {"prediction_type": "velocity", "convention": "diffusers", **options}
        return cls([1 - float(s) for s in sigmas], sigmas, times, family="flow", **options)

    @classmethod
    def ve(cls, sigmas: Sequence[float], **options) -> Grid:
        """alpha = 1: k-diffusion's variance-exploding variables, with a network that returns x0."""
        return cls([1.0] * len(sigmas), sigmas, sigmas, **{"prediction_type": "x0", **options})

    @property
    def timesteps(self) -> Tensor:
        """The points in u, (N + 1,) float64: what ``handmade`` takes."""
        return torch.linspace(0, 1, len(self.sigmas), dtype=torch.float64)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at u, float64, u's shape."""
        return self._at(self.alphas, u), self._at(self.sigmas, u)

    def time(self, u: Tensor) -> Tensor:
        """The time the network is called with at u, float64, u's shape."""
        return self._at(self.times, u)

    def spec(self) -> dict:
        """The schedule as JSON data."""
        return {"kind": "grid", "family": self.family, "sigmas": list(self.sigmas)}

    def _at(self, values: tuple[float, ...], u: Tensor) -> Tensor:
        table = torch.tensor(values, dtype=torch.float64, device=u.device)
        place = u.double() * (len(self.sigmas) - 1)
        nearest = place.detach().round()
        # u = i / N is not exact: a point itself must give the host's own number, to the bit
        place = torch.where((place - nearest).abs() < 1e-9, nearest, place).clamp(0, len(table) - 1)
        lower = place.detach().floor().clamp_max(max(len(table) - 2, 0)).long()
        upper = (lower + 1).clamp_max(len(table) - 1)
        fraction = place - lower
        return torch.where(fraction == 0, table[lower], table[lower] * (1 - fraction) + table[upper] * fraction)
