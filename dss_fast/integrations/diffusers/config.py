"""What the config of a diffusers scheduler says: flow or VP, its schedule, and the grid its stock scheduler walks.

The stock schedulers are asked for their own grids, so that every spacing they know (Karras, exponential, trailing,
dynamic shift, a terminal shift) comes out to the bit and follows the installed version.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from ...methods import handmade
from ...names import Name, find_solver, is_file, published_steps
from ...schedule import VP, DiscreteVP, Flow, Grid, Schedule
from ...solver import Solver

Config = Mapping[str, Any]

PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v_prediction",
    "flow_prediction": "velocity",
}


def adopt(config: Config) -> dict[str, Any]:
    """The config of a stock scheduler made explicit: the defaults of its own class filled in and its family named."""
    config = dict(config)
    config.pop("_use_default_values", None)
    stock = getattr(diffusers, str(config.get("_class_name")), None)
    if stock is not None:
        for key, parameter in inspect.signature(stock.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                config.setdefault(key, parameter.default)
    config.setdefault("family", family_of(config))
    return config


def family_of(config: Config) -> str:
    """``"flow"`` or ``"vp"``. Raises ValueError for a config that is neither, such as EDM's."""
    if config.get("family"):
        return str(config["family"])
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow"
    if "beta_schedule" in config or "trained_betas" in config:
        return "vp"
    if "shift" in config or str(config.get("_class_name")).startswith("FlowMatch"):
        return "flow"
    raise ValueError(
        f"this scheduler config ({config.get('_class_name', 'of an unnamed class')}) describes neither a flow (shift, "
        "flow_prediction) nor a VP model (beta_schedule); DSSScheduler knows no other kind"
    )


def prediction_of(config: Config) -> str:
    """The prediction type in this package's words."""
    kind = config.get("prediction_type")
    if kind is None:
        return "velocity" if family_of(config) == "flow" else "epsilon"
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind!r}: DSSScheduler knows {', '.join(PREDICTIONS)}")
    return PREDICTIONS[kind]


def stock_scheduler(name: str, config: Config) -> Any:
    """A scheduler of diffusers with the part of a config that it knows."""
    stock = getattr(diffusers, name)
    known = inspect.signature(stock.__init__).parameters
    return stock(**{key: value for key, value in config.items() if key in known and value is not None})


def alphas_cumprod(config: Config) -> Tensor:
    """(T,) float64: alpha^2 of the training steps of a VP model."""
    name = "DDIMScheduler" if config.get("snr_shift_scale") is None else "CogVideoXDDIMScheduler"
    table: Tensor = stock_scheduler(name, config).alphas_cumprod
    return table.double()


def model_schedule(config: Config, mu: float | None = None) -> Schedule:
    """The schedule a search on a pipeline with this config should use.

    A flow keeps the pipeline's shift, e^mu where it depends on the resolution. The linear betas of DDPM and DiT are
    the continuous VP of the paper, so that published tables and searched ones share one schedule.
    """
    kind, steps = prediction_of(config), config.get("num_train_timesteps", 1000)
    if family_of(config) == "flow":
        shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
        if config.get("use_dynamic_shifting") and mu is not None:
            shift = mu if config.get("time_shift_type") == "linear" else float(np.exp(mu))
        return Flow(float(shift or 1.0), "diffusers", kind, float(steps))
    table = alphas_cumprod(config)
    if _same_noise(VP(), table):
        return VP(prediction_type=kind, time_scale=float(steps))
    return _discrete(table, config)


