"""sample_dss: solvers in k-diffusion's terms, for ComfyUI and all else that calls ``sample_*(model, x, sigmas)``.

k-diffusion's model returns the clean sample at (x, sigma). For a flow, x = (1 - sigma) x0 + sigma eps and its d =
(x - denoised) / sigma is eps - x0, the velocity reversed. For the rest, x = x0 + sigma eps is a VP state divided by
alpha, in which a step with VP coefficients c becomes

    x_{i+1} = (s'/s) * x_i + (1 - s'/s) * sum_{j<=i} c_ij * denoised_j

so a solver's table needs no conversion, only the grid it belongs to.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..methods import handmade
from ..names import Name, find_solver, is_file
from ..schedule import Grid, Schedule
from ..solver import Solver
from ..step import multistep_step
from ..table import GUIDANCE, Guidance, StepTable, guidance_table

RESOLVED = 0.01  # of a step; the steps of all published tables are right to 2e-5


@torch.no_grad()
def sample_dss(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    solver: Solver | str | os.PathLike[str] = "dpmpp_2m",
    family: str | None = None,
    strict: bool = True,
    branches: Callable[..., Tensor] | None = None,
    guidance_scale: Guidance | None = None,
) -> Tensor:
    """Samples along ``sigmas`` with the coefficients of ``solver``, one network call and one fused update a step.

    model: model(x, sigma (B,), **extra_args) -> denoised (B, *S). x: (B, *S), the noise at sigmas[0].
    sigmas: (n + 1,), falling. A learned solver takes those of :func:`sigmas_of` or n + 1 of them in a row: the last for
        an image given a start, the first and then the rest for two networks that share a run. A run that ends at 0
        where the solver would end just above is taken to mean the same.
    callback: called after each network call with x, i, sigma, sigma_hat and denoised.
    disable: no progress bar.
    solver: as in ``sample``; a hand-made name (``"dpmpp_2m"``) is built on the sigmas given, any number.
    family: ``"flow"`` or ``"vp"`` for hand-made names; None: ``"vp"``, k-diffusion's own kind, as for Stable Diffusion.
    branches: branches(x, sigma (B,), both, **extra_args) -> the conditional denoised (B, *S), or, where both is true,
        the pair (2B, *S), unconditional rows first; called instead of ``model``, with the guidance done here, at
        guidance_scale: a number, or one for each step of the solver. At steps where it is 1, and at those that the
        solver leaves out, one branch is called. A solver that leaves some out needs both, or a guidance_scale of 1.
    strict: raise when learned coefficients meet sigmas they were not searched with. False: warn, and run them there
        when the number of steps fits.

    Returns x at sigmas[-1], (B, *S). Raises ValueError where solver, sigmas and family do not fit, saying why.
    """
    sigmas = torch.as_tensor(sigmas)
    given = sigmas.detach().cpu().double()  # in this order: Apple's devices have no float64
    table, first = _table(solver, given, family, strict)
    own = _own_sigmas(table)
    last = first + len(given) - 1
    grid = _grid(table.family, torch.cat([own[:first], given, own[last + 1 :]]))
    scale = _scale(table, branches, guidance_scale, len(x))
    moved = replace(table, timesteps=tuple(grid.timesteps.tolist()), schedule=grid)
    steps = StepTable.of(moved, guidance=scale, dtype=torch.float64)
    seen, stretch = sigmas, None
    if table.network_timesteps is not None:
        p, q, stretch, levels = _calls_elsewhere(table)
        steps, seen = steps.predicting(p, q), levels[first:].to(sigmas)
    steps = (steps.tail(first) if first else steps).to(x.device, x.dtype)
    # The noise goes into the solver's own variables, in which a VP state is alpha x.
    noise = float(table.schedule.alpha_sigma(torch.zeros(1))[1] / given[0])
    history = steps.new_history(x * noise if steps.weighs_noise else x)
    index = torch.arange(steps.num_steps, device=x.device).split(1)
    rows = x.new_ones([len(x)])
    for i in _steps(last - first, disable):
        z = x if stretch is None else float(stretch[first + i]) * x
        if branches is None:
            output = model(z, seen[i] * rows, **(extra_args or {}))
        else:
            output = branches(z, seen[i] * rows, scale != 1 and steps.calls_both(i), **(extra_args or {}))
        if callback is not None:
            denoised = output if len(output) == len(x) else _guided(output, steps.weights[:, i, GUIDANCE])
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x, history = multistep_step(x, output, history, steps.weights, index[i])
    return x


def _scale(
    table: Solver, branches: Callable[..., Tensor] | None, given: Guidance | None, rows: int
) -> float | tuple[float, ...] | Tensor:
    """The guidance that is done here, 1 where the model does it or there is none. Raises ValueError for a solver that
    needs to see both branches, and does not, and for a scale without them."""
    scale = 1.0 if given is None else guidance_table(given, rows, table.num_steps)
    none = isinstance(scale, int | float) and scale == 1
    if branches is None and not none:
        raise ValueError(f"guidance_scale={given!r} needs branches, a function that returns both outputs")
    if branches is not None and given is None:
        raise ValueError("branches need guidance_scale, by which their outputs are put together")
    if table.guided_steps is not None and branches is None and given is None:
        raise ValueError(
            f"{table.label} calls the unconditional branch at {len(table.guided_steps)} of its {table.num_steps} steps "
            "and forecasts it at the others, which a model that returns one denoised sample cannot tell: give branches "
            "and guidance_scale; or guidance_scale=1 for a model without guidance"
        )
    return scale


def _guided(pair: Tensor, scale: Tensor) -> Tensor:
    """m_uncond + g (m_cond - m_uncond), for a callback."""
    uncond, cond = pair.chunk(2)
    return uncond + scale.reshape(-1, *[1] * (cond.ndim - 1)).to(cond) * (cond - uncond)


def _calls_elsewhere(table: Solver) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, q, stretch, sigma), (N,) float64 each, of a table that calls the network at times u' of its own.

    The network is to see the solver's state X at u', and does when model(z, sigma) is called with z = stretch * x and
    the sigma of u'. From the D it returns, the x0 = r' X + s' (p' X + q' m) that an output m implies at u', follows
    m = (D - (r' + s' p') X) / (s' q'), and from that y = p X + q m of u itself, as in ``sample``.
    """
    schedule, u = table.schedule, torch.tensor(table.timesteps[:-1], dtype=torch.float64)
    there = torch.tensor(table.network_timesteps, dtype=torch.float64)
    (p, q), (p_there, q_there), (r, s) = schedule.prediction(u), schedule.prediction(there), schedule.x0(there)
    alpha, alpha_there = schedule.alpha_sigma(u)[0], schedule.alpha_sigma(there)[0]
    state, stretch = (torch.ones_like(u),) * 2 if table.family == "flow" else (alpha, alpha / alpha_there)
    gain = q / (s * q_there)
    if not bool(gain.isfinite().all()):
        raise ValueError(f"{table.label} calls the network where sigma is 0, which no model(x, sigma) allows")
    return state * (p - gain * (r + s * p_there)), gain, stretch, sigmas_at(schedule, there)


