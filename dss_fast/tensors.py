"""SolverTensors: the numbers of a solver as tensors, on which tables, forms and searches compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SolverTensors:
    """float64, differentiable; None as in :class:`~dss_fast.Solver`, whose fields these are.

    timesteps: (N + 1,) u from 0 to 1. coeffs: (N, N), lower triangular. noise_coeffs: (N,) weights on the initial
    noise, scaled by b like the rest. network_timesteps: (N,) u to call the network at, if not the solver's own.
    guided_steps, guidance_coeffs: which steps call both branches, and V (N, N), lower triangular. None: all, and c.
    """

    timesteps: Tensor
    coeffs: Tensor
    noise_coeffs: Tensor | None = None
    network_timesteps: Tensor | None = None
    guided_steps: tuple[int, ...] | None = None
    guidance_coeffs: Tensor | None = None

    @property
    def told(self) -> Tensor:
        """(N,) the u of the times that the network is told."""
        return self.timesteps[:-1] if self.network_timesteps is None else self.network_timesteps

    def fields(self) -> dict[str, Any]:
        """The same as a Solver takes it: lists of numbers."""
        return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(self).items()}
