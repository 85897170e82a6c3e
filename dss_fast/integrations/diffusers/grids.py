"""Grids: the times and noise levels that a hand-made method walks on a pipeline, and its table there.

The stock schedulers are asked for their own grids, so that every spacing they know (Karras, exponential, trailing,
dynamic shift, a terminal shift) comes out to the bit and follows the installed version.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...methods import handmade
from ...names import Name
from ...schedule import FLOOR, Grid, Schedule
from ...solver import Solver
from .config import alphas_cumprod, family_of, model_schedule, mu_of, prediction_of
from .kinds import MULTISTEP, SIGMA_SPACE, Config, knows, stock_scheduler
from .unasked import are_training_sigmas, even

STILL = 1e-9  # a grid must fall: a last step that does not move in the stock scheduler falls by this part


def handmade_table(
    name: Name,
    config: Config,
    num_steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Solver:
    """``"dpmpp_2m"`` on the grid of its stock scheduler, or ``"dpmpp_2m@karras"`` on a spacing of ours."""
    if name.spacing:
        if sigmas is not None or timesteps is not None:
            raise ValueError(
                f"solver '{name.name}@{name.spacing}' brings its own spacing; leave out sigmas and timesteps"
            )
        schedule = model_schedule({**config, "shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False})
        return handmade(
            name.name,
            num_steps,
            schedule,
            spacing=name.spacing,
            lower_order_final=config.get("lower_order_final") is not False,
        )
    if config.get("euler_at_final") and config.get("final_sigmas_type") == "sigma_min" and num_steps >= 15:
        warnings.warn(
            "euler_at_final=True is not applied: from 15 steps on the last keeps its order unless sigma ends at 0",
            stacklevel=3,
        )
    kept, walked = config.get("disable_corrector"), stock_class(name.name, config)
    if kept and walked == MULTISTEP["unip"]:
        every = set(range(num_steps)) <= set(kept)
        if name.name.startswith("unipc"):
            warnings.warn(
                f"disable_corrector={kept} is not applied: {name.name} corrects after every step, and "
                f"{name.name.replace('unipc3', 'unip3').replace('unipc', 'unip2')} after none",
                stacklevel=3,
            )
        elif not every:
            warnings.warn(
                f"disable_corrector={kept} leaves steps with UniPC's corrector, which is not applied: {name.name} is "
                "its predictor alone; 'unipc' and 'unipc3' have the corrector after every step",
                stacklevel=3,
            )
    if family_of(config) == "flow":
        grid = _flow_grid(name.name, config, num_steps, sigmas, timesteps, mu)
    else:
        grid = _vp_grid(name.name, config, num_steps, sigmas, timesteps)
    return table_on(name.name, config, grid)


def table_on(method: str, config: Config, grid: Grid) -> Solver:
    """A hand-made method on the points of a grid. Raises ValueError for one whose steps take two calls."""
    if method == "heun":
        raise ValueError(
            "solver 'heun' takes two calls a step, and a pipeline's grid has one: give a spacing, as in "
            "'heun@uniform', and as num_inference_steps its calls, an odd number; or take a Heun scheduler of diffusers"
        )
    told: dict[str, Any] = {
        "timesteps": grid.timesteps,
        "lower_order_final": config.get("lower_order_final") is not False,
    }
    try:
        return handmade(method, None, grid, **told)
    except ValueError:
        if not grid.sigmas[-1] > 0.999 * grid.sigmas[-2] > 0:
            raise
        # A last step that stands still moves nothing, whatever its row, of which floats hold none from order 3 on.
        moving = replace(grid, sigmas=(*grid.sigmas[:-1], grid.sigmas[-2] / 2))
        return replace(handmade(method, None, moving, **told), schedule=grid)


def edited_table(method: str, config: Config, times: Sequence[float], sigmas: Sequence[float] | None) -> Solver:
    """A hand-made method along a program's own times, and its own sigmas (N + 1,) unless these are None.

    Raises ValueError for numbers of them that do not belong together.
    """
    if sigmas is None and family_of(config) == "vp" and lands(method, config):
        return table_on(method, config, _vp_grid(method, config, len(times), None, times))
    if sigmas is None or len(sigmas) != len(times) + 1:
        held = "those of another run" if sigmas is None else f"{len(sigmas)} numbers"
        raise ValueError(
            f"scheduler.sigmas holds {held} and scheduler.timesteps {len(times)}: a run of N steps has N timesteps and "
            "N + 1 sigmas, the last of them where it ends"
        )
    levels, kind = torch.tensor(sigmas, dtype=torch.float64), prediction_of(config)
    if family_of(config) == "vp":
        return table_on(method, config, ratio_grid(levels, times, kind, method, config))
    if config.get("invert_sigmas"):
        levels, times = 1 - levels, [config["num_train_timesteps"] - t for t in times]
    return table_on(method, config, flow_grid(levels, times, kind))


def lands(method: str, config: Config) -> bool:
    """Whether a VP method walks DDIM's grid, of times rather than sigmas."""
    return stock_class(method, config).endswith("DDIMScheduler")