def sigmas_of(solver: Solver | str | os.PathLike[str], num_steps: int | None = None) -> Tensor:
    """The (N + 1,) float32 sigmas that a learned solver runs on: sigma of a flow, sigma / alpha otherwise."""
    return _own_sigmas(find_solver(solver, None, num_steps)).float()


def _own_sigmas(table: Solver) -> Tensor:
    return sigmas_at(table.schedule, torch.tensor(table.timesteps, dtype=torch.float64))


def sigmas_at(schedule: Schedule, u: Tensor) -> Tensor:
    """What k-diffusion calls sigma at u, float64, u's shape: sigma of a flow, sigma / alpha otherwise."""
    alpha, sigma = schedule.alpha_sigma(u)
    return sigma if schedule.family == "flow" else sigma / alpha


def _table(
    solver: Solver | str | os.PathLike[str], sigmas: Tensor, family: str | None, strict: bool
) -> tuple[Solver, int]:
    """The solver for these sigmas, and the step of its own grid at which they begin."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; needed are at least 2 numbers in a row")
    n = len(sigmas) - 1
    name = None if isinstance(solver, Solver) or is_file(solver) else Name.parse(os.fspath(solver))
    if name is not None and name.handmade:
        if name.num_steps not in (None, n):
            raise ValueError(f"solver {solver!r} is for {name.num_steps} steps and {n} are given; write {name.name!r}")
        if name.spacing is not None:
            raise ValueError(f"solver {solver!r} brings a spacing, and sigmas are given; write {name.name!r}")
        if name.name == "heun":
            raise ValueError(
                "solver 'heun' takes two calls a step, and here a step has one: take the program's own sample_heun"
            )
        grid = _grid(family or "vp", sigmas)
        # Towards a sigma of 0 every method falls back to order 1 by itself; k-diffusion lowers it nowhere else.
        return handmade(name.name, None, grid, timesteps=grid.timesteps, lower_order_final=False), 0
    table = find_solver(solver, None, n)
    if family not in (None, table.family):
        raise ValueError(f"{table.label} is for {table.family} models, this one is {family}")
    _check_resolved(table)
    first = place_of(table, sigmas)
    if first is not None:
        if first and table.noise_coeffs is not None:
            raise ValueError(f"{table.label} weighs the initial noise, which a run that starts part-way does not have")
        return table, first
    own = _own_sigmas(table)
    message = (
        f"sigmas of {n} steps from {sigmas[0]:.5g} to {sigmas[-1]:.5g} do not belong to {table.label}, which has "
        f"{table.num_steps} steps from {own[0]:.5g} to {own[-1]:.5g}; its coefficients are good for its own sigmas, or "
        "some of them in a row, only: use sigmas_of(solver), in ComfyUI the DSS Sigmas node or the scheduler of the "
        "same name, and let a run that stops early return its leftover noise"
    )
    if strict or n != table.num_steps:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)
    return table, 0


def _check_resolved(table: Solver) -> None:
    """Raises ValueError for a table with steps so short that sigmas in float32 have not their length."""
    own = _own_sigmas(table)
    exact = own.diff()
    wrong = (own.float().double().diff() - exact).abs() > RESOLVED * exact.abs()
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{table.label}: its step {i} goes from sigma {own[i]:.6g} to {own[i + 1]:.6g}, too short for sigmas in "
            "float32, as the second half of each of Heun's steps is; take the program's own sample_heun, or "
            "dss_fast.sample"
        )


def place_of(table: Solver, sigmas: Tensor) -> int | None:
    """The step at which sigmas (n + 1,) begin in a learned solver's own; None when they are not those in a row."""
    own = _own_sigmas(table)
    sigmas, n = sigmas.detach().cpu().double(), len(sigmas) - 1
    for first in range(table.num_steps - n, -1, -1):
        wanted = own[first : first + n + 1].clone()
        if first + n == table.num_steps and sigmas[-1] == 0:
            wanted[-1] = 0
        if torch.allclose(sigmas, wanted, rtol=2e-3, atol=1e-5):
            return first
    return None


def _grid(family: str, sigmas: Tensor) -> Grid:
    if family == "flow":
        return Grid.flow(sigmas.tolist(), sigmas.tolist(), prediction_type="x0", convention="paper")
    return Grid.ve(sigmas.tolist())


def _steps(n: int, disable: bool | None) -> Any:
    if disable:
        return range(n)
    try:
        from tqdm.auto import trange
    except ImportError:
        return range(n)
    return trange(n, disable=disable)
