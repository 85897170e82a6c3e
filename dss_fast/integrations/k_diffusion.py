"""sample_dss: solvers in k-diffusion's terms, for ComfyUI and all else that calls ``sample_*(model, x, sigmas)``.

k-diffusion's model returns the clean sample at (x, sigma). For a flow, x = (1 - sigma) x0 + sigma eps and its d =
(x - denoised) / sigma is eps - x0, the velocity reversed. For the rest, x = x0 + sigma eps is a VP state divided by
alpha, in which a step with VP coefficients c becomes

    x_{i+1} = (s'/s) * x_i + (1 - s'/s) * sum_{j<=i} c_ij * denoised_j

so a solver's table needs no conversion, only the grid it belongs to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..handmade import METHODS, handmade
from ..sampling import find_solver
from ..schedule import Flow, default_schedule, step_weights
from ..solver import Solver
from ..step import multistep_step
from .grid import Grid
from .start import starting_at


@torch.no_grad()
def sample_dss(
    model: Callable,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    *,
    solver: Solver | str = "dpmpp_2m",
    family: str | None = None,
    strict: bool = True,
) -> Tensor:
    """Samples along ``sigmas`` with the coefficients of ``solver``, one network call and one fused update a step.

    model: model(x, sigma (B,), **extra_args) -> denoised (B, *S). x: (B, *S), the noise at sigmas[0].
    sigmas: (n + 1,), falling. A learned solver takes those of :func:`sigmas_of`, or their last k + 1 for an image
    given a
        start; a run that ends at 0 where the solver would end just above is taken to mean the same.
    callback: called after each network call with x, i, sigma, sigma_hat and denoised.
    disable: no progress bar.
    solver: as in ``sample``; a hand-made name (``"dpmpp_2m"``) is built on the sigmas given, any number.
    family: ``"flow"`` or ``"vp"`` for hand-made names; None: ``"vp"``, k-diffusion's own kind, as for Stable Diffusion.
    strict: raise when learned coefficients meet sigmas they were not searched with. False: warn, and run them there
        when the number of steps fits.

    Returns x at sigmas[-1], (B, *S).
    """
    sigmas = torch.as_tensor(sigmas)
    given = sigmas.detach().double().cpu()
    table, first = _table(solver, given, family, strict)
    grid = _grid(table.family, given)
    if first:
        weights = _tail_weights(table, grid, first)
    else:
        values = table.tensors()
        weights, _ = step_weights(grid, grid.timesteps, values["coeffs"], noise_coeffs=values["noise_coeffs"])
    n = len(given) - 1
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = weights.to(real).to(x.device, non_blocking=True)
    history = x.new_empty((len(x), weights.shape[2] - 4, *x.shape[1:]))
    if table.noise_coeffs is not None:
        # the noise in the solver's own variables: a VP state is alpha x with alpha = 1 / sqrt(1 + s^2)
        history[:, -1] = x if table.family == "flow" else x / (1 + float(given[0]) ** 2) ** 0.5
    index = torch.arange(n, device=x.device).split(1)
    rows = x.new_ones([len(x)])
    for i in _steps(n, disable):
        denoised = model(x, sigmas[i] * rows, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x, history = multistep_step(x, denoised, history, weights, index[i])
    return x


def sigmas_of(solver: Solver | str, num_steps: int | None = None) -> Tensor:
    """The (N + 1,) float32 sigmas that a learned solver runs on: sigma of a flow, sigma / alpha otherwise."""
    table = find_solver(solver, None, num_steps)
    return _own_sigmas(table).float()


def _own_sigmas(table: Solver) -> Tensor:
    spec = dict(table.provenance.get("schedule") or {})
    u = torch.tensor(table.timesteps, dtype=torch.float64)
    if table.family == "flow":
        return Flow(spec.get("shift", 1.0)).alpha_sigma(u)[1]
    if spec.get("kind", "vp") != "vp":
        raise ValueError(
            f"solver {table.name or '(unnamed)'} was searched on {spec.get('kind')!r} noise, whose sigmas its file "
            "does not hold; pass sigmas computed with its schedule and strict=False"
        )
    schedule = default_schedule("vp")
    if spec:
        schedule = type(schedule)(spec["beta_min"], spec["beta_max"])
    alpha, sigma = schedule.alpha_sigma(u)
    return sigma / alpha


def _table(solver, sigmas: Tensor, family: str | None, strict: bool) -> tuple[Solver, int]:
    """The solver for these sigmas, and the step of its own grid at which they begin."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; needed are at least 2 numbers in a row")
    n = len(sigmas) - 1
    if isinstance(solver, str) and solver.partition("@")[0].partition("/")[0] in METHODS:
        method, _, steps = solver.partition("@")[0].partition("/")
        if steps and int(steps) != n:
            raise ValueError(f"solver {solver!r} is for {steps} steps and {n} are given; write {method!r}")
        grid = _grid(family or "vp", sigmas)
        return handmade(method, None, grid, timesteps=grid.timesteps), 0
    table = find_solver(solver, None, n)
    if family not in (None, table.family):
        raise ValueError(f"solver {table.name or '(unnamed)'} is for {table.family} models, this one is {family}")
    try:
        own = _own_sigmas(table)
    except ValueError:
        if strict:
            raise
        own = None
    first = table.num_steps - n
    if own is not None and first >= 0:
        wanted = own[first:].clone()
        if sigmas[-1] == 0:
            wanted[-1] = 0
        if torch.allclose(sigmas, wanted, rtol=2e-3, atol=1e-5):
            return table, first
    message = (
        f"sigmas of {n} steps from {sigmas[0]:.5g} to {sigmas[-1]:.5g} do not belong to solver "
        f"{table.name or '(unnamed)'}, which has {table.num_steps} steps"
        + ("" if own is None else f" from {own[0]:.5g} to {own[-1]:.5g}")
        + "; its coefficients are good for its own sigmas only: use sigmas_of(solver), in ComfyUI the DSS Sigmas node"
    )
    if strict or first != 0:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)
    return table, 0


def _grid(family: str, sigmas: Tensor) -> Grid:
    if family == "flow":
        return Grid.flow(sigmas.tolist(), sigmas.tolist(), prediction_type="x0", convention="paper")
    return Grid.ve(sigmas.tolist())


def _tail_weights(table: Solver, grid: Grid, first: int) -> Tensor:
    """The weights of the last steps of a table, with what they owe to earlier predictions given to the first."""
    if table.noise_coeffs is not None:
        raise ValueError(
            f"solver {table.name or '(unnamed)'} weighs the initial noise, which a run that starts part-way "
            "does not have"
        )
    coeffs = table.tensors()["coeffs"]
    padded = torch.zeros(1, len(coeffs), 4 + len(coeffs), dtype=torch.float64)
    padded[0, :, 4:] = coeffs
    tail = starting_at(padded, first)[0, first:, 4 + first :]
    return step_weights(grid, grid.timesteps, tail)[0]


def _steps(n: int, disable: bool | None) -> Sequence[int]:
    if disable:
        return range(n)
    try:
        from tqdm.auto import trange
    except ImportError:
        return range(n)
    return trange(n, disable=disable)