def stock_class(method: str, config: Config) -> str:
    """The scheduler of diffusers whose grid a hand-made method walks on a pipeline with this config."""
    own, kind = str(config.get("stock_class")), method.split("_")[0].rstrip("0123456789")
    if family_of(config) == "flow":
        if not config.get("use_flow_sigmas"):
            return "FlowMatchEulerDiscreteScheduler"
        if kind in MULTISTEP:
            return MULTISTEP[kind]
        return own if knows(own, "use_flow_sigmas") else MULTISTEP["dpmpp"]
    if kind != "euler":
        return MULTISTEP.get(kind, MULTISTEP["dpmpp"])
    if own in SIGMA_SPACE:
        return "EulerDiscreteScheduler"
    return "DDIMScheduler" if config.get("snr_shift_scale") is None else "CogVideoXDDIMScheduler"


def initial_scale(method: str, config: Config, schedule: Schedule) -> float:
    """What a pipeline multiplies its noise by: 1, or the first sigma where the stock Euler starts at just that."""
    if family_of(config) == "vp" and stock_class(method, config) == "EulerDiscreteScheduler":
        if stock_scheduler("EulerDiscreteScheduler", config).config.timestep_spacing != "leading":
            return float(schedule.alpha_sigma(torch.zeros(1, dtype=torch.float64))[1])
    return 1.0


def _flow_grid(
    method: str,
    config: Config,
    n: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    mu: float | None,
) -> Grid:
    steps, kind, name = config.get("num_train_timesteps", 1000), prediction_of(config), stock_class(method, config)
    if not config.get("use_flow_sigmas"):
        if config.get("use_dynamic_shifting") and mu is None:
            mu = config.get("mu")
            if mu is None:
                raise ValueError(f"use_dynamic_shifting=True, and no mu: {no_mu(config)}")
            if sigmas is not None and are_training_sigmas(sigmas, steps):
                sigmas = np.linspace(
                    1.0, 1 / n, n
                ).tolist()  # what Bria's pipeline passes to the class that gets its mu
        given = None if sigmas is None else list(sigmas), None if timesteps is None else list(timesteps)
        stock = stock_scheduler(name, config)
        ends = {key: config[key] for key in ("sigma_min", "sigma_max") if config.get(key) is not None}
        stock.register_to_config(**ends)  # Cosmos' pipelines write these noise levels into a config that had none
        with np.errstate(invalid="ignore"):
            stock.set_timesteps(n, sigmas=given[0], mu=mu, timesteps=given[1])
    else:
        takes = name == MULTISTEP["unip"] and sigmas is not None and timesteps is None  # UniPC alone has sigmas=
        custom = takes or not even(sigmas, timesteps, steps)
        if custom and timesteps is not None:
            levels = [float(t) / steps for t in timesteps] if sigmas is None else list(sigmas)
            return Grid.flow([*levels, 0.0], timesteps, prediction_type=kind)
        name = MULTISTEP["unip"] if custom else name
        stock = stock_scheduler(name, {**config, "prediction_type": "flow_prediction"})
        options: dict[str, Any] = {"mu": mu_of(config, mu)} if config.get("use_dynamic_shifting") else {}
        if custom:
            options["sigmas"] = np.asarray(sigmas, dtype=np.float64)
        stock.set_timesteps(n, **options)
    levels, times = stock.sigmas.double(), stock.timesteps.double()
    while len(times) > 1 and levels[-2] == levels[-1] == 0:  # the caller's list had a final 0 of its own
        levels, times = levels[:-1], times[:-1]
    if bool(levels.isnan().any()):
        raise ValueError(f"{n} step under shift_terminal={config.get('shift_terminal')} is 0/0; take 2 steps or more")
    if config.get("invert_sigmas") and not config.get("use_flow_sigmas"):  # Mochi's; DSSScheduler turns it round again
        levels, times = 1 - levels, steps - times
    return flow_grid(levels, times.tolist(), kind)


def no_mu(config: Config) -> str:
    """What to do where a pipeline passes no mu under ``use_dynamic_shifting``, with the numbers of this config."""
    ends = [config.get(key) for key in ("base_shift", "base_image_seq_len", "max_shift", "max_image_seq_len")]
    line = "" if None in ends else " from {} at {} to {} at {}".format(*ends)
    return (
        "Bria's and EasyAnimate's pipelines pass it to FlowMatchEulerDiscreteScheduler's own class alone. Give it to "
        f"from_config as mu=... (EasyAnimate's is 1; Bria's goes in a line with the number of image tokens{line}), or "
        "call scheduler.set_shift(e^mu)"
    )