def table_schedule(solver: Solver, config: Config, strict: bool = True) -> Schedule:
    """The schedule on which a learned table runs in a pipeline with this config.

    A flow table brings its own sigmas, and the pipeline's shift is not applied on top. A VP table needs the noise it
    was searched for: with ``strict=False`` it otherwise runs at its own u on the pipeline's. Raises ValueError for the
    other family, and for another noise, naming the first alpha or sigma that differs.
    """
    own, kind, steps = solver.schedule, prediction_of(config), float(config.get("num_train_timesteps", 1000))
    if own.family == family_of(config):
        if isinstance(own, Flow):
            return replace(own, convention="diffusers", prediction_type=kind, time_scale=steps)
        if isinstance(own, Grid) and own.family == "flow":
            times = tuple(steps * sigma for sigma in own.sigmas)
            return replace(own, convention="diffusers", prediction_type=kind, times=times)
        if isinstance(own, VP) and _same_noise(own, alphas_cumprod(config)):
            return replace(own, prediction_type=kind, time_scale=steps)
        if isinstance(own, DiscreteVP):
            return solver.on(_discrete(alphas_cumprod(config), config, own.final), strict=strict)
    return solver.on(model_schedule(config), strict=strict)


def handmade_table(
    name: Name,
    config: Config,
    num_steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Solver:
    """``"dpmpp_2m"`` on the grid of the pipeline's stock scheduler, or ``"dpmpp_2m@karras"`` on a spacing of ours."""
    if name.spacing:
        if sigmas is not None or timesteps is not None:
            raise ValueError(
                f"solver '{name.name}@{name.spacing}' brings its own spacing; leave out sigmas and timesteps"
            )
        schedule = model_schedule({**config, "shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False})
        return handmade(name.name, num_steps, schedule, spacing=name.spacing)
    if family_of(config) == "flow":
        grid = _flow_grid(config, num_steps, sigmas, timesteps, mu)
    else:
        grid = _vp_grid(name.name, config, num_steps, sigmas, timesteps)
    return handmade(name.name, None, grid, timesteps=grid.timesteps)


def is_default_grid(sigmas: Sequence[float]) -> bool:
    """Whether the sigmas are 1 - i/n, which some 50 pipelines of diffusers pass when the user gave none."""
    n = len(sigmas)
    return bool(np.allclose(np.asarray(sigmas, dtype=np.float64), 1 - np.arange(n) / n, atol=1e-6))


def _flow_grid(
    config: Config, n: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
) -> Grid:
    steps, kind = config.get("num_train_timesteps", 1000), prediction_of(config)
    if config.get("invert_sigmas"):
        raise ValueError("invert_sigmas=True (Mochi) counts sigmas upwards; DSSScheduler does not know that convention")
    if timesteps is not None and sigmas is None:
        sigmas = [float(t) / steps for t in timesteps]
    if sigmas is not None and (timesteps is not None or not is_default_grid(sigmas)):
        times = [float(s) * steps for s in sigmas] if timesteps is None else timesteps
        return Grid.flow([*sigmas, 0.0], times, prediction_type=kind)
    if config.get("use_flow_sigmas"):
        stock = stock_scheduler("DPMSolverMultistepScheduler", {**config, "prediction_type": "flow_prediction"})
        stock.set_timesteps(n, mu=mu if config.get("use_dynamic_shifting") else None)
    else:
        stock = stock_scheduler("FlowMatchEulerDiscreteScheduler", config)
        stock.set_timesteps(n, sigmas=None if sigmas is None else list(sigmas), mu=mu)
    return Grid.flow(stock.sigmas.tolist(), stock.timesteps.tolist(), prediction_type=kind)


def _vp_grid(
    method: str, config: Config, n: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
) -> Grid:
    table = alphas_cumprod(config).clamp_min(1e-30).numpy()  # a zero terminal SNR has no log
    name = "DDIMScheduler" if method == "euler" else "DPMSolverMultistepScheduler"
    stock, kind = stock_scheduler(name, config), prediction_of(config)
    if sigmas is not None:
        if timesteps is not None:
            raise ValueError("give sigmas or timesteps to a VP scheduler, not both")
        ratio = np.append(np.asarray(sigmas, dtype=np.float64), [] if sigmas[-1] == 0 else 0.0)
        log_ratio = 0.5 * np.log(1 / table - 1)
        return _ratio_grid(ratio, np.interp(np.log(ratio[:-1]), log_ratio, np.arange(len(table))).tolist(), kind)
    if timesteps is None:
        stock.set_timesteps(n)
    if timesteps is None and method != "euler" and config.get("snr_shift_scale") is None:
        return _ratio_grid(stock.sigmas.double().numpy(), stock.timesteps.tolist(), kind)
    times = np.asarray(stock.timesteps.tolist() if timesteps is None else timesteps, dtype=np.float64)
    whole = (
        config.get("set_alpha_to_one", True) if method == "euler" else config.get("final_sigmas_type") != "sigma_min"
    )
    whole = whole or times[-1] <= 0  # the stock scheduler would stand still for its last step
    log_alpha = np.append(np.interp(times, np.arange(len(table)), np.log(table)), 0.0 if whole else np.log(table[0]))
    return Grid(tuple(np.exp(0.5 * log_alpha)), tuple(np.sqrt(-np.expm1(log_alpha))), tuple(times), "vp", kind)


def _ratio_grid(ratio: Any, times: Sequence[float], kind: str) -> Grid:
    alphas = 1 / np.sqrt(1 + ratio**2)
    return Grid(tuple(alphas), tuple(ratio * alphas), tuple(times), "vp", kind)


def _discrete(table: Tensor, config: Config, final: str | None = None) -> DiscreteVP:
    if final is None:
        kept = config.get("final_sigmas_type") == "sigma_min" or config.get("set_alpha_to_one") is False
        final = "sigma_min" if kept else "zero"
    name = str(config.get("beta_schedule") if config.get("trained_betas") is None else "trained")
    return DiscreteVP(tuple(table.tolist()), prediction_of(config), final, name)


def _same_noise(schedule: VP, table: Tensor) -> bool:
    """Whether alphas_cumprod follow a continuous VP: log-SNR within 0.05 over the middle nine tenths.

    DDPM's linear betas stay within 0.015 of the paper's VP there; Stable Diffusion's differ by up to 1.
    """
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    n = t * len(table)
    low = n.floor().long().clamp(0, len(table) - 2)
    log_alpha = 0.5 * torch.lerp(table[low].log(), table[low + 1].log(), n - low)
    discrete = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    alpha, sigma = schedule.alpha_sigma(schedule.t_start - t)
    return bool(((alpha / sigma).log() - discrete).abs().max() < 0.05)


def read_solvers(solver: Any) -> tuple[dict[int, Solver], list[Name], list[str], list[dict[str, Any]]]:
    """What ``solver`` names: learned tables by N, hand-made methods, the names to write in a config, and the tables to
    embed in it. Raises ValueError naming what exists.
    """
    tables: dict[int, Solver] = {}
    methods: list[Name] = []
    names: list[str] = []
    embedded: list[dict[str, Any]] = []
    for entry in solver if isinstance(solver, list | tuple) else [solver]:
        if isinstance(entry, Mapping):
            entry = Solver.from_dict(entry)
        found: list[Solver] = []
        if isinstance(entry, Solver):
            found = [entry]
            embedded.append(entry.to_dict())
        elif not isinstance(entry, str | os.PathLike):
            raise ValueError(f"solver={entry!r}: give a Solver, a name, the path of a JSON file or folder, or a list")
        elif is_file(entry) or Path(entry).is_dir():
            files = sorted(Path(entry).glob("*.json")) if Path(entry).is_dir() else [entry]
            found = [Solver.load(file) for file in files]
            embedded += [table.to_dict() for table in found]
        else:
            name = Name.parse(os.fspath(entry))
            names.append(os.fspath(entry))
            if name.handmade:
                methods.append(name)
            else:
                steps = published_steps(name.name) if name.num_steps is None else [name.num_steps]
                found = [find_solver(name.name, num_steps=n) for n in steps]
        for table in found:
            if table.num_steps in tables:
                raise ValueError(
                    f"two tables for {table.num_steps} steps: {tables[table.num_steps].name or '(unnamed)'} and "
                    f"{table.name or '(unnamed)'}; give one per number of steps"
                )
            tables[table.num_steps] = table
    return tables, methods, names, embedded
