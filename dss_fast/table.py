"""StepTable: the numbers that the steps of a run read, on one device, made in one place.

m_i     = m_uncond + guidance_i * (m_cond - m_uncond)
y_i     = p_i * x_i + q_i * m_i
x_{i+1} = a_i * x_i + sum_{j<=i} w_ij * y_j [+ w_iN * x_init]                 w_ij = b_i * c_ij

A table that calls the unconditional branch at some steps only has m_i = m_cond at the others, and weighs beside the
y_j what guidance has added to them, e_j = q_j * (guidance_j - 1) * (m_cond - m_uncond):

x_{i+1} = ... + sum_{j<=i, both} r_ij * e_j                                   r_ij = b_i * (V_ij - c_ij)

so that the conditional part of y_j is weighed by c and the difference by V. With both branches at all steps and V = c
the r_ij are zero, and it is the step above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .modes import kept, traced
from .schedule import Schedule
from .solver import Solver
from .tensors import SolverTensors

A, P, Q, GUIDANCE, HISTORY = range(5)  # the columns of a row; from HISTORY on they weigh the history
CACHED = 128  # tables kept, a few kilobytes each

Guidance = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class StepTable:
    """The flat tensors that kernels see, with names for their columns.

    weights: (R, N, 4 + K), float32 or float64: a, p, q, guidance, then K weights on the history, N predictions and,
        where the solver weighs it, the initial noise; K = 2 N + 1 where it forecasts: behind the noise's the N e_j.
        R = 1 for all samples, or B.
    times: (N,) or (B, N), what the network is told at each step, in weights' dtype.
    both: of each step whether it calls the unconditional branch too, where there is one. None: all do.
    """

    weights: Tensor
    times: Tensor
    both: tuple[bool, ...] | None = None

    @classmethod
    def build(cls, schedule: Schedule, numbers: SolverTensors, guidance: Guidance | None = 1.0) -> StepTable:
        """The table of any numbers, float64, differentiable in timesteps (its two ends are fixed) and coefficients.

        guidance: see :meth:`guided`. At the number 1 there is no difference to weigh, and V is left out. None: the
            scale is filled in later.
        """
        timesteps, coeffs, noise = numbers.timesteps, numbers.coeffs, numbers.noise_coeffs
        alone = isinstance(guidance, int | float) and guidance == 1
        u = torch.cat([timesteps[:1].detach(), timesteps[1:-1], timesteps[-1:].detach()]).double()
        a, b = schedule.transition(u)
        p, q = schedule.prediction(u[:-1])
        columns = [torch.stack([a, p, q, torch.ones_like(a)], 1), b[:, None] * torch.tril(coeffs.double())]
        if noise is not None:
            columns.append((b * noise.double())[:, None])
        both, steps, shares = None, numbers.guided_steps, numbers.guidance_coeffs
        if steps is not None and shares is not None and not alone:
            both = tuple(i in steps for i in range(len(b)))
            called = torch.tensor(both, dtype=torch.float64, device=b.device)
            columns += [torch.zeros_like(b)[:, None]] if noise is None else []
            columns.append(b[:, None] * torch.tril(shares.double() - coeffs.double() * called))
        times = schedule.time(u[:-1] if numbers.network_timesteps is None else numbers.network_timesteps)
        table = cls(torch.cat(columns, 1)[None], times, both)
        return table if alone or guidance is None else table.guided(guidance)

    @classmethod
    def of(
        cls,
        solver: Solver,
        schedule: Schedule | None = None,
        *,
        guidance: Guidance = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        strict: bool = True,
    ) -> StepTable:
        """The table of a solver for states of a dtype on a device; made once and kept.

        schedule: the model's; None: the solver's. strict: refuse a solver of another path, but where it can follow, see
        :meth:`Solver.following`; False: run it there at its own u.
        guidance: see :meth:`guided`. dtype: of the states; the table is float64 for float64 and float32 for the rest.
        """
        fixed = guidance if isinstance(guidance, int | float | tuple) else None
        real = torch.float64 if dtype == torch.float64 else torch.float32
        if traced():  # a kept table would be a stranger there: its numbers enter as constants
            table = _made(solver, schedule, fixed, real, strict)
            weights, times = (torch.tensor(t.tolist(), dtype=real) for t in (table.weights, table.times))
            table = cls(weights, times, table.both).to(device)
        else:
            table = _sent(solver, schedule, fixed, real, torch.device(device), strict)
        return table if fixed is not None else table.guided(guidance)

    @classmethod
    def idle(
        cls,
        rows: int,
        num_steps: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None,
        forecasts: bool = False,
    ) -> StepTable:
        """Rows of zeros, with a slot for the initial noise and, if asked, those of forecasts, that :meth:`padded`
        tables go into."""
        slots = num_steps + 1 + num_steps * forecasts
        weights = torch.zeros(rows, num_steps, HISTORY + slots, device=device, dtype=dtype)
        return cls(weights, torch.zeros(rows, num_steps, device=device, dtype=dtype))

    @property
    def num_steps(self) -> int:
        """N."""
        return self.weights.shape[1]

    @property
    def slots(self) -> int:
        """K, how many tensors the history holds: N, N + 1 with the initial noise last, or 2 N + 1 with the e_j."""
        return self.weights.shape[2] - HISTORY

    @property
    def weighs_noise(self) -> bool:
        """Whether the history's slot behind the predictions holds the initial noise."""
        return self.slots > self.num_steps

    @property
    def forecasts(self) -> bool:
        """Whether the history's last N slots hold what guidance added to each prediction, the e_j."""
        return self.slots > self.num_steps + 1

    def calls_both(self, step: int) -> bool:
        """Whether a step calls the unconditional branch too, where there is one."""
        return self.both is None or self.both[step]

    @property
    def history(self) -> Tensor:
        """(R, N, K) weights on the history."""
        return self.weights[:, :, HISTORY:]

    def new_history(self, noise: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, K, *S), empty but for the initial noise (B, *S), where the table weighs it."""
        history = noise.new_empty((len(noise), self.slots, *noise.shape[1:]), dtype=dtype or noise.dtype)
        if self.weighs_noise:
            history[:, self.num_steps] = noise
        return history

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> StepTable:
        """The table on a device, in float64 for float64 states and float32 for all others; differentiable."""
        real = None if dtype is None else torch.float64 if dtype == torch.float64 else torch.float32
        weights, times = (t.to(real).to(device, non_blocking=True) for t in (self.weights, self.times))
        return replace(self, weights=weights, times=times)

    def guided(self, scale: Guidance) -> StepTable:
        """The table with a guidance scale: a number, (N,) a value per step, (B, 1) one per sample or (B, N) both.

        Filled in on the table's device: a scale that lives there need not come back to the host. Where it is known on
        the host, a step at which it is 1 for all samples calls one branch alone.

        Raises ValueError for several scales along the steps of a table that forecasts.
        """
        weights, both = self.weights, self._called(scale)
        scale = torch.as_tensor(scale, dtype=weights.dtype).to(weights.device, non_blocking=True)
        scale = scale.expand(self.num_steps) if scale.ndim < 2 else scale.expand(-1, self.num_steps)
        scale = scale.reshape(-1, self.num_steps, 1)
        before, after = weights[:, :, :GUIDANCE], weights[:, :, HISTORY:]
        rows = len(scale)
        if self.both is not None:  # beside others that call both, a row's pair must be its conditional output here
            called = torch.tensor(self.both, device=scale.device)[:, None]
            scale = torch.where(called, scale, 1)
        weights = torch.cat([before.expand(rows, -1, -1), scale, after.expand(rows, -1, -1)], 2)
        return replace(self, weights=weights, both=both)

    def _called(self, scale: Guidance) -> tuple[bool, ...] | None:
        """Which steps call both branches at a scale; one that lives on a GPU, or is traced, may be anything."""
        if isinstance(scale, Tensor) and (scale.device.type != "cpu" or traced(scale)):
            return self.both
        known = torch.as_tensor(scale).detach()
        along = known.ndim > 0 and known.shape[-1] == self.num_steps
        if self.forecasts and along and bool((known != known[..., :1]).any()):
            raise ValueError(
                f"guidance_scale={known.tolist()!r}: this table calls the unconditional branch at some steps only and "
                "forecasts it at the others, which takes one scale for all steps"
            )
        if bool((known != 1).all()):
            return self.both
        known = known.expand(self.num_steps) if known.ndim < 2 else known.expand(-1, self.num_steps)
        return tuple(bool((known[..., i] != 1).any()) and self.calls_both(i) for i in range(self.num_steps))

    def predicting(self, p: Tensor, q: Tensor) -> StepTable:
        """The table with another way from state and output to what the history stores, (N,) each."""
        weights = self.weights.clone()
        weights[:, :, P], weights[:, :, Q] = p.to(weights), q.to(weights)
        return replace(self, weights=weights)

    def starting_at(self, first: int) -> StepTable:
        """The table of a run whose history begins at step ``first``, as in img2img and inpainting.

            w_i,first <- sum_{j<=first} w_ij        w_ij <- 0 for j < first

        What rows give to the predictions before it goes to y_first: the prediction is taken as constant until then, so
        rows keep their sums and the first step is Euler's (DDIM's for VP). Raises ValueError where the table forecasts.
        """
        if first and self.forecasts:
            raise ValueError(
                "a table that forecasts guidance from the first steps cannot start part-way; take one that calls both "
                "branches at all steps"
            )
        weights = self.weights.clone()
        history = weights[:, :, HISTORY:]
        history[:, first:, first] += history[:, first:, :first].sum(2)
        history[:, :, :first] = 0
        return replace(self, weights=weights)

    def tail(self, first: int) -> StepTable:
        """The last N - first steps as a table of their own; without the initial noise."""
        moved, both = self.starting_at(first), self.both and self.both[first:]
        head, history = moved.weights[:, first:, :HISTORY], moved.history[:, first:, first : self.num_steps]
        return StepTable(torch.cat([head, history], 2), moved.times[..., first:], both)

    def padded(self, num_steps: int, forecasts: bool = False) -> StepTable:
        """The table with idle steps to num_steps and a slot for the initial noise, as a row of a larger table.

        The added steps have weights of zero and repeat the last time. forecasts: with slots for the e_j too.
        """
        n, like = self.num_steps, self.weights
        weights = self.idle(len(like), num_steps, dtype=like.dtype, device=like.device, forecasts=forecasts).weights
        weights[:, :n, : HISTORY + n] = like[:, :, : HISTORY + n]
        if self.weighs_noise:
            weights[:, :n, HISTORY + num_steps] = like[:, :, HISTORY + n]
        if self.forecasts:
            first = HISTORY + num_steps + 1
            weights[:, :n, first : first + n] = like[:, :, HISTORY + n + 1 :]
        last = self.times[..., -1:].expand(*self.times.shape[:-1], num_steps - n)
        both = self.both and (*self.both, *[False] * (num_steps - n))
        return StepTable(weights, torch.cat([self.times, last], -1), both)


@lru_cache(CACHED)
def _sent(
    solver: Solver,
    schedule: Schedule | None,
    guidance: float | tuple[float, ...] | None,
    real: torch.dtype,
    device: torch.device,
    strict: bool,
) -> StepTable:
    """:meth:`StepTable.of`, kept. It is sent on the stream of whoever asks first, and outside inference mode, because
    it may be used where gradients are."""
    with torch.inference_mode(False), torch.no_grad():
        table = _made(solver, schedule, guidance, real, strict)
        return table if device.type == "cpu" else table.to(device)


@kept(CACHED)
def _made(
    solver: Solver,
    schedule: Schedule | None,
    guidance: float | tuple[float, ...] | None,
    real: torch.dtype,
    strict: bool,
) -> StepTable:
    """The same on the CPU."""
    solver = solver.following(schedule) if strict else solver
    table = StepTable.build(solver.on(schedule, strict=False), solver.tensors(), guidance)
    table = table.to("cpu", real)
    sound = table.weights.isfinite().flatten(2).all(2)[0] & table.times.isfinite()
    if not bool(sound.all()):
        raise ValueError(
            f"step {int((~sound).nonzero()[0])} of {solver.label} on {schedule or solver.schedule!r} has numbers that "
            f"are no finite {real}: see that alpha, sigma and time are finite from u = 0 to 1"
        )
    return table


def guidance_table(scale: Guidance, rows: int, num_steps: int) -> float | tuple[float, ...] | Tensor:
    """The guidance scale of ``rows`` samples as :meth:`StepTable.guided` takes it.

    A number stays one and N numbers a tuple, whose tables are kept. Else a tensor (N,), (B, 1) or (B, N); a tensor (B,)
    is per sample unless N = B is per step. Raises ValueError on any other shape, and for what is no number.
    """
    if isinstance(scale, int | float):
        return scale
    if isinstance(scale, list | tuple) and len(scale) == num_steps and all(isinstance(s, int | float) for s in scale):
        return tuple(map(float, scale))
    try:
        table = torch.as_tensor(scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"guidance_scale={str(scale)[:60]!r} of type {type(scale).__name__}: give a number, {num_steps} numbers "
            "(one per step), or a tensor"
        ) from None
    per_sample = isinstance(scale, Tensor) and table.shape == (rows,)
    if table.shape == (num_steps,) and not (per_sample and rows != num_steps):
        return table
    if per_sample:
        return table[:, None]
    if table.ndim == 0 or table.shape in ((rows, 1), (rows, num_steps)):
        return table
    raise ValueError(
        f"guidance_scale has shape {tuple(table.shape)}; give a number, {num_steps} numbers (one per step), "
        f"a tensor ({rows},) per sample, or ({rows}, {num_steps})"
    )