def flow_grid(levels: Tensor, times: Sequence[float], kind: str) -> Grid:
    """A flow's grid on falling sigmas (N + 1,); above 1 they are those of x = x0 + sigma * epsilon, as Cosmos has them,
    whose pipelines hand over (x - x0) / sigma."""
    if float(levels.max()) > 1:
        return Grid((1.0,) * len(levels), tuple(_falling(levels)), tuple(times), "vp", "epsilon")
    return Grid.flow(_falling(levels), times, prediction_type=kind)


def _vp_grid(
    method: str, config: Config, n: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
) -> Grid:
    kind, name = prediction_of(config), stock_class(method, config)
    landing = lands(method, config)
    # A zero terminal SNR has no log. For DDIM next to nothing stands in its place, for the others their own choice.
    table = alphas_cumprod(config).clamp_min(1e-30 if landing else FLOOR).numpy()
    if sigmas is not None:
        if timesteps is not None:
            raise ValueError("give sigmas or timesteps to a VP scheduler, not both")
        # EulerDiscrete's lists end with the level that is reached, be it 0 or not.
        closed = len(sigmas) > 1 and (sigmas[-1] == 0 or name == "EulerDiscreteScheduler")
        ratio = np.append(np.asarray(sigmas, dtype=np.float64), [] if closed else 0.0)
        log_ratio = 0.5 * np.log(1 / table - 1)
        times = np.interp(np.log(ratio[:-1]), log_ratio, np.arange(len(table))).tolist()
        return ratio_grid(ratio, times, kind, method, config)
    stock = stock_scheduler(name, config)
    if config.get("snr_shift_scale") is None:  # one with that setting keeps the model's own noise
        there = stock.alphas_cumprod.double().clamp_min(1e-30).numpy()
        if there.shape != table.shape or np.abs(there - table).max() > 1e-3:
            warnings.warn(
                f"as in diffusers, the betas of {config.get('stock_class')} are its defaults and are not handed to "
                f"{name}, whose own are used; give beta_start, beta_end and beta_schedule to from_config to keep them",
                stacklevel=4,
            )
        table = there
    own = (
        timesteps is not None and name == "EulerDiscreteScheduler"
    )  # which takes a sigma, not log alpha, between times
    if timesteps is None or own:
        stock.set_timesteps(
            **{"timesteps": list(timesteps)} if own and timesteps is not None else {"num_inference_steps": n}
        )
        if not landing and config.get("snr_shift_scale") is None:
            walked = stock.timesteps.tolist()  # under interpolation_type="log_linear" there is a sigma too many
            return ratio_grid(_falling(stock.sigmas.double()[: len(walked) + 1]), walked, kind, method, config)
    times = np.asarray(stock.timesteps.tolist() if timesteps is None else timesteps, dtype=np.float64)
    if landing:
        last = float(stock.final_alpha_cumprod)
        if timesteps is None and len(times) > 1 and np.any(np.diff(times) != -(len(table) // len(times))):
            warnings.warn(
                f"{name} steps {len(table) // len(times)} training steps at a time whatever its own {n} times are, "
                f"and under timestep_spacing={stock.config.get('timestep_spacing')!r} they are further apart; "
                "DSSScheduler steps from time to time",
                stacklevel=4,
            )
    else:
        last = float(table[0]) if stock.config.get("final_sigmas_type") == "sigma_min" else 1.0
    log_alpha = np.append(np.interp(times, np.arange(len(table)), np.log(table)), np.log(last))
    log_alpha[-1] = max(log_alpha[-1], log_alpha[-2] - STILL * np.expm1(log_alpha[-2]))
    return Grid(tuple(np.exp(0.5 * log_alpha)), tuple(np.sqrt(-np.expm1(log_alpha))), tuple(times), "vp", kind)


def _falling(levels: Tensor) -> list[float]:
    """Sigmas whose last step may stand still, as in stock schedulers, made to fall by less than float32 resolves."""
    values: list[float] = levels.tolist()
    return [*values[:-1], min(values[-1], values[-2] * (1 - STILL))]


def ratio_grid(ratio: Any, times: Sequence[float], kind: str, method: str, config: Config) -> Grid:
    """A VP grid on falling ratios sigma / alpha, (N + 1,). Stock Euler's last state is x0 + sigma * epsilon."""
    ratio = np.asarray(ratio, dtype=np.float64)
    alphas = 1 / np.sqrt(1 + ratio**2)
    if stock_class(method, config) == "EulerDiscreteScheduler":
        alphas[-1] = 1
    return Grid(tuple(alphas), tuple(ratio * alphas), tuple(times), "vp", kind)
